"""Check the maps of `video_panda_hf.explain` on held-out clips of moving shapes, whose places are known.

    python examples/moving_shapes/check_maps.py [--model DIR_OR_ID]

Prints three Markdown tables.

1. Where the maps lie: how often the brightest cell of a frame has its middle in the box of a shape, and how much of a
   map lies in the boxes, for each map, for one that is the same everywhere, and for the contrast of the pixels.
2. What the answers depend on: windows of the video are painted over with its median colour, the highest of a map
   first (deletion), or painted over all at once and brought back, the highest first (insertion). The figures are areas
   under the probability of the answer, the geometric mean of its tokens, from 0 to 1: a good map has a small one of
   deletion and a large one of insertion.
3. Answers right with a part of the context tokens taken out at inference.

The first two are about the model's own answers. Takes some minutes on one CPU core.
"""

import argparse
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from data import SAMPLED, make_clips
from held_out import accuracy, print_table, questions_about
from video_panda_hf.explain import METHODS, PARTS, explain, without


LEVELS = 6  # of deletion and insertion: 0, 20, …, 100 %
NAMES = {
    "uniform": "the same everywhere",
    "contrast": "contrast of the pixels",
    "fsra": "FSRA",
    "attention": "answer, by attention",
    "gradient": "answer, by gradient × input",
    "uniform patches": "the same everywhere, by patches",
    "contrast patches": "contrast of the pixels, by patches",
    "gstra": "GSTRA, by patches",
    "random": "random order",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="src/video_panda_hf/assets/moving-shapes")
    parser.add_argument("--clips", type=int, default=70, help="held-out clips for the first two tables")
    parser.add_argument("--asked", type=int, default=600, help="held-out clips for the third table; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()

    places, areas = check(model, processor, list(make_clips(args.clips, args.seed, held_out=True)), args.seed)
    print("| map | maximum of a frame in a box, % | share in the boxes, % |\n|---|---:|---:|")
    for name in NAMES:
        if name in places:
            hit, mass = np.mean(places[name], 0)
            print(f"| {NAMES[name]} | {100 * hit:.1f} | {100 * mass:.1f} |")
    print("\n| order of the windows | deletion | insertion |\n|---|---:|---:|")
    for name in NAMES:
        if name in areas:
            deletion, insertion = np.mean(areas[name], 0)
            print(f"| {NAMES[name]} | {deletion:.3f} | {insertion:.3f} |")
    if args.asked:
        clips = list(make_clips(args.asked, args.seed, held_out=True))
        print()
        print_ablation(model, processor, clips, args.seed)


def check(model, processor, clips: list, seed: int) -> tuple[dict, dict]:
    """For each map the pairs (share of frames whose maximum is in a box, share of the map in the boxes), one for each
    clip and one of its questions; for each order of windows the areas (deletion, insertion)."""
    rng = np.random.default_rng(seed)
    places, areas = defaultdict(list), defaultdict(list)
    by_clip = defaultdict(list)
    for row in questions_about(clips, seed):
        by_clip[row["video"]].append(row["question"])
    asked = [str(rng.choice(questions)) for questions in by_clip.values()]
    for clip, question in zip(clips, tqdm(asked, "questions", mininterval=5), strict=True):
        seen = np.linspace(0, len(clip.frames) - 1, SAMPLED).astype(int)
        frames, boxes = clip.frames[seen], clip.boxes[:, seen]
        found = {method: explain(model, processor, frames, question, method=method) for method in METHODS}
        any_found = found[METHODS[0]]
        maps = {name: (explanation.map("answer")).numpy() for name, explanation in found.items()}
        maps |= {name: getattr(any_found, name).numpy() for name in ("fsra", "gstra")}
        for name, like in (("", maps["fsra"]), (" patches", maps["gstra"])):
            maps["uniform" + name] = np.ones(like.shape)
            maps["contrast" + name] = contrast(frames, like.shape)
        for name, values in maps.items():
            places[name].append(in_boxes(values, boxes, frames.shape[1:3]))

        orders = {name: maps[name] for name in ("contrast", "fsra", *METHODS)}
        orders["random"] = rng.random(maps["fsra"].shape)
        for name, area in areas_of(model, processor, frames, question, any_found, orders).items():
            areas[name].append(area)
    return places, areas


def contrast(frames: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """The standard deviation of the pixels of each cell of a grid (T, rows, columns); the sum of a frame is 1."""
    cells = [
        [
            [cell.std((0, 1)).mean() for cell in np.array_split(row, grid[2], 1)]
            for row in np.array_split(frame, grid[1])
        ]
        for frame in frames.astype(float)
    ]
    return np.array(cells) / np.sum(cells, (1, 2), keepdims=True)


def in_boxes(values: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> tuple[float, float]:
    """
    Args:
        values (`np.ndarray` of shape `(T, rows, columns)`):
            A map. Where all is the same, every cell counts as the maximum in its share.
        boxes (`np.ndarray` of shape `(things, T, 4)`):
            Left, top, right and bottom in pixels.
        size (`tuple[int, int]`):
            Height and width of the frames in pixels.

    Returns:
        The share of frames whose maximum has its middle in a box, and the share of the map in the boxes.
    """
    _, rows, columns = values.shape
    top, left = np.arange(rows) * size[0] / rows, np.arange(columns) * size[1] / columns
    bottom, right = top + size[0] / rows, left + size[1] / columns
    inside, middle = np.zeros(values.shape), np.zeros(values.shape, dtype=bool)
    for x0, y0, x1, y1 in np.moveaxis(boxes, 2, 0)[..., None].transpose(1, 0, 2, 3):  # each (T, 1)
        high = (np.minimum(bottom, y1) - np.maximum(top, y0)).clip(0) / (bottom - top)  # (T, rows)
        wide = (np.minimum(right, x1) - np.maximum(left, x0)).clip(0) / (right - left)  # (T, columns)
        inside += high[:, :, None] * wide[:, None]
        y, x = (top + bottom) / 2, (left + right) / 2
        middle |= ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None]
    is_maximum = values == values.max((1, 2), keepdims=True)
    hits = (is_maximum & middle).sum((1, 2)) / is_maximum.sum((1, 2))
    return float(hits.mean()), float((values * inside.clip(0, 1)).sum() / values.sum())


@torch.no_grad()
def areas_of(model, processor, frames, question, explanation, orders: dict) -> dict[str, tuple[float, float]]:
    """The areas under the probability of the answer, for deletion and insertion in the order of each map."""
    content = [{"type": "video", "video": frames}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_sample_frames": False},
    )
    answer = processor.tokenizer("".join(explanation.tokens), add_special_tokens=False, return_tensors="pt").input_ids
    grid = inputs["video_grid_thw"]
    t, h, w = grid[0].tolist()
    pixels = inputs["pixel_values_videos"].view(t, h // 2, 2, w // 2, 2, 3, -1)
    painted = pixels.movedim(5, 0).flatten(1).median(1).values[:, None].expand_as(pixels)
    variants = []
    for values in orders.values():
        rank = torch.from_numpy((-values).ravel().argsort().argsort()).view(t, h // 2, 1, w // 2, 1, 1, 1)
        for level in np.linspace(0, rank.numel(), LEVELS).round():
            first = rank < level
            variants += [torch.where(first, painted, pixels), torch.where(first, pixels, painted)]
    ids = torch.cat([inputs["input_ids"], answer], 1).expand(len(variants), -1)
    output = model(
        input_ids=ids[:, :-1],
        pixel_values_videos=torch.cat([variant.reshape(t * h * w, -1) for variant in variants]),
        video_grid_thw=grid.expand(len(variants), -1),
        logits_to_keep=answer.shape[1],
    )
    chosen = output.logits.log_softmax(-1).gather(2, answer.expand(len(variants), -1)[..., None])[..., 0]
    curves = chosen.mean(1).exp().view(len(orders), LEVELS, 2)
    areas = torch.trapezoid(curves, dim=1) / (LEVELS - 1)
    return {name: tuple(area.tolist()) for name, area in zip(orders, areas, strict=True)}


def print_ablation(model, processor, clips: list, seed: int) -> None:
    columns = {"whole model": accuracy(model, processor, clips, seed)}
    for part in PARTS:
        with without(model, part):
            columns[f"without {part if part == 'both' else part.upper()}"] = accuracy(model, processor, clips, seed)
    print_table(columns)


if __name__ == "__main__":
    main()
