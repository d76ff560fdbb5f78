"""Does row dropout pay? Small models on moving shapes, trained with and without it, asked with all rows, half, none.

    python examples/fewer_tokens/moving_shapes.py --output runs/fewer-tokens

The scale is that of examples/moving_shapes/teachers.py, with the same clips and the same language model to start from:
pictures of 32 pixels, two rows of two tokens a frame. Each trained model is a line of `models.jsonl` in the output
folder; to go on with a run that was stopped, repeat the command.

What rows cost is measured at the released size of a frame: 8 frames of 448 pixels, STAB as released, a language model
of SmolLM2-135M's sizes, all with random weights. The times are the processor's, of the forward pass with STAB.
"""

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rows import ROWS, RowDropoutTrainer, fewer_rows
from transformers import LlamaConfig

from video_panda_hf import (
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaProcessor,
    VideoPandaVisionConfig,
)
from video_panda_hf.training import VideoPandaTrainer


sys.path.append(str(Path(__file__).resolve().parent.parent / "moving_shapes"))
from quick import share_right
from teachers import Scale, about_time, compare, lines_of_runs, prepared, trained_student
from train import new_tokenizer


REPEATS = 3
LANGUAGE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
LANGUAGE |= {"num_key_value_heads": 3, "tie_word_embeddings": True}


def main() -> None:
    compare(__doc__, Path("runs/fewer-tokens"), 1, run, table)


def run(output: Path, scale: Scale, seeds) -> dict:
    training, held_out = prepared(output, scale)
    models = lines_of_runs(
        output / "models.jsonl",
        "row_dropout",
        [False, True],
        seeds,
        lambda dropout, seed: trained(output, dropout, training, held_out, seed, scale),
    )
    return {"scale": vars(scale), "models": models, "costs": costs(LANGUAGE, {}, 448)}


def trained(output: Path, dropout: bool, training: list[dict], held_out: list[dict], seed: int, scale: Scale) -> dict:
    """The processor's seconds of the training, and the shares of right answers about held-out clips by rows."""
    trainer_class = RowDropoutTrainer if dropout else VideoPandaTrainer
    model, seconds = trained_student(output, training, seed, scale, trainer_class)
    right = {rows: share_right(model, held_out, partial(fewer_rows, model, rows=rows)) for rows in ROWS}
    return {"seconds": seconds, "right": right}


@torch.no_grad()
def costs(language: dict, vision: dict, side: int) -> dict[str, dict]:
    """By rows: the tokens of a prompt about 8 square frames, and the least of the processor's seconds for it."""
    tokenizer = new_tokenizer()
    tokenizer.model_max_length = 4096
    processor = VideoPandaProcessor.from_text_pretrained(tokenizer, side, vision.get("patch_size", 14))
    text = LlamaConfig(vocab_size=len(processor.tokenizer), pad_token_id=tokenizer.pad_token_id, **language)
    config = VideoPandaConfig(
        text_config=text,
        vision_config=VideoPandaVisionConfig(image_size=side, **vision),
        video_token_id=processor.video_token_id,
        row_token_id=processor.row_token_id,
    )
    model = VideoPandaForConditionalGeneration(config).eval()
    frames = np.random.default_rng(0).integers(0, 256, (8, side, side, 3), dtype=np.uint8)
    prompt = dict(processor(text="<video>What is this?", videos=[frames], return_tensors="pt"))
    found = {}
    for rows in ROWS:
        seconds = []
        for _ in range(REPEATS):
            start = time.process_time()
            inputs = fewer_rows(model, prompt, rows)
            model(**inputs, logits_to_keep=1)
            seconds.append(time.process_time() - start)
        found[rows] = {"tokens": int(inputs["attention_mask"].sum()), "seconds": min(seconds)}
    return found


def table(result: dict) -> str:
    """Per cent right, mean of the seeds, by rows: about time, and about looks (colours and shapes)."""
    columns = {"without": False, "with": True}
    headings = [f"{kind}, {name} row dropout" for name in columns for kind in ("time", "looks")]
    lines = ["| rows | tokens | seconds | " + " | ".join(headings) + " |", "|---|" + "---:|" * (2 + len(headings))]
    for rows in ROWS[::-1]:
        cost = result["costs"][rows]
        cells = [rows, f"{cost['tokens']:,}", f"{cost['seconds'] / result['costs']['all']['seconds']:.2f} ×"]
        for dropout in columns.values():
            right = [model["right"][rows] for model in result["models"] if model["row_dropout"] == dropout]
            for names in (about_time(right[0]), ("colour", "shape")):
                cells.append(f"{100 * np.mean([[shares[name] for name in names] for shares in right]):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
