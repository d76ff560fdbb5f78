"""Ask the small model that ships about clips whose combination of colour, shape and direction it never saw.

    python examples/evaluate_moving_shapes.py [--model DIR_OR_ID]

Every clip is written as an mp4 file and read back. An answer is right if the greedily generated text is the right
one to the letter. Prints a markdown table in per cent; the direction is reported by line of motion, for frames
out of order still show the line but not its sense, so that chance is one in two. Takes a few minutes on two CPU cores.
"""

import argparse
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import video_panda_hf  # noqa: F401  registers the classes that the two lines above load
from moving_shapes import DIRECTIONS, FRAMES, QUESTIONS, Clip, ask, make_clips, mp4


COLUMNS = ["colour", "shape", "left or right", "up or down", "description"]
BATCH_SIZE = 32


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="src/video_panda_hf/assets/moving-shapes")
    parser.add_argument("--clips", type=int, default=600, help="number of held-out clips")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
    clips = list(make_clips(args.clips, args.seed, held_out=True))
    rows = {
        f"{args.clips} held-out clips": accuracy(model, processor, clips, args.seed),
        "the same, frames shuffled": accuracy(model, processor, shuffled(clips, args.seed), args.seed),
        "best constant answer": constant_accuracy(clips),
    }
    print("| answers right, % |", " | ".join(COLUMNS), "|")
    print("|---|" + "---:|" * len(COLUMNS))
    for name, row in rows.items():
        print(f"| {name} |", " | ".join(f"{100 * row[column]:.1f}" for column in COLUMNS), "|")


def accuracy(model, processor, clips: list[Clip], seed: int) -> dict[str, float]:
    """Share of right answers in each column of the table."""
    rng = np.random.default_rng(seed)
    right = {column: [] for column in COLUMNS}
    for start in tqdm(range(0, len(clips), BATCH_SIZE), "batches of clips"):
        batch = clips[start : start + BATCH_SIZE]
        videos = [mp4(clip.frames) for clip in batch]
        for kind in QUESTIONS:
            answers = generate_answers(model, processor, videos, [ask(kind, clip, rng) for clip in batch])
            for clip, answer in zip(batch, answers, strict=True):
                right[column_of(kind, clip)].append(answer == clip.answers[kind])
    return {column: np.mean(of_column) for column, of_column in right.items()}


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
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def shuffled(clips: list[Clip], seed: int) -> list[Clip]:
    """The 8 frames that the model would see of each clip, in random order."""
    rng = np.random.default_rng(seed)
    seen = np.arange(0, FRAMES, 3)
    return [replace(clip, frames=clip.frames[rng.permutation(seen)]) for clip in clips]


def constant_accuracy(clips: list[Clip]) -> dict[str, float]:
    """What the best answer that never looks at the clip would reach in each column."""
    answers = {column: Counter() for column in COLUMNS}
    for clip in clips:
        for kind, answer in clip.answers.items():
            answers[column_of(kind, clip)][answer] += 1
    return {column: max(counts.values()) / counts.total() for column, counts in answers.items()}


def column_of(kind: str, clip: Clip) -> str:
    return COLUMNS[2 + DIRECTIONS[clip.direction][0]] if kind == "direction" else kind


if __name__ == "__main__":
    main()
