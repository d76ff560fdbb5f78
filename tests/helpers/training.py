"""Tiny models, teachers, examples and trainers for the tests of training."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    TrainingArguments,
)

from helpers.tiny_models import PAD, PATCH_DIM, checkpoint_activations, placeholders, tiny_model
from video_panda_hf import VideoPandaVisionConfig
from video_panda_hf.training import VideoPandaTrainer, VideoPandaTrainingArguments
from video_panda_hf.training.distillation import (
    VideoPandaDistillationHead,
    VideoPandaTeacher,
    attach_distillation_head,
)


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def tiny_teacher(kind: str, image_size: int = 32, patch_size: int = 4, **sizes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = {"image_size": image_size, "patch_size": patch_size, **SIZES, **sizes}
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**config))
    if kind == "siglip":
        return SiglipVisionModel(SiglipVisionConfig(**config))
    return Dinov2Model(Dinov2Config(**config))


def save_teacher(folder, **sizes) -> str:
    """A made-up CLIP: pictures of 8 × 8 pixels, patches of 2 × 2, as the tiny model's canvas halved."""
    tiny_teacher("clip", image_size=8, patch_size=2, **sizes).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return str(folder)


VISION = VideoPandaVisionConfig(hidden_size=24, num_attention_heads=4, patch_size=4, image_size=64)


def distilling_model(checkpointing: bool = False):
    model = tiny_model()
    torch.manual_seed(2)
    head = VideoPandaDistillationHead(32, 16, num_layers=2)
    attach_distillation_head(model, head)
    if checkpointing:
        checkpoint_activations(model)
        model.train()
        model.model.vision_tower.eval()
    vision = model.config.vision_config
    teacher = VideoPandaTeacher(tiny_teacher("clip", 8, 2), vision, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return model, teacher


GRIDS = [(4, 8, 8), (4, 4, 8), (1, 8, 8), (8, 8, 4), None, (4, 8, 8), (4, 8, 6), (4, 4, 4)]


def make_examples(grids=GRIDS) -> list[dict]:
    """Each a video (or none) of noise, a question and an answer, of various lengths."""
    examples = []
    for number, grid in enumerate(grids):
        generator = torch.Generator().manual_seed(number)
        answer = torch.randint(5, 99, (2 + number % 3,), generator=generator).tolist()
        prompt = [0, *(placeholders(*grid) if grid else []), 6, 7]
        example = {
            "input_ids": torch.tensor([*prompt, *answer, 1]),
            "labels": torch.tensor([-100] * len(prompt) + [*answer, 1]),
        }
        if grid:
            patches = grid[0] * grid[1] * grid[2]
            example["pixel_values_videos"] = torch.randn(patches, PATCH_DIM, generator=generator)
            example["video_grid_thw"] = torch.tensor([grid])
        examples.append(example)
    return examples


def collate(examples: list[dict]) -> dict:
    ids = [example["input_ids"] for example in examples]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence([example["labels"] for example in examples], batch_first=True, padding_value=-100),
    }
    for name in ("pixel_values_videos", "video_grid_thw"):
        parts = [example[name] for example in examples if name in example]
        if parts:
            batch[name] = torch.cat(parts)
    return batch


def make_trainer(folder, model=None, examples=None, trainer_class=VideoPandaTrainer, **arguments):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
    }
    arguments_class = (
        VideoPandaTrainingArguments if issubclass(trainer_class, VideoPandaTrainer) else TrainingArguments
    )
    args = arguments_class(str(folder), **{**defaults, **arguments})
    return trainer_class(
        tiny_model() if model is None else model,
        args,
        train_dataset=examples or make_examples(),
        eval_dataset=make_examples()[:2],
        data_collator=collate,
    )
