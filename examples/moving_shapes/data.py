"""Videos of moving shapes and questions about them: the data of the small model that ships with the package.

There are four kinds of clips: one shape that moves; one that gets faster or slower; two that move one after the other;
one to four that stand still. Every fifth combination of colour, shape, direction and so on is *held out*: no training
clip shows it, so that its answer cannot be memorised. Only the order of the frames shows the direction, which of two
shapes moves first, and whether a shape gets faster or slower: a clip played backwards is a clip of the opposite.

As a command, this file writes the three clips that the package ships:

    python examples/moving_shapes/data.py --output src/video_panda_hf/assets/clips
"""

import argparse
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
# Signed distances in units of the shape's radius, negative inside. x points right, y points down.
SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "triangle": lambda x, y: np.maximum(0.866 * abs(x) - 0.5 * y - 0.55, y - 0.8),
    "diamond": lambda x, y: (1.2 * abs(x) + 0.8 * abs(y) - 1) / 1.442,
    "cross": lambda x, y: np.minimum(np.maximum(abs(x), 3 * abs(y)), np.maximum(3 * abs(x), abs(y))) - 1,
}
DIRECTIONS = {"to the left": (0, -1), "to the right": (0, 1), "upwards": (1, -1), "downwards": (1, 1)}  # axis, sense
PACES = {"faster": "slower", "slower": "faster"}  # each with its opposite
NUMBERS = ["one", "two", "three", "four"]
KINDS = ["motion", "pace", "order", "motion", "pace", "order", "count"]  # in turn; moving shapes are harder to learn
SIZES = [(112, 112), (84, 112), (112, 84), (96, 128), (128, 96)]  # height, width in pixels; H.264 needs even sizes
FRAMES, FPS = 22, 8
SAMPLED = 8  # frames that the model sees: 0, 3, …, 21

QUESTIONS = {
    "colour": [
        "What colour is the {thing}?",
        "What is the colour of the {thing}?",
        "Which colour does the {thing} have?",
        "Which colour is the {thing} in the video?",
        "What colour is it?",
    ],
    "shape": [
        "What shape is the {thing}?",
        "Which shape is the {thing}?",
        "What is the shape of the {thing}?",
        "What shape does the {thing} have?",
        "What shape is it?",
    ],
    "count": [
        "How many are there?",
        "How many {thing}s are there?",
        "How many {thing}s do you see?",
        "How many {thing}s does the video show?",
        "What is the number of {thing}s?",
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
    "pace": [
        "Does the {thing} get faster or slower?",
        "Does it speed up or slow down?",
        "How does the speed of the {thing} change?",
        "Is it getting faster or slower?",
    ],
    "first": ["What happens first?", "What moves first?", "Which one moves first?", "Which shape moves first?"],
    "last": ["What happens last?", "What moves last?", "Which one moves last?", "Which shape moves last?"],
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
    """What a clip shows. `things` are (colour, shape), in the order in which they move.

    `frames` is uint8 of shape (22, height, width, 3), and `boxes` are the places of the things in it, float of shape
    (things, 22, 4): left, top, right, bottom in pixels. Both are `None` before drawing."""

    kind: str
    things: tuple[tuple[str, str], ...]
    direction: str | None = None
    pace: str | None = None
    frames: np.ndarray | None = None
    boxes: np.ndarray | None = field(default=None, compare=False)

    @property
    def description(self) -> str:
        first, last = self.things[0], self.things[-1]
        thing = f"{'An' if first[0][0] in 'aeiou' else 'A'} {' '.join(first)}"
        return {
            "motion": f"{thing} moves {self.direction}.",
            "pace": f"{thing} moves {self.direction}, {self.pace} and {self.pace}.",
            "order": f"The {first[0]} one moves, then the {last[0]} one.",
            "count": f"{counted(self.things)} {'stand' if len(self.things) > 1 else 'stands'} still.",
        }[self.kind]

    @property
    def questions(self) -> list[str]:
        """The kinds of questions that have an answer."""
        own = {
            "motion": ["colour", "shape", "direction"],
            "pace": ["colour", "shape", "direction", "pace"],
            "order": ["first", "last"],
            "count": ["colour", "shape", "count"],
        }
        return [*own[self.kind], "description"]

    def backwards(self) -> "Clip":
        """The clip played backwards."""
        return replace(
            self,
            things=self.things[::-1] if self.kind == "order" else self.things,
            direction=self.direction and opposite(self.direction),
            pace=self.pace and PACES[self.pace],
            frames=None if self.frames is None else self.frames[::-1],
            boxes=self.boxes if self.boxes is None else self.boxes[:: -1 if self.kind == "order" else 1, ::-1],
        )


def counted(things: tuple[tuple[str, str], ...]) -> str:
    colour, shape = things[0]
    return f"{NUMBERS[len(things) - 1].capitalize()} {colour} {shape if len(things) == 1 else plural(shape)}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def opposite(direction: str) -> str:
    axis, sense = DIRECTIONS[direction]
    return next(other for other, motion in DIRECTIONS.items() if motion == (axis, -sense))


def make_clips(count: int, seed: int, held_out: bool = False, frames: int = FRAMES) -> Iterator[Clip]:
    """Yields `count` clips of all kinds in turn, cycling through the training (or held-out) combinations.

    The same seed gives the same clips."""
    of_kind = {kind: itertools.cycle(combinations(kind, held_out)) for kind in KINDS}
    for number, kind in enumerate(itertools.islice(itertools.cycle(KINDS), count)):
        yield draw(next(of_kind[kind]), np.random.default_rng([seed, held_out, number]), frames)


def combinations(kind: str, held_out: bool) -> list[Clip]:
    """All training (or held-out) clips of a kind, not drawn, in a shuffled order.

    The held-out clips form a Latin square: training shows every pair of properties, such as (red, circle) or (red,
    upwards), but never the whole combination."""
    number_of = {name: i for names in (COLOURS, SHAPES, DIRECTIONS, NUMBERS) for i, name in enumerate(names)}
    things = list(itertools.product(COLOURS, SHAPES))
    if kind == "motion":
        clips = {Clip(kind, (thing,), direction): (*thing, direction) for thing in things for direction in DIRECTIONS}
    elif kind == "pace":
        clips = {
            Clip(kind, (thing,), direction, pace): (*thing, direction)
            for thing in things
            for direction in DIRECTIONS
            for pace in PACES
        }
    elif kind == "count":
        clips = {Clip(kind, (thing,) * (i + 1)): (*thing, NUMBERS[i]) for thing in things for i in range(len(NUMBERS))}
    else:
        pairs = ((a, b) for a in things for b in things if a[0] != b[0] and a[1] != b[1])
        clips = {Clip(kind, pair): (*pair[0], *pair[1]) for pair in pairs}
    chosen = [clip for clip, names in clips.items() if (sum(map(number_of.get, names)) % len(SHAPES) == 0) == held_out]
    return [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))]


def draw(clip: Clip, rng: np.random.Generator, frames: int = FRAMES) -> Clip:
    """Draws a clip with this many frames, evenly spaced in time. `rng` chooses size, background and noise, and the
    size, tint, path and speed of the things. A clip and its opposite are the same frames in opposite order."""
    if (clip.kind == "order" and clip.things[0] > clip.things[1]) or DIRECTIONS.get(clip.direction, (0, 1))[1] < 0:
        return draw(clip.backwards(), rng, frames).backwards()

    size = np.array(SIZES[rng.integers(len(SIZES))])[::-1]  # x, y
    axis = DIRECTIONS[clip.direction][0] if clip.direction else rng.integers(2)
    cells = {"motion": (1, 1), "pace": (1, 1), "count": (2, 2)}.get(clip.kind, (1, 2) if axis == 0 else (2, 1))
    cell = size / cells  # each thing stays in its own cell of the picture
    radius = (rng.uniform(0.24, 0.3) if cells == (1, 1) else rng.uniform(0.2, 0.23)) * size.min()
    places = rng.permutation([(x, y) for x in range(cells[0]) for y in range(cells[1])])

    tint = {thing: np.array(COLOURS[thing[0]]) + rng.uniform(-15, 15, 3) for thing in clip.things}
    x, y = np.meshgrid(*(np.arange(side, dtype=np.float32) + 0.5 for side in size))
    slope = sum(rng.uniform(-15, 15) * position / position.max() for position in (x, y))
    picture = rng.uniform(10, 70) + rng.uniform(-8, 8, 3).astype(np.float32) + slope[..., None]
    video, boxes = np.repeat(picture[None], frames, 0), []
    for number, thing in enumerate(clip.things):
        free = cell - 2 * (radius + 1)  # how far the centre can travel
        share = 0.0 if clip.kind == "count" else rng.uniform(0.7, 0.95)  # of the possible way
        travel = share * free * (np.arange(2) == axis)
        start = places[number] * cell + radius + 1 + rng.uniform(size=2) * (free - travel)
        progress = progress_in_time(clip, number, np.linspace(0, 1, frames))
        if len(clip.things) > 1 and rng.random() < 0.5:  # each of two moves in its own direction
            progress = 1 - progress
        centres = (start + progress[:, None] * travel).astype(np.float32)  # (frames, 2)
        dx, dy = ((p - c[:, None, None]) / radius for p, c in zip((x, y), centres.T, strict=True))
        coverage = np.clip(0.5 - SHAPES[thing[1]](dx, dy) * radius, 0, 1)[..., None]  # a soft edge one pixel wide
        video += coverage * (tint[thing].astype(np.float32) - video)
        boxes.append([box_of(mask[..., 0] > 0.5) for mask in coverage])
    video += rng.uniform(0, 6) * rng.standard_normal(video.shape, np.float32)
    return replace(clip, frames=video.round().clip(0, 255).astype(np.uint8), boxes=np.array(boxes, dtype=float))


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is set in a mask (height, width)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def progress_in_time(clip: Clip, number: int, time: np.ndarray) -> np.ndarray:
    """The share of its way that a thing has moved at these times; all in [0, 1]."""
    if clip.kind == "order":
        return np.clip(2 * time - number, 0, 1)
    return {"faster": time**2.5, "slower": 1 - (1 - time) ** 2.5}.get(clip.pace, time)


def ask(kind: str, clip: Clip, rng: np.random.Generator) -> tuple[str, str]:
    """A random wording of a question, and its answer. A thing is called "shape", "object", or by its name if that does
    not give the answer away. Some questions lack capitals and the question mark, or have American spelling."""
    colour, shape = clip.things[0]
    answer = {
        "colour": f"It is {colour}." if len(clip.things) == 1 else f"They are {colour}.",
        "shape": f"It is a {shape}." if len(clip.things) == 1 else f"They are {plural(shape)}.",
        "count": f"There {'is' if len(clip.things) == 1 else 'are'} {NUMBERS[len(clip.things) - 1]}.",
        "direction": f"It moves {clip.direction}.",
        "pace": f"It gets {clip.pace}.",
        "description": clip.description,
        "first": f"The {clip.things[0][0]} one.",
        "last": f"The {clip.things[-1][0]} one.",
    }[kind]
    names = {"shape": ["object", "thing"], "direction": ["shape", "object", shape], "pace": ["shape", "object", shape]}
    name = str(rng.choice(names.get(kind, ["shape", "object"])))
    question = str(rng.choice(QUESTIONS[kind])).format(thing=name)
    if rng.random() < 0.3:
        question = question.replace("colour", "color")
    return (question.lower().rstrip("?.") if rng.random() < 0.2 else question), answer


def mp4(frames: np.ndarray) -> bytes:
    """Encodes `frames`, uint8 (T, height, width, 3), as an H.264 file at 8 frames per second."""
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
    # Seeds of clips that the shipped model describes correctly for every wording, as it does for three in four.
    shipped = {
        ("red", "circle", "to the left"): 1,
        ("blue", "cross", "upwards"): 11,
        ("green", "square", "to the right"): 2,
    }
    for (colour, shape, direction), seed in shipped.items():
        clip = draw(Clip("motion", ((colour, shape),), direction), np.random.default_rng(seed))
        name = f"{colour}_{shape}_{direction.split()[-1]}.mp4"
        (output / name).write_bytes(mp4(clip.frames))
        print(output / name)
