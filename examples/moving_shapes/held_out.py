"""Write held-out clips of moving shapes and questions about them: a task for `video-panda eval`.

    python examples/moving_shapes/held_out.py --output runs/held-out
    video-panda eval predict --task runs/held-out/clips/moving-shapes.jsonl --output runs/clips
    video-panda eval judge runs/clips --judge match
    video-panda eval report runs/clips

There are two folders, each with a mp4 file for every clip and all questions. `clips` has the clips. `shuffled` has the
frames that the model sees of them in random order, which hide what only their order shows. Directions are split by
axis: shuffled frames still show the axis but not which way, so chance is one in two. Also prints how often the best
constant answer is right.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data import DIRECTIONS, SAMPLED, Clip, ask, make_clips, mp4
from video_panda_hf.evaluation import ExactJudge, judge, load_task, predict, report


ROWS = {  # kind of question (for a direction, its axis) → row of the table, which is the type in the task
    "colour": "colour",
    "shape": "shape",
    "count": "how many",
    "left or right": "left or right",
    "up or down": "up or down",
    "pace": "getting faster or slower",
    "first": "what moves first, last",
    "last": "what moves first, last",
    "description": "description",
}
TIME_DEPENDENT = [ROWS[kind] for kind in ("left or right", "up or down", "pace", "first")]
COUNT = 600  # clips


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write clips and questions to")
    parser.add_argument("--clips", type=int, default=COUNT, help="number of held-out clips")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clips = list(make_clips(args.clips, args.seed, held_out=True))
    print(write_task(args.output / "clips", clips, args.seed))
    print(write_task(args.output / "shuffled", shuffled(clips, args.seed), args.seed))
    print_table({"best constant answer": constant_accuracy(clips, args.seed)})


def write_task(folder: Path, clips: Iterable[Clip], seed: int) -> Path:
    """Writes every clip as a mp4 file, and a file of all their questions, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = list(clips)
    rows = list(questions_about(clips, seed))
    for name, clip in zip(dict.fromkeys(row["video"] for row in rows), clips, strict=True):
        (folder / name).write_bytes(mp4(clip.frames))
    file = folder / "moving-shapes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def questions_about(clips: Iterable[Clip], seed: int) -> Iterator[dict]:
    """The rows of the task. Every clip gets all of its questions."""
    rng = np.random.default_rng(seed)
    for number, clip in enumerate(clips):
        for kind in clip.questions:
            question, answer = ask(kind, clip, rng)
            row = {"id": f"{number:04}-{kind}", "video": f"{number:04}.mp4", "question": question, "answer": answer}
            yield {**row, "type": row_of(kind, clip)}


def row_of(kind: str, clip: Clip) -> str:
    return ROWS[("left or right", "up or down")[DIRECTIONS[clip.direction][0]] if kind == "direction" else kind]


def shuffled(clips: list[Clip], seed: int) -> list[Clip]:
    """The 8 frames that the model would see of each clip, in random order."""
    rng = np.random.default_rng(seed)
    seen = [np.linspace(0, len(clip.frames) - 1, SAMPLED).astype(int) for clip in clips]
    return [
        replace(clip, frames=clip.frames[rng.permutation(numbers)]) for clip, numbers in zip(clips, seen, strict=True)
    ]


def accuracy(model, processor, clips: Iterable[Clip], seed: int) -> dict[str, float]:
    """Share of right answers in each row of the table: what the three steps of `video-panda eval` give."""
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        task = load_task(write_task(Path(folder) / "clips", clips, seed))
        predict(task, model, processor, run, max_new_tokens=24)
        judge(run, ExactJudge(whole=True))
        values = {figure.name: figure.value[0] for figure in report([run]).figures[0] if figure.value}
    names = {row: f"accuracy of {row}, all" for row in ROWS.values()}
    return {row: values[name] for row, name in names.items() if name in values}


def constant_accuracy(clips: Iterable[Clip], seed: int) -> dict[str, float]:
    """Accuracy of the best constant answer in each row."""
    answers = defaultdict(Counter)
    for row in questions_about(clips, seed):
        answers[row["type"]][row["answer"]] += 1
    return {row: max(answers[row].values()) / answers[row].total() for row in ROWS.values() if row in answers}


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """A Markdown table of shares, which have the same rows in each column, in per cent."""
    print("| answers right, % |", " | ".join(columns), "|")
    print("|---|" + "---:|" * len(columns))
    for row in next(iter(columns.values())):
        print(f"| {row} |", " | ".join(f"{100 * shares[row]:.1f}" for shares in columns.values()), "|")


if __name__ == "__main__":
    main()
