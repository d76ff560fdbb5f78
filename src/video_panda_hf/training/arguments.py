"""`VideoPandaTrainingArguments`: which parts are trained, their learning rates, distillation."""

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments

from .distillation import check_distance


# transformers 5.16 has only the old name, `gradient_checkpointing`. Later releases deprecate that name.
HAS_ACTIVATION_CHECKPOINTING = hasattr(Seq2SeqTrainingArguments, "activation_checkpointing")

# The settings of distillation that name a file or model, and what each is of no use without.
NEEDS = {
    "distillation_teacher": None,
    "distillation_head": "distillation_teacher",
    "picture_teacher": "distillation_teacher",
    "picture_distillation_head": "picture_teacher",
}


@dataclass
class VideoPandaTrainingArguments(Seq2SeqTrainingArguments):
    """
    `transformers.Seq2SeqTrainingArguments` plus the settings of Video-Panda's parts.

    Two inherited defaults differ. `remove_unused_columns` is `False`, because the collator needs the column
    `messages`. `dispatch_batches` of `accelerator_config` is `False`, because packed pixels cannot be sliced by rows.

    The parts of a model are vision (STAB and projector), language (the LLM and its LM head) and, with a teacher, the
    distillation heads.

    Args:
        vision_learning_rate (`float`, *optional*):
            Learning rate of STAB and projector. Defaults to `learning_rate`.
        language_learning_rate (`float`, *optional*):
            Learning rate of the LLM or of its adapters. Defaults to `learning_rate`.
        distillation_learning_rate (`float`, *optional*):
            Learning rate of the distillation heads. Defaults to `learning_rate`.
        train_vision (`bool`, *optional*, defaults to `True`):
            Whether to train STAB. `False` also freezes the statistics of its batch norm and turns off its dropout.
        train_projector (`bool`, *optional*, defaults to `True`):
            Whether to train the projector.
        train_language (`bool`, *optional*, defaults to `True`):
            Whether to train the LLM and its LM head.
        distillation_teacher (`str`, *optional*):
            Folder or Hub id of the vision model to distil from: LanguageBind's video tower, CLIP, SigLIP, DINOv2, ….
            Defaults to no distillation, as does "".
        distillation_weight (`float`, *optional*, defaults to 1.0):
            Weight of the distillation loss. The language model's loss has weight 1.
        distillation_distance (`str`, *optional*, defaults to `"cosine"`):
            How student and teacher are compared: `"cosine"` [eq. 19] or `"mse"` [table 5].
        distillation_head (`str`, *optional*):
            `distillation_head.safetensors`, or a folder that contains it (the output of an earlier stage, or a
            converted checkpoint), to start from. Defaults to a new head, as does "".
        picture_teacher (`str`, *optional*):
            Folder or Hub id of another teacher, for pictures and other videos of one frame, with a head of its own.
            Defaults to `distillation_teacher` for all videos, as does "".
        picture_distillation_head (`str`, *optional*):
            `picture_distillation_head.safetensors`, or a folder that contains it, to start from. Defaults to a new
            head, as does "".
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Whether to drop columns that the model's forward does not take, before the collator sees them.
        activation_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether to recompute activations in the backward pass: slower, but less memory.
        predict_with_generate (`bool`, *optional*, defaults to `False`):
            Whether `evaluate` and `predict` generate the last answer of each sample for `compute_metrics`.
        generation_max_length (`int`, *optional*):
            The most tokens of a generated answer, the prompt not counted. Defaults to `max_new_tokens` of the
            generation configuration, or else 256.
        generation_num_beams (`int`, *optional*), generation_config (`str`, `Path` or `GenerationConfig`, *optional*):
            How answers are generated. Default to what the model's own generation configuration says.
        eval_task (`str`, *optional*):
            File of questions, or name of a benchmark (`video_panda_hf.evaluation`), that is run at each evaluation,
            judged by comparison of words. Logged are `eval_<task>_accuracy`, where the right answer may stand among
            other words, and for questions without options `eval_<task>_match`, where it may not.
        eval_task_videos (`str`, *optional*):
            The folder of its videos. Defaults to the folder of the file.

    Raises:
        ValueError: If a head or `picture_teacher` is set without the teacher that it needs, for another
            `distillation_distance`, or if nothing is trained.
    """

    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of STAB and projector. Default: learning_rate."}
    )
    language_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the LLM or of its adapters. Default: learning_rate."}
    )
    distillation_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the distillation heads. Default: learning_rate."}
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
            "help": "Folder or Hub id of a vision model (LanguageBind's video tower, CLIP, …) to distil from. "
            "Default: none."
        },
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "The loss is the language model's plus this times the distillation's."}
    )
    distillation_distance: str = field(
        default="cosine", metadata={"help": "How student and teacher are compared: cosine, or mse (table 5)."}
    )
    distillation_head: str | None = field(
        default=None,
        metadata={
            "help": "distillation_head.safetensors, or a folder that has one (an earlier stage's output, a converted "
            "checkpoint), to start from. Default: a new head."
        },
    )
    picture_teacher: str | None = field(
        default=None,
        metadata={"help": "Another teacher, for pictures, with a head of its own. Default: the one teacher for all."},
    )
    picture_distillation_head: str | None = field(
        default=None,
        metadata={"help": "picture_distillation_head.safetensors, or a folder that has one. Default: a new head."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop what the model's forward does not take before the collator sees it."}
    )
    generation_max_length: int | None = field(
        default=None, metadata={"help": "With predict_with_generate: the most tokens of an answer. Default: 256."}
    )
    eval_task: str | None = field(
        default=None, metadata={"help": "File of questions, or name of a benchmark, that is run at each evaluation."}
    )
    eval_task_videos: str | None = field(
        default=None, metadata={"help": "Folder of the videos of eval_task. Default: the folder of the file."}
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
        check_distance(self.distillation_distance)
        for name, needed in NEEDS.items():
            setattr(self, name, getattr(self, name) or None)  # "" turns off on the command line what a recipe sets
            if needed is not None and getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"`{name}` is of no use without a `{needed}`: give both or neither.")
        if not (self.train_vision or self.train_projector or self.train_language):
            raise ValueError("Nothing to train: `train_vision`, `train_projector` and `train_language` are all False.")
