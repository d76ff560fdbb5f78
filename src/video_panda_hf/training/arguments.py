"""What `transformers.TrainingArguments` does not know of: the model's parts, their learning rates, distillation."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


# transformers 5.16 has it under its old name alone, `gradient_checkpointing`, which later releases warn of.
HAS_ACTIVATION_CHECKPOINTING = hasattr(TrainingArguments, "activation_checkpointing")


@dataclass
class VideoPandaTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` for `VideoPandaTrainer`. All of those keep their meaning and, but for two, their default:
    `remove_unused_columns` is off, since the collator needs the examples' messages, and so is `dispatch_batches` of
    `accelerator_config`, since packed pixels cannot be sliced by rows.

    A model has three parts: vision (STAB and projector), language (the LLM and its head) and, with a teacher, the
    distillation head.
    """

    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of STAB and projector. Default: learning_rate."}
    )
    language_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the LLM or of its adapters. Default: learning_rate."}
    )
    distillation_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the distillation head. Default: learning_rate."}
    )
    train_vision: bool = field(
        default=True,
        metadata={"help": "False freezes STAB, statistics of its batch norm included, and turns off its dropout."},
    )
    train_projector: bool = field(default=True, metadata={"help": "False freezes the projector."})
    train_language: bool = field(default=True, metadata={"help": "False freezes the LLM and its head."})
    distillation_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a vision model (CLIP, SigLIP, DINOv2, …) to distil from. Default: none."
        },
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "The loss is the language model's plus this times the distillation's."}
    )
    distillation_head: str | None = field(
        default=None,
        metadata={
            "help": "distillation_head.safetensors, or a folder that has one (an earlier stage's output, a converted "
            "checkpoint), to start from. Default: a new head."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop what the model's forward does not take before the collator sees it."}
    )
    if not HAS_ACTIVATION_CHECKPOINTING:
        activation_checkpointing: bool = field(
            default=False, metadata={"help": "Compute activations anew for the gradients: slower, but less memory."}
        )

    def __post_init__(self):
        if not HAS_ACTIVATION_CHECKPOINTING:
            self.gradient_checkpointing = self.gradient_checkpointing or self.activation_checkpointing
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False
        if self.distillation_head is not None and self.distillation_teacher is None:
            raise ValueError(
                "`distillation_head` is of no use without a `distillation_teacher`: give both or neither."
            )
        if not (self.train_vision or self.train_projector or self.train_language):
            raise ValueError("Nothing to train: `train_vision`, `train_projector` and `train_language` are all False.")
