"""`VideoPandaTrainer`: `transformers.Trainer` with the model's parts told apart, and with distillation."""

import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from video_panda_hf.hub import CARD, ModelFacts, written
from video_panda_hf.modeling import labels_after

from .arguments import VideoPandaTrainingArguments
from .collator import VideoPandaDataCollator
from .distillation import (
    VideoPandaDistillationHead,
    VideoPandaTeacher,
    attach_distillation_head,
    load_head,
    save_head,
)
from .parts import base_model, freeze_parts, has_moving_video, keep_in_step, part_of


CHARACTERS_PER_TOKEN = 4
TOKENS_PER_VIDEO = 2184
BATCHES_SORTED = 50  # by length, at a time

# What a model card says of a training, beside its length and the arguments of this package.
SETTINGS = ["learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"]
SETTINGS += ["adam_beta1", "adam_beta2", "bf16", "fp16", "seed"]


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
        ValueError: for a teacher together with DeepSpeed ZeRO-3 or FSDP1, for several GPUs in one process, for label
            smoothing (which `Trainer` would apply without shifting the labels); under DeepSpeed ZeRO-3, for a batch of
            which some processes have videos and others pictures or text alone.
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
        self._sums, self._steps, self._seconds, self._started = None, 0, 0.0, None

    # Distillation

    def load_teacher(self) -> VideoPandaTeacher:
        if self.is_fsdp_enabled and not getattr(self.accelerator, "is_fsdp2", False):
            raise ValueError(
                "Distillation does not work with FSDP1, which flattens the head's weights together with the model's: "
                "set `fsdp_version: 2`."
            )
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

    def get_batch_samples(self, *positional, **keywords):
        """As in `Trainer`: the parts of the next step's batch and their tokens. Counts their frames as well."""
        if self._started is None:
            self._started = time.perf_counter()
        self._steps += 1
        parts, num_items = super().get_batch_samples(*positional, **keywords)
        if self.teacher is not None:
            grids = [part["video_grid_thw"] for part in parts if part.get("video_grid_thw") is not None]
            frames = torch.as_tensor(sum(grid[:, 0].sum() for grid in grids), device=self.args.device)
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
            inputs = {**inputs, "logits_to_keep": labels_after(inputs["labels"]) != -100}
        if self.teacher is not None:
            inputs = {**inputs, **self.distillation_inputs(inputs)}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        terms = [loss.detach()]
        if self.teacher is not None:
            distillation = outputs["distillation_loss"]
            if self.args.average_tokens_across_devices:  # gradients are averaged, the loss is this process' share
                distillation = distillation * self.args.world_size
            loss = loss + self.args.distillation_weight * distillation
            terms.append(distillation.detach())
        self.count(inputs, terms)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if prediction_loss_only and self.compute_loss_func is None and inputs.get("labels") is not None:
            inputs = {**inputs, "logits_to_keep": labels_after(inputs["labels"]) != -100}
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

    def get_train_dataloader(self) -> DataLoader:
        dataset = self.train_dataset
        if self.is_grouped(dataset):
            args = self.args
            lengths = [estimate_length(example["messages"]) for example in dataset]
            seed = args.seed if args.data_seed is None else args.data_seed
            batch_size = args.train_batch_size * args.gradient_accumulation_steps
            self.train_dataset = GroupedDataset(dataset, lengths, batch_size, seed)
        try:
            with self.settings_for(dataset):
                return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        with self.settings_for(self.eval_dataset[dataset] if isinstance(dataset, str) else dataset):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        with self.settings_for(test_dataset):
            return super().get_test_dataloader(test_dataset)

    def is_grouped(self, dataset) -> bool:
        """Whether to tell the lengths by the messages, which `Trainer` cannot."""
        grouped = self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__")
        return grouped and len(dataset) > 0 and "messages" in dataset[0]

    @contextmanager
    def settings_for(self, dataset):
        """While `Trainer` makes the loader of a dataset: rows of it stand in for bad ones, and it is read in its own
        order where `Trainer` could not tell the lengths."""
        collator, strategy = self.data_collator, self.args.train_sampling_strategy
        if (
            isinstance(collator, VideoPandaDataCollator)
            and hasattr(dataset, "__len__")
            and not len(collator.stand_ins)
        ):
            self.data_collator = collator.with_stand_ins(dataset)
        if self.is_grouped(dataset):
            self.args.train_sampling_strategy = "sequential"
        try:
            yield
        finally:
            self.data_collator, self.args.train_sampling_strategy = collator, strategy

    def count(self, inputs: dict, terms: list[torch.Tensor]) -> None:
        """Adds tokens, videos and the loss terms of a part of a batch to what the next log reports."""
        grids, mask = inputs.get("video_grid_thw"), inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        counts = [tokens, 0 if grids is None else len(grids), *terms]
        counts = torch.stack([torch.as_tensor(count, device=self.args.device).float() for count in counts])
        self._sums = counts if self._sums is None else self._sums + counts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums is not None:
            tokens, videos, *terms = self.accelerator.reduce(self._sums, "sum").tolist()
            self.stop_clock()
            for name, term in zip(["language_loss", "distillation_loss"], terms, strict=False):
                logs[name] = term / self._steps / self.args.world_size
            logs["tokens_per_second"], logs["videos_per_second"] = tokens / self._seconds, videos / self._seconds
            self._sums, self._steps, self._seconds = None, 0, 0.0
        super().log(logs, start_time)

    def stop_clock(self) -> None:
        """Until the next batch is fetched, time does not count."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def evaluate(self, *positional, **keywords) -> dict[str, float]:
        self.stop_clock()
        return super().evaluate(*positional, **keywords)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional, **keywords):
        """As in `Trainer`; the distillation head goes on as well. `True` is the last complete checkpoint."""
        if resume_from_checkpoint is True:  # without any, `Trainer` says what is missing
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir) or True
        self.load_head_of(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *positional, **keywords)
        if self.args.load_best_model_at_end:
            self.load_head_of(self.state.best_model_checkpoint)
        return output

    def load_head_of(self, checkpoint: str | bool | None) -> None:
        # The checkpoints of FSDP and DeepSpeed have the head among the model's own weights.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.teacher is not None and not sharded and isinstance(checkpoint, (str, os.PathLike)):
            load_head(self.distillation_head, checkpoint)

    def save_model(self, output_dir: str | None = None, *positional, **keywords) -> None:
        """As in `Trainer`; the distillation head goes into a file of its own."""
        self.stop_clock()
        folder = Path(output_dir or self.args.output_dir)
        if self.teacher is not None:  # before the rest, which may be pushed at once
            save_head(self.distillation_head, folder if self.args.should_save else None)
        super().save_model(output_dir, *positional, **keywords)
        if self.args.push_to_hub and self.args.should_save and folder != Path(self.args.output_dir):
            # `Trainer` pushes a checkpoint's weights and configuration from the output folder. The code that the
            # configuration names belongs to them.
            for module in folder.glob("*.py"):
                shutil.copy(module, self.args.output_dir)

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
        history, datasets, tags = self.state.log_history, options.get("dataset"), options.get("tags")
        facts = ModelFacts(
            self.model.config,
            num_parameters=self.model.num_parameters(),
            base_model=options.get("finetuned_from"),
            license=options.get("license"),
            datasets=listed(datasets),
            metrics=next(filter(None, map(metrics_of, reversed(history))), {}),
            training=self.training_settings(),
            training_log=results_table(history),
            tags=list(dict.fromkeys([*listed(tags), "generated_from_trainer"])),
        )
        card = facts.card(self.hub_model_id or self.args.output_dir, HfApi(token=self.args.hub_token))
        file.write_text(str(card), encoding="utf-8")

    def training_settings(self) -> dict[str, object]:
        """What a model card says of the training's settings."""
        args, inherited = self.args, {field.name for field in fields(TrainingArguments)}
        own = [field.name for field in fields(VideoPandaTrainingArguments) if field.name not in inherited]
        if self.teacher is None:
            own.remove("distillation_weight")
        length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        settings = {name: getattr(args, name) for name in [*SETTINGS, length, *own]}
        settings["batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {name: getattr(value, "value", value) for name, value in settings.items() if value is not None}

    def written_card(self) -> str | None:
        """The model card that someone wrote, if there is one: the output folder's, or the repository's."""
        args, api = self.args, HfApi(token=self.args.hub_token)
        files = [Path(args.output_dir) / CARD]
        if self.hub_model_id is not None and api.file_exists(self.hub_model_id, CARD, revision=args.hub_revision):
            files.append(Path(api.hf_hub_download(self.hub_model_id, CARD, revision=args.hub_revision)))
        texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        return next(filter(None, map(written, texts)), None)


class GroupedDataset(Dataset):
    """
    A dataset in a random order in which neighbours are about as long as each other.

    The order follows from seed and epoch: a run that goes on in the middle of a later epoch sees the rest of that
    epoch, and nothing twice. The longest example comes first, so that too little memory shows at once.

    Args:
        dataset: what has `__len__` and `__getitem__`.
        lengths: the length of each example.
        batch_size: examples of a batch, whatever it is split into.
        seed: of the order.
    """

    def __init__(self, dataset, lengths: Sequence[int], batch_size: int, seed: int):
        self.dataset, self.lengths, self.seed = dataset, torch.tensor(lengths), seed
        self.stretch = batch_size * max(1, min(BATCHES_SORTED, len(lengths) // (4 * batch_size)))
        self.order = torch.arange(len(lengths)).share_memory_()  # workers that live on see the next epoch's
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """The DataLoader of accelerate calls this at the start of an epoch."""
        order = torch.randperm(len(self.lengths), generator=torch.Generator().manual_seed(self.seed + epoch))
        longest = int((order == self.lengths.argmax()).nonzero())
        order[[0, longest]] = order[[longest, 0]]
        stretches = order.split(self.stretch)
        self.order.copy_(torch.cat([part[self.lengths[part].argsort(descending=True)] for part in stretches]))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int):
        return self.dataset[int(self.order[index])]


def estimate_length(messages: list[dict]) -> int:
    """Tokens of a conversation, roughly: its videos count more than any text."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    characters = sum(len(content) for content in contents if isinstance(content, str))
    characters += sum(len(part.get("text") or "") for part in parts)
    return characters // CHARACTERS_PER_TOKEN + TOKENS_PER_VIDEO * sum(part["type"] == "video" for part in parts)


def listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def metrics_of(entry: dict[str, float]) -> dict[str, float]:
    """What an evaluation measured, by the names of a model card, if an entry of `log_history` is of one."""
    if "eval_loss" not in entry:
        return {}
    speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    names = [name for name in entry if name.startswith("eval_") and name not in speed]
    return {name.removeprefix("eval_").replace("_", " ").title(): entry[name] for name in names}


def results_table(log_history: list[dict[str, float]]) -> str | None:
    """The losses and metrics of every evaluation, in Markdown."""
    rows, training_loss = {}, "none yet"
    for entry in log_history:
        training_loss = entry.get("loss", training_loss)
        if metrics := metrics_of(entry):
            training = {"Step": entry["step"], "Epoch": entry.get("epoch"), "Training Loss": training_loss}
            rows[entry["step"]] = {**training, **{"Validation Loss": metrics.pop("Loss")}, **metrics}
    if not rows:
        return None
    names = list(next(iter(rows.values())))
    lines = [names, ["---:"] * len(names), *([in_short(row.get(name)) for name in names] for row in rows.values())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-N` that was written to its end, if any: a killed run may leave half of one behind."""
    complete = {
        int(found[1]): file.parent
        for file in Path(output_dir).glob("checkpoint-*/trainer_state.json")
        if (found := re.fullmatch(r"checkpoint-(\d+)", file.parent.name))
    }
    return str(complete[max(complete)]) if complete else None


__all__ = ["VideoPandaTrainer", "last_complete_checkpoint"]
