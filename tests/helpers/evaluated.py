"""A trainer of the shipped model, rows about its clips to evaluate it with, and what an evaluation of them gives.

`torchrun … evaluated.py FOLDER` does it on several processes, and writes what each got to FOLDER.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


sys.path.insert(0, str(Path(__file__).parents[1]))

from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.training import VideoPandaDataCollator, VideoPandaTrainer, VideoPandaTrainingArguments


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def turn(role: str, *content) -> dict:
    return {"role": role, "content": list(content)}


def eval_rows() -> list[dict]:
    """Videos, pictures, text alone, several turns; the broken ones are the second, and a batch of two as a whole."""
    clips = [
        {"type": "video", "video": str(SHIPPED_CLIPS / f"{name}.mp4")}
        for name in ("red_circle_left", "green_square_right")
    ]
    picture = {"type": "image", "image": Image.new("RGB", (64, 48), "red")}
    broken = [
        turn("user", {"type": "video", "video": "no such file.mp4"}, text("What?")),
        turn("assistant", text("Nothing.")),
    ]
    colour = turn("user", clips[0], text("What colour is the shape?"))
    conversations = [
        [colour, turn("assistant", text("Red."))],
        broken,
        [turn("user", text("Hello?")), turn("assistant", text("Hello, who is there?"))],
        [turn("user", picture, text("What is it?")), turn("assistant", text("A picture."))],
        broken,
        broken,
        [
            colour,
            turn("assistant", text("Red.")),
            turn("user", clips[1], text("And now?")),
            turn("assistant", text("Green.")),
            turn("user", clips[0], text("Thanks.")),
        ],
    ]
    return [{"id": str(number), "messages": messages} for number, messages in enumerate(conversations)]


def make_evaluated(folder: Path, rows=None, compute_metrics=None, **arguments):
    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL, dtype="float32")
    defaults = {"per_device_eval_batch_size": 2, "generation_max_length": 12, "max_steps": 1, "save_strategy": "no"}
    args = VideoPandaTrainingArguments(
        str(folder), **{**defaults, "report_to": "none", "use_cpu": True, "disable_tqdm": True, **arguments}
    )
    rows = eval_rows() if rows is None else rows
    return VideoPandaTrainer(
        model,
        args,
        train_dataset=rows[:1],
        eval_dataset=rows,
        processing_class=processor,
        data_collator=VideoPandaDataCollator(processor, on_error="skip"),
        compute_metrics=compute_metrics,
    )


def decoded(trainer, ids: np.ndarray) -> list[str]:
    tokenizer = trainer.processing_class.tokenizer
    return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)


def main(folder: Path) -> None:
    generating = make_evaluated(folder / "generating", predict_with_generate=True)
    found = generating.predict(generating.eval_dataset)
    task = str(folder / "shapes.jsonl")
    evaluated = make_evaluated(folder / "likely", eval_task=task, eval_task_videos=str(SHIPPED_CLIPS))
    likely = evaluated.predict(generating.eval_dataset)
    saved = {
        "predictions": decoded(generating, found.predictions),
        "labels": decoded(generating, found.label_ids),
        "likely": [row[row >= 0].tolist() for row in likely.predictions],
        "figures": {name: value for name, value in evaluated.evaluate().items() if "shapes" in name},
    }
    (folder / f"{generating.args.process_index}.json").write_text(json.dumps(saved))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
