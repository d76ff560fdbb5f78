"""Videos of one moving shape and questions about it: the data of the small model that ships with the package.

A clip shows one shape of one colour that moves in one direction. Every sixth or so of the combinations of the three
is *held out*: no training clip shows it, so a right answer cannot be a remembered one. A clip played backwards
is a clip of the opposite direction with the same frames: what the frames show, out of order, never tells which
of the two it is.

Run as a command, it writes the three clips that the package ships:

    python examples/moving_shapes.py --output src/video_panda_hf/assets/clips
"""

import argparse
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np


COLOURS = {
    "red": (215, 35, 35),
    "orange": (245, 140, 25),
    "yellow": (240, 225, 45),
    "green": (40, 170, 60),
    "blue": (45, 85, 225),
    "purple": (150, 50, 190),
}
# Signed distances in units of the shape's radius, negative inside; x points right, y points down.
SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "triangle": lambda x, y: np.maximum(0.866 * abs(x) - 0.5 * y - 0.55, y - 0.8),
    "diamond": lambda x, y: (1.2 * abs(x) + 0.8 * abs(y) - 1) / 1.442,
    "cross": lambda x, y: np.minimum(np.maximum(abs(x), 3 * abs(y)), np.maximum(3 * abs(x), abs(y))) - 1,
}
DIRECTIONS = {"to the left": (0, -1), "to the right": (0, 1), "upwards": (1, -1), "downwards": (1, 1)}  # axis, sense
SIZES = [(112, 112), (84, 112), (112, 84), (72, 128), (128, 96)]  # height, width in pixels; even, as H.264 asks
FRAMES, FPS = 22, 8  # every third frame is sampled when 8 are asked for: 0, 3, …, 21

QUESTIONS = {
    "colour": [
        "What colour is the {thing}?",
        "What is the colour of the {thing}?",
        "What colour is it?",
        "Which colour does the {thing} have?",
        "Which colour is the {thing} in the video?",
    ],
    "shape": [
        "What shape is it?",
        "What shape is the {thing}?",
        "Which shape is shown?",
        "Which shape is moving?",
        "What is the shape of the {thing}?",
        "What shape do you see in the video?",
    ],
    "direction": [
        "Which way does the {thing} move?",
        "Which way is it moving?",
        "In which direction does the {thing} move?",
        "In what direction is the {thing} moving?",
        "What is the direction of motion?",
        "Where does the {thing} go?",
        "Which way is it going?",
    ],
    "description": [
        "What is shown?",
        "What happens in the video?",
        "What do you see?",
        "Describe the video.",
        "What is happening?",
        "What does the video show?",
        "Describe what you see in this clip.",
    ],
}


@dataclass(frozen=True)
class Clip:
    """`frames` is uint8 of shape (22, height, width, 3)."""

    colour: str
    shape: str
    direction: str
    frames: np.ndarray

    @property
    def answers(self) -> dict[str, str]:
        """The one right answer to each kind of question."""
        article = "An" if self.colour[0] in "aeiou" else "A"
        return {
            "colour": f"It is {self.colour}.",
            "shape": f"It is a {self.shape}.",
            "direction": f"It moves {self.direction}.",
            "description": f"{article} {self.colour} {self.shape} moves {self.direction}.",
        }


def make_clips(count: int, seed: int, held_out: bool = False) -> Iterator[Clip]:
    """`count` clips that go round the training (or the held-out) combinations; the same for the same seed."""
    combinations = itertools.cycle(training_and_held_out_combinations()[held_out])
    for number, combination in enumerate(itertools.islice(combinations, count)):
        yield draw_clip(*combination, np.random.default_rng([seed, held_out, number]))


def training_and_held_out_combinations() -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Splits the 120 (colour, shape, direction): 96 to train on, 24 held out.

    The held-out ones are a Latin square: every pair, such as (red, circle) or (red, upwards), is seen in training."""
    split = ([], [])
    for (i, colour), (j, shape), (k, direction) in itertools.product(*map(enumerate, (COLOURS, SHAPES, DIRECTIONS))):
        split[(i + j + k) % len(SHAPES) == 0].append((colour, shape, direction))
    return split


def draw_clip(colour: str, shape: str, direction: str, rng: np.random.Generator, frames: int = FRAMES) -> Clip:
    """A clip whose size, background, noise, and the shape's own size, tint, path and speed come from `rng`."""
    size = np.array(SIZES[rng.integers(len(SIZES))])  # height, width
    radius = rng.uniform(0.2, 0.28) * float(size.min())

    axis, sense = DIRECTIONS[direction]
    free = size[::-1] - 2 * (radius + 1)  # x, y: how far a centre can travel
    travel = rng.uniform(0.6, 0.95) * free * (np.arange(2) == axis)
    start = radius + 1 + rng.uniform(size=2) * (free - travel)
    centres = (start + np.linspace(0, 1, frames)[:, None] * travel).astype(np.float32)  # (frames, 2)

    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32) + 0.5
    distance = SHAPES[shape]((x - centres[:, 0, None, None]) / radius, (y - centres[:, 1, None, None]) / radius)
    coverage = np.clip(0.5 - distance * radius, 0, 1)[..., None]  # a soft edge one pixel wide

    tint = (np.array(COLOURS[colour]) + rng.uniform(-15, 15, 3)).astype(np.float32)
    slope = sum(rng.uniform(-15, 15) * position / position.max() for position in (x, y))
    background = rng.uniform(10, 70) + rng.uniform(-8, 8, 3).astype(np.float32) + slope[..., None]
    noise = rng.uniform(0, 6) * rng.standard_normal((frames, *background.shape), np.float32)
    video = background + coverage * (tint - background) + noise

    # The other sense of an axis is the same clip played backwards, so frames out of order never tell them apart.
    return Clip(colour, shape, direction, video.round().clip(0, 255).astype(np.uint8)[::sense].copy())


def ask(kind: str, clip: Clip, rng: np.random.Generator) -> str:
    """One of the wordings of a question. It calls the thing "shape", "object" or what it is, and is at times typed in
    a hurry or spelled the American way."""
    thing = rng.choice(["shape", "object", clip.shape]) if kind != "shape" else "object"
    question = rng.choice(QUESTIONS[kind]).format(thing=thing)
    if rng.random() < 0.3:
        question = question.replace("colour", "color")
    return question.lower().rstrip("?.") if rng.random() < 0.2 else question


def mp4(frames: np.ndarray) -> bytes:
    """`frames`, uint8 (T, height, width, 3), as the bytes of an H.264 file at 8 frames per second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the three clips that ship with the package.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the mp4 files to")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    shipped = [("red", "circle", "to the left"), ("blue", "cross", "upwards"), ("green", "square", "to the right")]
    for number, combination in enumerate(shipped):
        clip = draw_clip(*combination, np.random.default_rng(1 + number))
        name = f"{clip.colour}_{clip.shape}_{clip.direction.split()[-1]}.mp4"
        (output / name).write_bytes(mp4(clip.frames))
        print(output / name)
