"""Does row dropout pay? Small models on moving shapes, trained with and without it, asked with all rows, half, none.

    python examples/fewer_tokens/moving_shapes.py --output runs/fewer-tokens

The scale is that of examples/moving_shapes/teachers.py, with the same clips and the same language model to start from:
pictures of 32 pixels, two rows of two tokens a frame. Each trained model is a line of `models.jsonl` in the output
folder; to go on with a run that was stopped, repeat the command. The times are the processor's, of a prompt's forward
pass with STAB, as a share of the one with all rows in the same run.
"""

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rows import ROWS, RowDropoutTrainer, fewer_rows

from video_panda_hf.training import VideoPandaTrainer


sys.path.append(str(Path(__file__).resolve().parent.parent / "moving_shapes"))
from quick import share_right, tensors
from teachers import Scale, about_time, compare, lines_of_runs, prepared, trained_student


REPEATS = 15


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
    return {"scale": vars(scale), "models": models}


def trained(output: Path, dropout: bool, training: list[dict], held_out: list[dict], seed: int, scale: Scale) -> dict:
    """Shares of right answers about held-out clips, tokens of a prompt and seconds, for each number of rows."""
    trainer_class = RowDropoutTrainer if dropout else VideoPandaTrainer
    model, seconds = trained_student(output, training, seed, scale, trainer_class)
    found = {"seconds": seconds, "rows": {}}
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
