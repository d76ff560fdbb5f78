"""Does row dropout pay? Small models on moving shapes, trained with and without it, asked with all rows, half, none.

    python examples/fewer_tokens/moving_shapes.py --output runs/fewer-tokens

The scale is that of examples/moving_shapes/teachers.py, with the same clips and the same language model to start from:
pictures of 32 pixels, two rows of two tokens a frame. Each trained model is a line of `models.jsonl` in the output
folder; to go on with a run that was stopped, repeat the command. The times are the processor's, of a prompt's forward
pass with STAB, as a share of the one with all rows in the same run.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rows import ROWS, RowDropoutTrainer, fewer_rows
from transformers import set_seed

from video_panda_hf import VideoPandaForConditionalGeneration, VideoPandaVisionConfig
from video_panda_hf.evaluation.lines import LineWriter, read_lines
from video_panda_hf.training import VideoPandaTrainer, VideoPandaTrainingArguments


sys.path.append(str(Path(__file__).resolve().parent.parent / "moving_shapes"))
from quick import share_right, tensors
from teachers import VISION, Scale, about_time, prepared, settings_of


REPEATS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/fewer-tokens"))
    parser.add_argument("--seeds", type=int, default=1)
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
    training, held_out = prepared(output, scale)
    file = output / "models.jsonl"
    with LineWriter(file) as writer:
        done = {(line["row_dropout"], line["seed"]) for line in read_lines(file)}
        for seed in seeds:
            for dropout in (False, True):
                if (dropout, seed) not in done:
                    line = trained(output, dropout, training, held_out, seed, scale)
                    writer.write({"row_dropout": dropout, "seed": seed, **line})
    return {"scale": vars(scale), "models": read_lines(file)}


def trained(output: Path, dropout: bool, training: list[dict], held_out: list[dict], seed: int, scale: Scale) -> dict:
    """Shares of right answers about held-out clips, tokens of a prompt and seconds, for each number of rows."""
    set_seed(seed)
    model = VideoPandaForConditionalGeneration.from_text_pretrained(
        str(output / "language"), VideoPandaVisionConfig(**VISION), dtype="float32"
    )
    arguments = VideoPandaTrainingArguments(**settings_of(scale.student_steps, 32, output / "trainer", seed))
    trainer_class = RowDropoutTrainer if dropout else VideoPandaTrainer
    trainer = trainer_class(model, arguments, train_dataset=training, data_collator=tensors)
    start = time.process_time()
    trainer.train()
    found = {"seconds": round(time.process_time() - start, 1), "rows": {}}
    for rows in ROWS:
        right = share_right(model, held_out, partial(fewer_rows, model, rows=rows))
        found["rows"][rows] = {"right": right, **cost(model, held_out[:32], rows)}
    return found


@torch.no_grad()
def cost(model, examples: list[dict], rows: str) -> dict[str, float]:
    """Mean tokens of a prompt and its answer, and the median of the processor's seconds for the forward pass."""
    batch, seconds = tensors(examples), []
    batch.pop("labels")
    for _ in range(REPEATS):
        start = time.process_time()
        inputs = fewer_rows(model, batch, rows)
        model(**inputs, logits_to_keep=1)
        seconds.append(time.process_time() - start)
    return {
        "tokens": float(inputs["attention_mask"].sum() / len(examples)),
        "prefill_seconds": float(np.median(seconds)),
    }


def table(result: dict) -> str:
    lines = ["| rows | tokens | time | trained without | with row dropout |", "|---|---:|---:|---:|---:|"]
    models = {
        dropout: [m["rows"] for m in result["models"] if m["row_dropout"] == dropout] for dropout in (False, True)
    }
    for rows in ROWS[::-1]:
        of_rows = [model[rows] for found in models.values() for model in found]
        whole = np.mean([model["all"]["prefill_seconds"] for found in models.values() for model in found])
        share = np.mean([found["prefill_seconds"] for found in of_rows]) / whole
        cells = [rows, f"{np.mean([found['tokens'] for found in of_rows]):.0f}", f"{share:.2f} ×"]
        for found in models.values():
            right = [model[rows]["right"] for model in found]
            shares = [np.mean([shares[row] for row in about_time(shares)]) for shares in right]
            looks = [np.mean([shares[row] for row in ("colour", "shape")]) for shares in right]
            cells.append(f"{100 * np.mean(shares):.1f} about time, {100 * np.mean(looks):.1f} about looks")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
