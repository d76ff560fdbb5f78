"""`VideoPandaTrainer`: `transformers.Trainer` with a learning rate per part, and with distillation."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from video_panda_hf.hub import CARD, ModelFacts, written
from video_panda_hf.modeling import labels_after

from .arguments import VideoPandaTrainingArguments
from .checkpoints import last_complete_checkpoint
from .collator import VideoPandaDataCollator
from .distillation import (
    PICTURES,
    VideoPandaDistillationHead,
    VideoPandaTeacher,
    attach_distillation_head,
    load_head,
    of_videos,
    save_head,
    videos_by_teacher,
)
from .parts import base_model, freeze_parts, keep_in_step, part_of, videos_of
from .predictions import IGNORED, in_place, most_likely, prompts_and_answers
from .tasks import figures_of, load_eval_task


CHARACTERS_PER_TOKEN = 4
TOKENS_PER_VIDEO = 2184
BATCHES_SORTED = 50  # batches to sort by length at a time
LONGEST_ANSWER = 256  # tokens, where no setting says how many

# Training arguments in a model card, besides the training's length and the arguments of this package.
SETTINGS = ["learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"]
SETTINGS += ["adam_beta1", "adam_beta2", "bf16", "fp16", "seed"]


class VideoPandaTrainer(Trainer):
    r"""
    `transformers.Trainer` for Video-Panda. In addition, it

    * freezes the parts that `args` does not train, and gives each part its own learning rate. It unfreezes nothing:
      with PEFT adapters, PEFT decides what is trained;
    * adds `args.distillation_weight` · distillation loss [eq. 19] to the loss, if `args.distillation_teacher` is set.
      The language model's loss is the mean over all tokens of the batch, the distillation loss the mean over all its
      frames, however the batch is split. The head is trained with the model and saved beside it, as
      `distillation_head.safetensors`. The teacher is never saved. With `args.picture_teacher`, videos of one frame
      have this teacher and a head of their own, `picture_distillation_head.safetensors`;
    * logs `language_loss`, `distillation_loss`, `tokens_per_second` (without padding) and `videos_per_second` over
      all processes. The time of evaluation and saving is left out;
    * computes logits only for positions with a label, because a video has thousands of positions and its answer a few.
      Predictions and `compute_loss_func` get all logits;
    * with `train_sampling_strategy="group_by_length"`, batches examples of similar length, estimated from their text
      and number of videos;
    * makes a `VideoPandaDataCollator` of `processing_class`, a `VideoPandaProcessor`, if no `data_collator` is given;
    * passes the dataset to a `VideoPandaDataCollator` as `stand_ins`;
    * writes a model card about the training, but never over a card that was edited by hand.

    The evaluation loss is the language model's loss only. Beside it there may be generated answers
    (`args.predict_with_generate`) and the accuracy of a task (`args.eval_task`).

    Args:
        model (`torch.nn.Module`):
            A `VideoPandaForConditionalGeneration`, or a PEFT model around one.
        args (`VideoPandaTrainingArguments`):
            The training arguments.
        positional, keywords:
            Further arguments of `transformers.Trainer`.

    Raises:
        ValueError: If a teacher is used with DeepSpeed ZeRO-3 or FSDP1; with several GPUs in one process; with label
            smoothing (`Trainer` would apply it to labels that are not shifted); for an `eval_task` under FSDP or
            ZeRO-3, or without a processor.
    """

    args: VideoPandaTrainingArguments

    def __init__(self, model: nn.Module, args: VideoPandaTrainingArguments, *positional, **keywords):
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor = {args.label_smoothing_factor:g}: this model has none. Set it to 0."
            )
        freeze_parts(
            model,
            train_vision=args.train_vision,
            train_projector=args.train_projector,
            train_language=args.train_language,
        )
        no_collator = not positional and keywords.get("data_collator") is None
        if no_collator and hasattr(processor := keywords.get("processing_class"), "video_processor"):
            keywords["data_collator"] = VideoPandaDataCollator(processor)
        super().__init__(model, args, *positional, **keywords)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs and one process: packed patches cannot be dealt out to them. Start with "
                "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        self.teacher = self.picture_teacher = None
        if args.distillation_teacher is not None:
            self.teacher = self.load_teacher()
            self.distillation_head = self.add_distillation_head()
        if args.picture_teacher is not None:
            self.picture_teacher = self.pretrained_teacher(args.picture_teacher)
            self.picture_distillation_head = self.add_distillation_head(PICTURES)
        is_sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        if args.world_size > 1 or is_sharded or not args.train_language:  # alone, text would have no gradient at all
            keep_in_step(model, sharded=is_sharded)
        self._eval_task, self._figures = load_eval_task(args, self.processing_class, is_sharded), None
        self._sums, self._steps, self._seconds, self._started = None, 0, 0.0, None

    # Distillation

    def load_teacher(self) -> VideoPandaTeacher:
        """Loads `args.distillation_teacher` in the dtype of mixed precision. Raises `ValueError` for FSDP1, ZeRO-3."""
        return self.pretrained_teacher(self.args.distillation_teacher)

    def pretrained_teacher(self, name_or_path: str) -> VideoPandaTeacher:
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
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
            name_or_path,
            base_model(self.model).config.vision_config,
            dtype=torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32,
            **student,
        ).to(self.args.device)

    def add_distillation_head(self, kind: str = "") -> VideoPandaDistillationHead:
        """Attaches a head to the model: new, or loaded from `args.distillation_head`. `kind`: see `teachers`."""
        model = base_model(self.model)
        text_config = model.config.text_config
        head = VideoPandaDistillationHead(
            text_config.hidden_size,
            self.teachers[kind].hidden_size,
            text_config.num_hidden_layers,
            distance=self.args.distillation_distance,
        )
        if (source := getattr(self.args, f"{kind}distillation_head")) is not None:
            load_head(head, source, kind)
        attach_distillation_head(model, head.to(model.device, model.dtype), f"{kind}distillation_head")
        return head

    @property
    def teachers(self) -> dict[str, VideoPandaTeacher]:
        """The teachers by the prefix of their names: `""`, and `"picture_"`, if there is one for pictures."""
        teachers = {"": self.teacher, PICTURES: self.picture_teacher}
        return {kind: teacher for kind, teacher in teachers.items() if teacher is not None}

    def get_batch_samples(self, *positional, **keywords):
        """`Trainer`'s micro-batches of the next step and their number of tokens. Also counts their frames."""
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
        """`Trainer`'s loss plus, in training with a teacher, the weighted distillation loss [eq. 19]."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        if self.compute_loss_func is None:  # a function of the user needs all logits
            inputs = {**inputs, "logits_to_keep": labels_after(inputs["labels"]) != -100}
        if self.teacher is not None:
            inputs = {**inputs, **self.distillation_inputs(inputs)}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        terms = [loss.detach()]
        if self.teacher is not None:
            distillation = outputs["distillation_loss"]
            if self.args.average_tokens_across_devices:  # DDP averages gradients, but this loss is a share of the sum
                distillation = distillation * self.args.world_size
            loss = loss + self.args.distillation_weight * distillation
            terms.append(distillation.detach())
        self.count(inputs, terms)
        return (loss, outputs) if return_outputs else loss

    def distillation_inputs(self, inputs: dict) -> dict:
        """The additional inputs of a model with a distillation head."""
        (pixels, grids), further = videos_of(inputs), {"num_frames_in_batch": self.num_frames_in_batch}
        grids = torch.zeros(0, 3, dtype=torch.long) if pixels is None else grids.cpu()
        for kind, chosen in videos_by_teacher(grids, self.picture_teacher is not None).items():
            teacher = self.teachers[kind]
            features = torch.zeros(0, teacher.hidden_size, device=self.args.device)
            if chosen.any():
                features = teacher(of_videos(pixels, grids, chosen), grids[chosen])
            further |= {f"{kind}teacher_features": features, f"{kind}teacher_grid_thw": teacher.grids(grids[chosen])}
        return further

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """`Trainer`'s evaluation, with that of `args.eval_task`. Its time does not count for the speeds."""
        self.stop_clock()
        if not metric_key_prefix.startswith("eval_"):  # else it is one of several datasets
            self._figures = None
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader, description, *positional, **keywords):
        """`Trainer`'s loop, without the rows of samples that were skipped, with the figures of `args.eval_task`."""
        self.gather_function = self.gather_rows
        output = super().evaluation_loop(dataloader, description, *positional, **keywords)
        if self._eval_task is not None and description == "Evaluation":
            self._figures = self._figures or self.figures_of_task()
            output.metrics.update(self._figures)
        return output

    def figures_of_task(self) -> dict[str, float]:
        """Runs `args.eval_task` with the frames that the collator takes."""
        settings = getattr(self.data_collator, "processor_kwargs", {})
        options = {name: settings.get(name) for name in ("num_frames", "fps", "max_frames")}
        options["max_new_tokens"] = self.args.generation_max_length or LONGEST_ANSWER
        model, step = base_model(self.model), self.state.global_step
        return figures_of(self._eval_task, model, self.processing_class, self.args, step, **options)

    def gather_rows(self, found):
        """What all processes found of the samples, as `Accelerator.gather_for_metrics`, without rows of -100 alone."""
        found = self.accelerator.gather_for_metrics(found)
        is_rows = isinstance(found, torch.Tensor) and found.dim() == 2
        return found[(found != IGNORED).any(1)] if is_rows else found

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """
        `Trainer`'s prediction step. In place of logits it gives generated answers (`args.predict_with_generate`, with
        the last answers as labels) or the most likely tokens. A `preprocess_logits_for_metrics` of the user gets all
        logits. If it has none to get, logits are computed only for positions with a label.
        """
        inputs = dict(inputs)
        kept, labels = inputs.pop("kept", None), inputs.get("labels")
        generates = self.args.predict_with_generate and not prediction_loss_only
        needs_logits = not (generates or prediction_loss_only) and self.preprocess_logits_for_metrics is not None
        followed = None
        if labels is not None and self.compute_loss_func is None and not needs_logits:
            followed = inputs["logits_to_keep"] = labels_after(labels) != IGNORED
        if generates and labels is None:
            loss = None
        else:
            only_loss = prediction_loss_only or generates
            loss, logits, labels = super().prediction_step(model, inputs, only_loss, ignore_keys)
        if prediction_loss_only or needs_logits:
            return loss, logits, labels
        if generates:
            predictions, labels = self.generate_answers(inputs)
        else:
            predictions = most_likely(logits[0] if isinstance(logits, tuple) else logits, followed)
        return loss, in_place(predictions, kept), None if labels is None else in_place(labels, kept)

    def generate_answers(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens that the model generates in place of the last answer of each row, and this answer's own."""
        args, settings = self.args, base_model(self.model).generation_config
        prompts, answers = prompts_and_answers(inputs, settings.pad_token_id or 0)
        options = {"use_cache": True}
        if args.generation_config is not None:
            settings = options["generation_config"] = Seq2SeqTrainer.load_generation_config(args.generation_config)
        options["max_new_tokens"] = args.generation_max_length or settings.max_new_tokens or LONGEST_ANSWER
        if args.generation_num_beams is not None:
            options["num_beams"] = args.generation_num_beams
        options["synced_gpus"] = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self.model)
        generated = self.model.generate(**prompts, **options)[:, prompts["input_ids"].shape[1] :]
        if answers is not None:  # a row without a label is no sample
            generated = generated.masked_fill((answers == IGNORED).all(1, keepdim=True), IGNORED)
        return generated, answers

    # Parts

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """`Trainer`'s optimizer with its groups (with and without weight decay) split by part."""
        if self.optimizer is None:
            super().create_optimizer(model)
            part_of_parameter = {
                parameter: part_of(name) for name, parameter in (model or self.model).named_parameters()
            }
            rates = {
                part: getattr(self.args, f"{part}_learning_rate") for part in ("vision", "language", "distillation")
            }
            self.optimizer.param_groups = [
                {**group, "params": params, "lr": group["lr"] if rate is None else rate}
                for group in self.optimizer.param_groups
                for part, rate in rates.items()
                if (params := [p for p in group["params"] if part_of_parameter[p] == part])
            ]
        return self.optimizer

    # Data and logs

    def get_train_dataloader(self) -> DataLoader:
        """`Trainer`'s DataLoader. With `group_by_length`, the lengths are estimated from the messages."""
        dataset = self.train_dataset
        if self.is_grouped(dataset):
            args = self.args
            lengths = [estimate_length(example["messages"]) for example in dataset]
            seed = args.seed if args.data_seed is None else args.data_seed
            batch_size = args.train_batch_size * args.gradient_accumulation_steps
            self.train_dataset = GroupedDataset(dataset, lengths, batch_size, seed)
        try:
            return self.loader(super().get_train_dataloader, dataset)
        finally:
            self.train_dataset = dataset

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """`Trainer`'s DataLoader, whose collator takes its stand-ins from the same dataset."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        return self.loader(super().get_eval_dataloader, dataset, eval_dataset)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        """`Trainer`'s DataLoader, whose collator takes its stand-ins from the same dataset."""
        return self.loader(super().get_test_dataloader, test_dataset, test_dataset)

    def is_grouped(self, dataset) -> bool:
        """Whether to group by length, with lengths estimated from `messages` (`Trainer` needs `input_ids`)."""
        grouped = self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__")
        return grouped and len(dataset) > 0 and "messages" in dataset[0]

    def loader(self, make: Callable[..., DataLoader], dataset, *given) -> DataLoader:
        """
        A DataLoader of `Trainer`. Its collator takes its stand-ins from `dataset` (and marks which rows it kept, if
        not for training), and a dataset that is grouped here is read sequentially.

        Workers that persist draw a seed when they start: once in an unbroken run, again in one that goes on. So they
        have a stream of random numbers of their own, and leave that of dropout alone.
        """
        collator, strategy = self.data_collator, self.args.train_sampling_strategy
        if isinstance(collator, VideoPandaDataCollator) and collator.on_error == "skip":
            stand_ins = dataset if hasattr(dataset, "__len__") and not len(collator.stand_ins) else collator.stand_ins
            self.data_collator = collator.with_stand_ins(stand_ins, marks_kept=bool(given))
        if self.is_grouped(dataset):
            self.args.train_sampling_strategy = "sequential"
        try:
            loader = make(*given)
        finally:
            self.data_collator, self.args.train_sampling_strategy = collator, strategy
        if loader.persistent_workers and loader.generator is None:
            loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def count(self, inputs: dict, terms: list[torch.Tensor]) -> None:
        """Adds the tokens, videos and loss terms of a micro-batch to the next log."""
        grids, mask = inputs.get("video_grid_thw"), inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        counts = [tokens, 0 if grids is None else len(grids), *terms]
        counts = torch.stack([torch.as_tensor(count, device=self.args.device).float() for count in counts])
        self._sums = counts if self._sums is None else self._sums + counts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer`'s log, plus the loss terms and speeds since the last one."""
        if "loss" in logs and self._sums is not None:
            tokens, videos, *terms = self.accelerator.reduce(self._sums, "sum").tolist()
            self.stop_clock()
            for name, term in zip(["language_loss", "distillation_loss"], terms, strict=False):
                logs[name] = term / self._steps / self.args.world_size
            logs["tokens_per_second"], logs["videos_per_second"] = tokens / self._seconds, videos / self._seconds
            self._sums, self._steps, self._seconds = None, 0, 0.0
        super().log(logs, start_time)

    def stop_clock(self) -> None:
        """Stops the clock of the speeds until the next batch is fetched."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional, **keywords):
        """
        `Trainer`'s training. Resuming also restores the distillation heads.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint. `True` is the last complete checkpoint in `args.output_dir`.
            positional, keywords:
                Further arguments of `Trainer.train`.

        Returns:
            `transformers.trainer_utils.TrainOutput`.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"No valid checkpoint found in {self.args.output_dir}")
        self.load_head_of(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *positional, **keywords)
        if self.args.load_best_model_at_end:
            self.load_head_of(self.state.best_model_checkpoint)
        return output

    def load_head_of(self, checkpoint: str | bool | None) -> None:
        """Loads the distillation heads from a checkpoint's folder, if there is a teacher."""
        # FSDP and DeepSpeed checkpoints hold the heads among the model's weights.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not sharded and isinstance(checkpoint, (str, os.PathLike)):
            for kind in self.teachers:
                load_head(getattr(self, f"{kind}distillation_head"), checkpoint, kind)

    def save_model(self, output_dir: str | None = None, *positional, **keywords) -> None:
        """`Trainer`'s saving. Each distillation head gets its own file."""
        self.stop_clock()
        folder = Path(output_dir or self.args.output_dir)
        for kind in self.teachers:  # first, because `save_model` may push the folder
            save_head(getattr(self, f"{kind}distillation_head"), folder if self.args.should_save else None, kind)
        super().save_model(output_dir, *positional, **keywords)
        if self.args.push_to_hub and self.args.should_save and folder != Path(self.args.output_dir):
            # `Trainer` copies a checkpoint's weights and configuration to the output folder and pushes that. The
            # configuration names code files, so they must be there too.
            for module in folder.glob("*.py"):
                shutil.copy(module, self.args.output_dir)

    # Hub

    def create_model_card(self, **options) -> None:
        """
        Writes the model card to the output folder.

        A card that was edited by hand is kept: the one in the folder, or else the one in the Hub repository.

        Args:
            options: the options of `Trainer.create_model_card`: `license`, `tags`, `dataset`, ….
        """
        if not self.is_world_process_zero():
            return
        file, text = Path(self.args.output_dir) / CARD, self.written_card()
        if text is not None:
            file.write_text(text, encoding="utf-8")
            return
        if base_model(self.model) is not self.model:
            return super().create_model_card(**options)  # PEFT completes this card
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
        """The training settings in a model card."""
        args, inherited = self.args, {field.name for field in fields(Seq2SeqTrainingArguments)}
        own = [field.name for field in fields(VideoPandaTrainingArguments) if field.name not in inherited]
        own.remove("eval_task_videos")  # a folder of this machine
        if self.teacher is None:
            own = [name for name in own if name not in ("distillation_weight", "distillation_distance")]
        length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        settings = {name: getattr(args, name) for name in [*SETTINGS, length, *own]}
        settings["batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {name: getattr(value, "value", value) for name, value in settings.items() if value is not None}

    def written_card(self) -> str | None:
        """A card edited by hand, in the output folder or the Hub repository; `None` if there is none."""
        args, api = self.args, HfApi(token=self.args.hub_token)
        files = [Path(args.output_dir) / CARD]
        if self.hub_model_id is not None and api.file_exists(self.hub_model_id, CARD, revision=args.hub_revision):
            files.append(Path(api.hf_hub_download(self.hub_model_id, CARD, revision=args.hub_revision)))
        texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        return next(filter(None, map(written, texts)), None)


class GroupedDataset(Dataset):
    """
    A dataset in random order, with neighbours of similar length.

    The order depends only on seed and epoch. A resumed run sees exactly the rest of its epoch. The longest example
    comes first, so that a lack of memory shows at once.

    Args:
        dataset: has `__len__` and `__getitem__`.
        lengths: length of each example.
        batch_size: examples of a whole batch, over all micro-batches.
        seed: seed of the order.
    """

    def __init__(self, dataset, lengths: Sequence[int], batch_size: int, seed: int):
        self.dataset, self.lengths, self.seed = dataset, torch.tensor(lengths), seed
        self.stretch = batch_size * max(1, min(BATCHES_SORTED, len(lengths) // (4 * batch_size)))
        self.order = torch.arange(len(lengths)).share_memory_()  # persistent workers must see the next epoch's order
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's DataLoader at the start of an epoch."""
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
    """Roughly the tokens of a conversation, mostly those of its videos."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    characters = sum(len(content) for content in contents if isinstance(content, str))
    characters += sum(len(part.get("text") or "") for part in parts)
    return characters // CHARACTERS_PER_TOKEN + TOKENS_PER_VIDEO * sum(part["type"] == "video" for part in parts)


def listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def metrics_of(entry: dict[str, float]) -> dict[str, float]:
    """The metrics of a `log_history` entry by their name in a model card; empty if it is not an evaluation's."""
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
            rows[entry["step"]] = {**training, "Validation Loss": metrics.pop("Loss"), **metrics}
    if not rows:
        return None
    names = list(next(iter(rows.values())))
    lines = [names, ["---:"] * len(names), *([in_short(row.get(name)) for name in names] for row in rows.values())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
