"""`VideoPandaTrainer`: `transformers.Trainer` with the model's parts told apart, and with distillation."""

import re
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modelcard import TrainingSummary, make_markdown_table
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..conversion_rules import HEAD_FILE
from ..modeling.hub_video_panda import CARD, ModelFacts, written
from .arguments import VideoPandaTrainingArguments
from .collator import VideoPandaDataCollator
from .distillation import VideoPandaDistillationHead, VideoPandaTeacher, attach_distillation_head


# `target_modules` of a PEFT configuration: every linear map of the LLM, none of STAB, projector, heads. For LLMs that
# call their maps q_proj, …, down_proj, as Llama, Qwen, SmolLM, Mistral, Gemma and Phi do.
LANGUAGE_MODEL_LINEARS = r".*\.language_model\..*_proj"
# `modules_to_save` of a PEFT configuration: what is trained in full beside the adapters, and saved with them.
STAB_AND_PROJECTOR = ["vision_tower", "multi_modal_projector"]

PART = re.compile(r"(?:^|\.)(vision_tower|multi_modal_projector|distillation_head)\.")
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_VIDEO = 2184


class VideoPandaTrainer(Trainer):
    r"""
    `transformers.Trainer`, and beyond it

    * trains the parts that `args` says (those it does not name stay as they are: `requires_grad` of a model with PEFT
      adapters is PEFT's choice), each with its own learning rate;
    * adds `args.distillation_weight` · distillation to the loss, if there is an `args.distillation_teacher`. Both
      terms are means over the whole batch: over its tokens, over its frames, whatever it is split into. The head is
      trained with the model and saved beside it, as `distillation_head.safetensors`; the teacher is never saved;
    * logs `language_loss`, `distillation_loss`, `tokens_per_second` (without padding) and `videos_per_second`, over
      all processes; evaluation and saving do not count as time;
    * computes logits only where a label follows, unless predictions are asked for or `compute_loss_func` wants them
      all: a video has thousands of positions, its answer a few;
    * with `train_sampling_strategy="group_by_length"`, puts examples with videos together, and those without;
    * gives a `VideoPandaDataCollator` the dataset for rows that stand in for a batch of nothing but bad ones;
    * writes a model card with what it knows of the training, never over one that was edited by hand.

    The evaluation loss is the language model's alone.

    Raises:
        ValueError: for a teacher together with DeepSpeed ZeRO-3, for several GPUs in one process, for label smoothing
            (which `Trainer` would apply without shifting the labels); under DeepSpeed ZeRO-3, for a batch of which
            some processes have videos and others pictures or text alone.
    """

    args: VideoPandaTrainingArguments

    def __init__(self, model: nn.Module, args: VideoPandaTrainingArguments, *positional, **keywords):
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor = {args.label_smoothing_factor:g}: this model has none. Set it to 0."
            )
        freeze_parts(model, args)
        if args.world_size > 1 or not args.train_language:
            keep_in_step(base_model(model), alone=args.world_size == 1)
        super().__init__(model, args, *positional, **keywords)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs and one process: packed patches cannot be dealt out to them. Start with "
                "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        self.teacher = None
        if args.distillation_teacher is not None:
            self.teacher = self.load_teacher()
            self.distillation_head = self.add_distillation_head()
        self._sums, self._steps, self._started = None, 0, None

    # Distillation

    def load_teacher(self) -> VideoPandaTeacher:
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "Distillation does not work with DeepSpeed ZeRO-3, which would take the teacher apart as it is "
                "loaded: choose ZeRO-2 or FSDP2."
            )
        student = {}
        if hasattr(self.processing_class, "video_processor"):
            video_processor = self.processing_class.video_processor
            student = {"student_mean": video_processor.image_mean, "student_std": video_processor.image_std}
        return VideoPandaTeacher.from_pretrained(
            self.args.distillation_teacher,
            base_model(self.model).config.vision_config,
            dtype=torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32,
            **student,
        ).to(self.args.device)

    def add_distillation_head(self) -> VideoPandaDistillationHead:
        model = base_model(self.model)
        text_config = model.config.text_config
        head = VideoPandaDistillationHead(
            text_config.hidden_size, self.teacher.hidden_size, text_config.num_hidden_layers
        )
        if self.args.distillation_head is not None:
            load_head(head, self.args.distillation_head)
        attach_distillation_head(model, head.to(model.device, model.dtype))
        return head

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`: the parts of the next step's batch and their tokens. Counts their frames as well."""
        self._started = self._started or time.perf_counter()
        self._steps += 1
        parts, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.teacher is not None:
            grids = [part["video_grid_thw"] for part in parts if part.get("video_grid_thw") is not None]
            frames = torch.as_tensor(sum(grid[:, 0].sum() for grid in grids), device=device)
            if self.args.average_tokens_across_devices:
                frames = self.accelerator.reduce(frames, "sum")
            self.num_frames_in_batch = frames.clamp(min=1)
        return parts, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.world_size > 1 and is_deepspeed_zero3_enabled():
            kinds = torch.tensor([has_moving_video(inputs), inputs.get("pixel_values_videos") is not None])
            if len(self.accelerator.gather(kinds[None].to(self.args.device)).unique(dim=0)) > 1:
                raise ValueError(
                    "Some processes have videos in their part of the batch, others pictures or text alone: with "
                    "DeepSpeed ZeRO-3 they would wait for each other for ever. Train on one kind, or choose ZeRO-2 or "
                    "FSDP2."
                )
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        if self.compute_loss_func is None:  # that wants all logits
            inputs = {**inputs, "logits_to_keep": followed_by_label(inputs["labels"])}
        if self.teacher is not None:
            inputs = {**inputs, **self.distillation_inputs(inputs)}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        terms = [loss.detach()]
        if self.teacher is not None:
            distillation = outputs["distillation_loss"]
            if self.args.average_tokens_across_devices:  # gradients are averaged, the loss is this process' share
                distillation = distillation * self.accelerator.num_processes
            loss = loss + self.args.distillation_weight * distillation
            terms.append(distillation.detach())
        self.count(inputs, terms)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if prediction_loss_only and self.compute_loss_func is None and inputs.get("labels") is not None:
            inputs = {**inputs, "logits_to_keep": followed_by_label(inputs["labels"])}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def distillation_inputs(self, inputs: dict) -> dict:
        """What the model with a head attached takes beside its own inputs."""
        if inputs.get("pixel_values_videos") is None:
            grids = torch.zeros(0, 3, dtype=torch.long)
            features = torch.zeros(0, self.teacher.hidden_size, device=self.args.device)
        else:
            grids = self.teacher.grids(inputs["video_grid_thw"].cpu())
            features = self.teacher(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        return {
            "teacher_features": features,
            "teacher_grid_thw": grids,
            "num_frames_in_batch": self.num_frames_in_batch,
        }

    # Parts

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """`Trainer`'s own, its groups (with and without weight decay) split by part."""
        if self.optimizer is None:
            super().create_optimizer(model)
            part_of_parameter = {
                parameter: part_of(name) for name, parameter in (model or self.model).named_parameters()
            }
            self.optimizer.param_groups = [
                {**group, "params": params, "lr": rate}
                for group in self.optimizer.param_groups
                for part, rate in self.learning_rates(group["lr"]).items()
                if (params := [p for p in group["params"] if part_of_parameter[p] == part])
            ]
        return self.optimizer

    def learning_rates(self, default: float) -> dict[str, float]:
        rates = {part: getattr(self.args, f"{part}_learning_rate") for part in ("vision", "language", "distillation")}
        return {part: default if rate is None else rate for part, rate in rates.items()}

    # Data and logs

    def is_grouped(self, dataset) -> bool:
        """Whether to tell the lengths by the messages, which `Trainer` cannot."""
        grouped = self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__")
        return grouped and len(dataset) > 0 and "messages" in dataset[0]

    def _get_train_sampler(self, train_dataset=None):
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.is_grouped(train_dataset):
            return super()._get_train_sampler(train_dataset)
        return EpochwiseGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            lengths=[estimate_length(example["messages"]) for example in train_dataset],
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _get_eval_sampler(self, eval_dataset):
        if not self.is_grouped(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size == 1 else None  # as without grouping

    def _get_dataloader(self, dataset, *positional, **keywords):
        collator = self.data_collator
        if (
            isinstance(collator, VideoPandaDataCollator)
            and hasattr(dataset, "__len__")
            and not len(collator.stand_ins)
        ):
            self.data_collator = collator.with_stand_ins(dataset)
        try:
            return super()._get_dataloader(dataset, *positional, **keywords)
        finally:
            self.data_collator = collator

    def count(self, inputs: dict, terms: list[torch.Tensor]) -> None:
        """Adds tokens, videos and the loss terms of a part of a batch to what the next log reports."""
        grids, mask = inputs.get("video_grid_thw"), inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        counts = [tokens, 0 if grids is None else len(grids), *terms]
        counts = torch.stack([torch.as_tensor(count, device=self.args.device).float() for count in counts])
        self._sums = counts if self._sums is None else self._sums + counts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums is not None:
            seconds = time.perf_counter() - self._started
            tokens, videos, *terms = self.accelerator.reduce(self._sums, "sum").tolist()
            for name, term in zip(["language_loss", "distillation_loss"], terms, strict=False):
                logs[name] = term / self._steps / self.accelerator.num_processes
            logs["tokens_per_second"], logs["videos_per_second"] = tokens / seconds, videos / seconds
            self._sums, self._steps, self._started = None, 0, None
        super().log(logs, start_time)

    @contextmanager
    def clock_stopped(self):
        stopped, started, self._started = time.perf_counter(), self._started, None
        yield
        if started is not None:  # else it was stopped already
            self._started = started + time.perf_counter() - stopped

    def evaluate(self, *positional, **keywords) -> dict[str, float]:
        with self.clock_stopped():
            return super().evaluate(*positional, **keywords)

    # Checkpoints

    def _save_checkpoint(self, *positional, **keywords) -> None:
        with self.clock_stopped():
            super()._save_checkpoint(*positional, **keywords)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        head = None
        if self.teacher is not None:
            mark = "distillation_head."  # `state_dict` is there where the model itself has only parts of its weights
            head = {key.rpartition(mark)[2]: value for key, value in (state_dict or {}).items() if mark in key}
            head = head or self.distillation_head.state_dict()
        super()._save(output_dir, state_dict)
        if head is not None and self.args.should_save:
            save_file(head, Path(output_dir or self.args.output_dir) / HEAD_FILE, {"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_head_of(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.load_head_of(self.state.best_model_checkpoint)

    def load_head_of(self, checkpoint: str) -> None:
        # The checkpoints of FSDP and DeepSpeed have the head among the model's own weights.
        if self.teacher is not None and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            load_head(self.distillation_head, checkpoint)

    # Hub

    def create_model_card(self, **options) -> None:
        """
        Writes the model card of the output folder, with `Trainer`'s options: `license`, `tags`, `dataset`, …. One
        that was edited by hand is kept: the folder's, or else, where this is pushed, the repository's.
        """
        if not self.is_world_process_zero():
            return
        file, text = Path(self.args.output_dir) / CARD, self.written_card()
        if text is not None:
            file.write_text(text, encoding="utf-8")
            return
        if base_model(self.model) is not self.model:
            return super().create_model_card(**options)  # PEFT adds to it what is to be known of adapters
        summary, args = TrainingSummary.from_trainer(self, **options), self.args
        unused = ["remove_unused_columns"] if self.teacher else ["remove_unused_columns", "distillation_weight"]
        own = {name: getattr(args, name) for name in VideoPandaTrainingArguments.__annotations__ if name not in unused}
        own = {name: value for name, value in own.items() if value is not None}
        datasets = options.get("dataset") or []
        facts = ModelFacts(
            self.model.config,
            num_parameters=self.model.num_parameters(),
            base_model=options.get("finetuned_from"),
            license=summary.license,
            datasets=[datasets] if isinstance(datasets, str) else datasets,
            metrics=summary.eval_results or {},
            training={**summary.hyperparameters, **own},
            training_log=make_markdown_table(summary.eval_lines),
            tags=summary.tags,
        )
        card = facts.card(self.hub_model_id or args.output_dir, HfApi(token=args.hub_token))
        file.write_text(str(card), encoding="utf-8")

    def written_card(self) -> str | None:
        """The model card that someone wrote, if there is one: the output folder's, or the repository's."""
        args, api = self.args, HfApi(token=self.args.hub_token)
        files = [Path(args.output_dir) / CARD]
        if self.hub_model_id is not None and api.file_exists(self.hub_model_id, CARD, revision=args.hub_revision):
            files.append(Path(api.hf_hub_download(self.hub_model_id, CARD, revision=args.hub_revision)))
        texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        return next(filter(None, map(written, texts)), None)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """`Trainer` copies weights and configuration from the checkpoint; the code that it names belongs to them."""
        if self.is_world_process_zero():
            for module in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(module, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)


class EpochwiseGroupedSampler(LengthGroupedSampler):
    """`LengthGroupedSampler` in an order that follows from seed and epoch: a run that goes on in the middle of a later
    epoch sees the rest of that epoch, and nothing twice."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


def freeze_parts(model: nn.Module, args: VideoPandaTrainingArguments) -> None:
    """
    Freezes what `args` says is not to be trained. A STAB that is frozen, by whomever, stays in evaluation mode, also
    after `train()`: else batch norm's statistics would go on changing, and dropout blur what it gives.
    """
    trained = {
        "vision_tower": args.train_vision,
        "multi_modal_projector": args.train_projector,
        "distillation_head": True,
        None: args.train_language,
    }
    for name, parameter in model.named_parameters():
        if not trained[module_of(name)]:
            parameter.requires_grad_(False)
    tower = base_model(model).model.vision_tower
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.register_forward_pre_hook(lambda tower, _: tower.eval() and None)


def keep_in_step(model: nn.Module, alone: bool = False) -> None:
    """
    Gives STAB and projector gradients of zero, where a part of a batch gives them none: that has no video, or nothing
    but pictures, which leave alone what looks across time.

    Processes exchange the gradients that they have: FSDP fails, and DDP may wait for ever, where one has fewer. One
    that is `alone` needs this for text only, where nothing else may have any: the language model may be frozen.
    """

    def touch(model, _, inputs: dict, outputs):
        lacks_some = inputs.get("pixel_values_videos") is None if alone else not has_moving_video(inputs)
        # ZeRO-3 has taken the parameters apart here; `compute_loss` sees to it that all processes need the same.
        if model.training and lacks_some and not is_deepspeed_zero3_enabled():
            unused = [*model.vision_tower.parameters(), *model.multi_modal_projector.parameters()]
            zero = sum(parameter.sum() for parameter in unused if parameter.requires_grad) * 0.0
            outputs["last_hidden_state"] = outputs["last_hidden_state"] + zero
        return outputs

    model.model.register_forward_hook(touch, with_kwargs=True)


def has_moving_video(inputs: dict) -> bool:
    """Whether any video has more than one frame."""
    return inputs.get("pixel_values_videos") is not None and bool((inputs["video_grid_thw"][:, 0] > 1).any())


def followed_by_label(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose logits the loss needs. (rows, tokens) → bool of that shape."""
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] != -100


def module_of(parameter_name: str) -> str | None:
    """`vision_tower`, `multi_modal_projector` or `distillation_head`; `None` for the language model and its head."""
    match = PART.search(parameter_name)
    return match and match[1]


def part_of(parameter_name: str) -> str:
    """Which learning rate a parameter has: `vision`, `language` or `distillation`."""
    parts = {"vision_tower": "vision", "multi_modal_projector": "vision", "distillation_head": "distillation"}
    return parts.get(module_of(parameter_name), "language")


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, out of the PEFT model around it if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_head(head: VideoPandaDistillationHead, file_or_folder: str) -> None:
    """
    Loads a head's weights.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, if it is of another LLM or teacher.
    """
    path = Path(file_or_folder)
    path = path / HEAD_FILE if path.is_dir() else path
    try:
        head.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is the distillation head of another LLM or teacher: {error}") from error


def estimate_length(messages: list[dict]) -> int:
    """Tokens of a conversation, roughly: its videos count more than any text."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    characters = sum(len(content) for content in contents if isinstance(content, str))
    characters += sum(len(part.get("text") or "") for part in parts)
    return characters // CHARACTERS_PER_TOKEN + TOKENS_PER_VIDEO * sum(part["type"] == "video" for part in parts)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-N` that was written to its end, if any: a killed run may leave half of one behind."""
    complete = {
        int(found[1]): file.parent
        for file in Path(output_dir).glob("checkpoint-*/trainer_state.json")
        if (found := re.fullmatch(r"checkpoint-(\d+)", file.parent.name))
    }
    return str(complete[max(complete)]) if complete else None


__all__ = ["LANGUAGE_MODEL_LINEARS", "STAB_AND_PROJECTOR", "VideoPandaTrainer", "last_complete_checkpoint"]
