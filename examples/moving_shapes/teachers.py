"""Does a teacher that sees time help the questions about time? Small students without a teacher, with two kinds.

    python examples/moving_shapes/teachers.py --output runs/teachers --json examples/moving_shapes/teachers.json

The picture teacher is a CLIP vision transformer that has learned to name the colours and shapes in a frame. The video
teacher has the form of LanguageBind's tower, the same with attention over time, and has learned to name these and how
they move: the direction, faster or slower, the colour that moves first. All students start from one language model and
get the same clips and steps; a seed sets their weights, the order of the clips and the dropout.

A line for each finished student goes to `students.jsonl` in the output folder. To go on with a run that was stopped,
repeat the command. Much smaller than train.py: pictures of 32 pixels, no stages. About 45 minutes on one core.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from data import COLOURS, DIRECTIONS, PACES, SHAPES, Clip, make_clips
from held_out import ROWS, TIME_DEPENDENT
from quick import asked, share_right, tensors
from train import THINGS, Stage, arguments_of, new_tokenizer
from video_panda_hf import VideoPandaForConditionalGeneration, VideoPandaProcessor, VideoPandaVisionConfig
from video_panda_hf.evaluation.lines import LineWriter, read_lines
from video_panda_hf.training import (
    LanguageBindVideoTower,
    VideoPandaTeacher,
    VideoPandaTrainer,
    VideoPandaTrainingArguments,
)


TEACHERS = ["none", "picture", "video"]
IMAGE_SIZE, PATCH_SIZE, NUM_FRAMES = 32, 8, 4
VISION = {"hidden_size": 64, "num_attention_heads": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
VISION |= {"initializer_range": 0.08}
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
TOWER |= {"image_size": IMAGE_SIZE // 2, "patch_size": PATCH_SIZE // 2}
MOTIONS = [*DIRECTIONS, *PACES, *(f"{colour} first" for colour in COLOURS)]  # what the video teacher names besides
GROUPS = {  # row of the table → names, of which a teacher chooses one
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    ROWS["left or right"]: list(DIRECTIONS)[:2],
    ROWS["up or down"]: list(DIRECTIONS)[2:],
    ROWS["pace"]: list(PACES),
    ROWS["first"]: MOTIONS[-len(COLOURS) :],
}


@dataclass
class Scale:
    clips: int = 1200
    held_out: int = 300
    language_steps: int = 250
    teacher_steps: int = 1500
    student_steps: int = 2000


def main() -> None:
    compare(__doc__, Path("runs/teachers"), 3, run, table)


def compare(description: str, output: Path, seeds: int, run: Callable, table: Callable) -> None:
    """The command line of a comparison: `run` makes the result, `table` writes it. `output`, `seeds`: the defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--seeds", type=int, default=seeds)
    for name, value in vars(Scale()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    args = parser.parse_args()
    scale = Scale(**{name: getattr(args, name) for name in vars(Scale())})
    result = run(args.output, scale, range(args.seeds))
    print(table(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run(output: Path, scale: Scale, seeds) -> dict:
    """Trains what is not in the output folder yet. Returns all that is known of this scale."""
    training, held_out = prepared(output, scale)
    for name in TEACHERS[1:]:
        if not (output / name / "right.json").exists():
            train_teacher(output / name, name, training, held_out, scale.teacher_steps)

    students = lines_of_runs(
        output / "students.jsonl",
        "teacher",
        TEACHERS,
        seeds,
        lambda name, seed: train_student(output, name, training, held_out, seed, scale),
    )
    teachers = {name: json.loads((output / name / "right.json").read_text()) for name in TEACHERS[1:]}
    return {"scale": vars(scale), "teachers": teachers, "students": students}


def lines_of_runs(file: Path, key: str, kinds: list, seeds, train: Callable[[Any, int], dict]) -> list[dict]:
    """A line for each kind and seed, which stands under `key` and `seed`. Trains those that the file does not have."""
    with LineWriter(file) as writer:
        done = {(line[key], line["seed"]) for line in read_lines(file)}
        for seed in seeds:
            for kind in kinds:
                if (kind, seed) not in done:
                    writer.write({key: kind, "seed": seed, **train(kind, seed)})
    return read_lines(file)


def prepared(output: Path, scale: Scale) -> tuple[list[dict], list[dict]]:
    """The language model in the output folder, trained if it is not there yet. Returns training and held-out examples.
    Raises `ValueError` if the folder has runs of another scale."""
    output.mkdir(parents=True, exist_ok=True)
    settings = output / "scale.json"
    if settings.exists() and json.loads(settings.read_text()) != vars(scale):
        raise ValueError(f"{output} has runs of another scale, {settings.read_text()}: take another folder.")
    settings.write_text(json.dumps(vars(scale)))
    tokenizer = new_tokenizer()
    processor = VideoPandaProcessor.from_text_pretrained(tokenizer, IMAGE_SIZE, PATCH_SIZE)
    training = asked(processor, make_clips(scale.clips, 0, False, NUM_FRAMES), with_story=True)
    held_out = asked(processor, make_clips(scale.held_out, 0, True, NUM_FRAMES))
    if not (output / "language" / "model.safetensors").exists():
        train_language(output / "language", tokenizer, [example["text"] for example in training], scale.language_steps)
    return training, held_out


def settings_of(steps: int, batch_size: int, folder: Path, seed: int) -> dict:
    options = arguments_of(Stage(steps, batch_size, []), folder, seed)
    return {**options, "learning_rate": 2e-3, "bf16": False, "save_strategy": "no", "disable_tqdm": True}


def train_language(folder: Path, tokenizer, texts: list[dict], steps: int) -> None:
    """A small Llama that answers questions about a description."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    arguments = TrainingArguments(**settings_of(steps, 32, folder, 0))
    trainer = Trainer(
        LlamaForCausalLM(config), arguments, train_dataset=texts, data_collator=tensors, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()


# Teachers


class Namer(nn.Module):
    """A teacher with a head that names what the mean of its features shows; they are what a student learns."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, config = kind, CLIPVisionConfig(**TOWER, attn_implementation="sdpa")
        if kind == "picture":
            self.tower = CLIPVisionModel(config)
        else:
            self.tower = LanguageBindVideoTower(config, NUM_FRAMES)
            for embedding in (self.tower.embeddings.class_embedding, self.tower.embeddings.position_embedding.weight):
                nn.init.normal_(embedding, std=0.02)
            for layer in self.tower.layers:
                nn.init.normal_(layer.temporal_embedding, std=0.02)
        self.head = nn.Linear(config.hidden_size, len(self.names))

    @property
    def names(self) -> list[str]:
        return THINGS if self.kind == "picture" else [*THINGS, *MOTIONS]

    def forward(self, frames: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """`frames` (videos · frames, channels, side, side), `labels` (videos, names)."""
        if self.kind == "picture":
            features = self.tower(frames, output_hidden_states=True).hidden_states[-2][:, 1:]
            labels = labels.repeat_interleave(len(frames) // len(labels), dim=0)
        else:
            features = self.tower.features(frames)  # windows of a video's length
            features = features.unflatten(0, (len(labels), -1)).flatten(1, 2)
        logits, losses = self.head(features.mean(1)), []
        for names in GROUPS.values():
            places = [self.names.index(name) for name in names if name in self.names]
            if places and (is_asked := labels[:, places].sum(1) == 1).any():
                chosen = labels[is_asked][:, places].argmax(1)
                losses.append(nn.functional.cross_entropy(logits[is_asked][:, places], chosen))
        return {"loss": torch.stack(losses).mean(), "logits": logits}

    def save(self, folder: Path) -> None:
        """In the layout of CLIP's or LanguageBind's repository."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.kind == "picture":
            self.tower.save_pretrained(folder)
            CLIPImageProcessor().save_pretrained(folder)
            return
        weights = {
            f"vision_model.{'encoder.' if name.startswith('layers.') else ''}{name}": value.contiguous()
            for name, value in self.tower.state_dict().items()
        }
        save_file(weights, folder / "model.safetensors")
        config = {"vision_config": {**TOWER, "add_time_attn": True, "num_frames": NUM_FRAMES}}
        (folder / "config.json").write_text(json.dumps(config))


def labels_of(clip: Clip, names: list[str]) -> np.ndarray:
    shown = {name for thing in clip.things for name in thing} | {clip.direction, clip.pace}
    if clip.kind == "order":
        shown.add(f"{clip.things[0][0]} first")
    return np.array([name in shown for name in names], dtype=np.float32)


def train_teacher(folder: Path, kind: str, training: list[dict], held_out: list[dict], steps: int) -> None:
    """Saves the teacher, and how often it is right about each of its names on held-out clips."""
    set_seed(0)
    namer = Namer(kind)
    view = VideoPandaTeacher(
        LanguageBindVideoTower(CLIPVisionConfig(**TOWER, attn_implementation="sdpa"), NUM_FRAMES),
        VideoPandaVisionConfig(**VISION),
        OPENAI_CLIP_MEAN,
        OPENAI_CLIP_STD,
    )

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = tensors(examples)
        return {
            "frames": view.frames(batch["pixel_values_videos"], batch["video_grid_thw"]),
            "labels": torch.from_numpy(np.stack([example["names"] for example in examples])),
        }

    def with_names(examples) -> list[dict]:
        return [{**example, "names": labels_of(example["clip"], namer.names)} for example in examples]

    arguments = TrainingArguments(**settings_of(steps, 32, folder, 0))
    Trainer(namer, arguments, train_dataset=with_names(training), data_collator=collate).train()
    namer.eval()
    with torch.no_grad():
        batch = collate(with_names(held_out))
        logits = namer(**batch)["logits"].unflatten(0, (len(held_out), -1)).mean(1)  # of a video's frames
    right = {}
    for row, names, is_asked in questions_of(namer.names, [example["clip"] for example in held_out]):
        places = [namer.names.index(name) for name in names]
        chosen, expected = (values[is_asked][:, places].argmax(1) for values in (logits, batch["labels"]))
        right[row] = float((chosen == expected).float().mean())
    namer.save(folder)
    (folder / "right.json").write_text(json.dumps(right))


def questions_of(known: list[str], clips: list[Clip]):
    """Rows of the table, the names to choose from, and the clips where exactly one is right."""
    for row, names in GROUPS.items():
        if set(names) <= set(known):
            yield row, names, torch.tensor([labels_of(clip, names).sum() == 1 for clip in clips])


# Students


def train_student(output: Path, teacher: str, training, held_out, seed: int, scale: Scale) -> dict:
    """The shares of right answers about held-out clips, and the processor's seconds of the training."""
    distillation = {} if teacher == "none" else {"distillation_teacher": str(output / teacher)}
    model, seconds = trained_student(output, training, seed, scale, VideoPandaTrainer, **distillation)
    return {"seconds": seconds, "right": share_right(model, held_out)}


def trained_student(output: Path, training, seed: int, scale: Scale, trainer_class, **options) -> tuple[Any, float]:
    """A model around the language model, trained, and the training's processor seconds. `options`: its arguments."""
    set_seed(seed)
    model = VideoPandaForConditionalGeneration.from_text_pretrained(
        str(output / "language"), VideoPandaVisionConfig(**VISION), dtype="float32"
    )
    arguments = VideoPandaTrainingArguments(
        **settings_of(scale.student_steps, 32, output / "trainer", seed), **options
    )
    trainer = trainer_class(model, arguments, train_dataset=training, data_collator=tensors)
    start = time.process_time()
    trainer.train()
    return model, round(time.process_time() - start, 1)


def table(result: dict) -> str:
    """Mean of the seeds, and the least and greatest of them, in per cent."""
    groups = {name: [line["right"] for line in result["students"] if line["teacher"] == name] for name in TEACHERS}
    known = [row for row in dict.fromkeys(ROWS.values()) if row in groups[TEACHERS[0]][0]]
    columns = {row: [row] for row in known} | {"mean of those about time": about_time(known)}
    lines = ["| answers right, % | " + " | ".join(f"teacher: {name}" for name in groups) + " |"]
    lines.append("|---|" + "---:|" * len(groups))
    for heading, rows in columns.items():
        cells = []
        for runs in groups.values():
            shares = [100 * np.mean([run[row] for row in rows]) for run in runs]
            cells.append(f"{np.mean(shares):.1f} ({min(shares):.1f} to {max(shares):.1f})")
        lines.append(f"| {heading} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def about_time(rows) -> list[str]:
    return [row for row in rows if row in TIME_DEPENDENT]


if __name__ == "__main__":
    main()
