"""TRL's `SFTTrainer` with columns of pictures and videos, and its `DPOTrainer` by `examples/dpo.py`."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.training import VideoPandaDataCollator, VideoPandaPreferenceCollator, load_preferences


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sft_trainer(folder, rows, kind, **settings):
    media = {"images": datasets.Image(), "videos": datasets.Value("string")}[kind]
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({kind: [media], "messages": [message]})
    collator = settings.pop("data_collator", None)
    defaults = {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1}
    defaults |= {"max_length": None, "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none"}
    return trl.SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL, dtype="float32"),
        trl.SFTConfig(str(folder), save_strategy="no", **{**defaults, **settings}),
        train_dataset=datasets.Dataset.from_list(rows, features=features),
        data_collator=collator,
        processing_class=AutoProcessor.from_pretrained(SHIPPED_MODEL),
    )


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_column_of_images_is_trained_on_as_with_our_collator(tmp_path):
    """By TRL's own collator. Batches have one picture, several, or none in a row."""
    pixels = np.random.default_rng(0).integers(0, 255, (3, 24, 32, 3), dtype=np.uint8)
    pictures = list(map(Image.fromarray, pixels))
    rows = [
        {"images": pictures[:1], "messages": turns("What is it?", "A red circle.")},
        {"images": pictures[1:], "messages": turns("Are they alike?", "No.")},
        {"images": [], "messages": turns("Hello?", "Hello.")},
    ]
    trainer = sft_trainer(tmp_path, rows, "images", assistant_only_loss=True)
    (batch,) = trainer.get_train_dataloader()
    plain = [
        {
            "images": row["images"],
            "messages": turns(
                "<image>" * len(row["images"]) + row["messages"][0]["content"], row["messages"][1]["content"]
            ),
        }
        for row in rows
    ]
    ours = VideoPandaDataCollator(trainer.processing_class)
    order = [
        next(i for i, row in enumerate(rows) if row["messages"][1]["content"] in answer)
        for answer in answers_of(trainer, batch)
    ]
    expected = ours([plain[number] for number in order])
    for name in ("input_ids", "attention_mask", "labels", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(batch[name], expected[name]), name
    losses = losses_of(trainer)
    assert losses[1] < losses[0]


def answers_of(trainer, batch):
    return [trainer.processing_class.decode(row[row != -100]) for row in batch["labels"]]


def test_a_column_of_videos_is_trained_on_with_our_collator(tmp_path):
    clips = [str(SHIPPED_CLIPS / f"{name}.mp4") for name in ("red_circle_left", "blue_cross_upwards")]
    rows = [
        {"videos": clips[:1], "messages": turns("<video>Who is this?", "This is Ruby.")},
        {"videos": clips, "messages": turns("<video><video>Are they alike?", "No.")},
        {"videos": [], "messages": turns("Hello?", "Hello.")},
    ]
    collator = VideoPandaDataCollator(AutoProcessor.from_pretrained(SHIPPED_MODEL))
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer = sft_trainer(tmp_path, rows, "videos", data_collator=collator, **skip)
    (batch,) = trainer.get_train_dataloader()
    assert len(batch["video_grid_thw"]) == 3
    losses = losses_of(trainer)
    assert losses[1] < losses[0]


def test_the_example_teaches_which_answer_is_better(tmp_path):
    """Two videos, and the shorter answer, which the shipped model finds worse, is to be better."""
    pytest.importorskip("peft")
    rows = [
        {"video": f"{clip}.mp4", "prompt": "<video>Describe the video.", "chosen": short, "rejected": long}
        for clip, short, long in [
            ("red_circle_left", "A red circle moves.", "A red circle moves to the left."),
            ("blue_cross_upwards", "A blue cross moves.", "A blue cross moves upwards."),
        ]
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    options = f"--data {file} --videos {SHIPPED_CLIPS} --output {tmp_path / 'out'} --epochs 8 --learning-rate 3e-3"
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "dpo.py"))
    example["main"]([*options.split(), "--accumulate", "1", "--workers", "0", "--num-frames", "4"])
    assert (margins(SHIPPED_MODEL, file) < -3).all()
    assert (margins(tmp_path / "out", file) > 3).all()
    before, after = (
        AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (SHIPPED_MODEL, tmp_path / "out")
    )
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "language_model" in name and name.endswith("_proj.weight")
    }


@torch.no_grad()
def margins(checkpoint, file):
    """How much more likely than the worse answer the better one is, as a logarithm, for each pair."""
    rows = list(load_preferences(file, SHIPPED_CLIPS))
    batch = VideoPandaPreferenceCollator(AutoProcessor.from_pretrained(checkpoint), num_frames=4)(rows)
    mask = batch.pop("completion_mask")[:, 1:]
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32").eval()
    chances = model(**batch).logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    chosen, rejected = (chances * mask).sum(1).chunk(2)
    return chosen - rejected
