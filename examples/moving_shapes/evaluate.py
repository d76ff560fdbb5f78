"""Evaluate a small model, such as the shipped one, on held-out clips of moving shapes.

    python examples/moving_shapes/evaluate.py [--model DIR_OR_ID]

Every clip is written as an mp4 file and read back. An answer is right if the greedily generated text equals the
expected one. Prints a Markdown table in per cent with a row for each kind of question. Its columns are: the clips; the
same frames shuffled, which hide what only their order shows; the best constant answer. Directions are split by axis:
shuffled frames still show the axis but not which way, so chance is one in two. Takes some minutes on two CPU cores.
"""

import argparse
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import video_panda_hf  # noqa: F401  registers the classes that the two lines above load
from data import DIRECTIONS, SAMPLED, Clip, ask, make_clips, mp4


ROWS = {  # kind of question (for a direction, its axis) → row of the table
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
BATCH_SIZE = 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="src/video_panda_hf/assets/moving-shapes")
    parser.add_argument("--clips", type=int, default=600, help="number of held-out clips")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    evaluate(args.model, args.clips, args.seed)


def evaluate(name_or_path, count: int = 600, seed: int = 0, controls: bool = True) -> None:
    """Prints the table. `controls` adds the columns to compare the first one with."""
    processor = AutoProcessor.from_pretrained(name_or_path)
    model = AutoModelForImageTextToText.from_pretrained(name_or_path).eval()
    clips = list(make_clips(count, seed, held_out=True))
    columns = {f"{count} held-out clips": accuracy(model, processor, clips, seed)}
    if controls:
        columns["frames shuffled"] = accuracy(model, processor, shuffled(clips, seed), seed)
        columns["best constant answer"] = constant_accuracy(clips, seed)
    print("| answers right, % |", " | ".join(columns), "|")
    print("|---|" + "---:|" * len(columns))
    asked = next(iter(columns.values()))
    for row in sorted(asked, key=list(ROWS.values()).index):
        print(f"| {row} |", " | ".join(f"{100 * shares[row]:.1f}" for shares in columns.values()), "|")


def accuracy(model, processor, clips: list[Clip], seed: int) -> dict[str, float]:
    """Share of right answers in each row of the table. Every clip gets all of its questions."""
    right = defaultdict(list)
    files = [mp4(clip.frames) for clip in clips]
    asked = questions_about(clips, seed)
    for start in tqdm(range(0, len(asked), BATCH_SIZE), "batches of questions"):
        numbers, rows, questions, answers = zip(*asked[start : start + BATCH_SIZE], strict=True)
        given = generate_answers(model, processor, [files[number] for number in numbers], list(questions))
        for row, answer, expected in zip(rows, given, answers, strict=True):
            right[row].append(answer == expected)
    return {row: float(np.mean(of_row)) for row, of_row in right.items()}


def questions_about(clips: list[Clip], seed: int) -> list[tuple[int, str, str, str]]:
    """All questions: the clip's number, the row of the table, the question and its answer."""
    rng = np.random.default_rng(seed)
    return [
        (number, row_of(kind, clip), *ask(kind, clip, rng))
        for number, clip in enumerate(clips)
        for kind in clip.questions
    ]


def row_of(kind: str, clip: Clip) -> str:
    return ROWS[("left or right", "up or down")[DIRECTIONS[clip.direction][0]] if kind == "direction" else kind]


@torch.no_grad()
def generate_answers(model, processor, videos: list, questions: list[str]) -> list[str]:
    """One greedy answer for each video and its question."""
    conversations = [
        [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": question}]}]
        for video, question in zip(videos, questions, strict=True)
    ]
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def shuffled(clips: list[Clip], seed: int) -> list[Clip]:
    """The 8 frames that the model would see of each clip, in random order."""
    rng = np.random.default_rng(seed)
    seen = [np.linspace(0, len(clip.frames) - 1, SAMPLED).astype(int) for clip in clips]
    return [
        replace(clip, frames=clip.frames[rng.permutation(numbers)]) for clip, numbers in zip(clips, seen, strict=True)
    ]


def constant_accuracy(clips: list[Clip], seed: int) -> dict[str, float]:
    """Accuracy of the best constant answer in each row."""
    answers = defaultdict(Counter)
    for _, row, _, answer in questions_about(clips, seed):
        answers[row][answer] += 1
    return {row: max(counts.values()) / counts.total() for row, counts in answers.items()}


if __name__ == "__main__":
    main()
