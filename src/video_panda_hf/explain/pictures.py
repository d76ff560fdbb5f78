"""Maps → pictures: on the frames, with captions, as GIF, MP4 and PNG."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont


CAPTIONS = {  # of each map; the first line is its name
    "fsra": ("FSRA", "summary of a frame", "whatever the question"),
    "gstra": ("GSTRA", "summary of 4 frames", "whatever the question"),
    "lsd": ("LSD", "patches of a window", "whatever the question"),
    "answer": ("answer", "where it comes from,", "by {method}"),
}
PARTS = {"full": "whole model", "fsra": "without FSRA", "gstra": "without GSTRA", "both": "without both"}
SUFFIXES = (".gif", ".mp4", ".png")
HEIGHT, MARGIN, FONT, LINE = 168, 12, 14, 19  # pixels
NARROWEST = 340  # so that question and answer have room
INK, PALE, ANSWER, PAPER = "#1f2328", "#59636e", "#0a5c36", "#ffffff"
# Dark to bright, at equal distances: a colour for each value between 0 and 1.
COLOURS = np.array([(0, 0, 4), (74, 12, 107), (165, 44, 96), (237, 105, 37), (251, 180, 26), (252, 255, 164)])


def coloured(values: np.ndarray) -> np.ndarray:
    """Values in 0..1 → colours (…, 3) in 0..255."""
    steps = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(values, steps, COLOURS[:, channel]) for channel in range(3)], -1)


def overlay(frames: np.ndarray, heat: np.ndarray, height: int = HEIGHT) -> list[Image.Image]:
    """Frames (T, height, width, 3) with a map (T, rows, columns) on each: grey where it is low, bright where high."""
    size = size_of(frames, height)
    heat = heat / max(float(heat.max()), np.finfo(np.float32).tiny)
    pictures = []
    for frame, values in zip(frames, heat, strict=True):
        smooth = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        values = np.asarray(smooth).clip(0, 1)
        grey = np.asarray(resized(frame, size).convert("L").convert("RGB"), dtype=np.float32)
        share = (0.25 + 0.6 * values)[..., None]
        pictures.append(Image.fromarray(((1 - share) * grey + share * coloured(values)).astype(np.uint8)))
    return pictures


def size_of(frames: np.ndarray, height: int) -> tuple[int, int]:
    return max(1, round(height * frames.shape[2] / frames.shape[1])), height


def resized(frame: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)


# Whole pictures


def captions_of(explanation, maps: list[str]) -> list[tuple[str, ...]]:
    rows = [("frames", "that the model got", "")]
    for name in maps:
        rows.append(tuple(line.format(method=explanation.method) for line in CAPTIONS[name]))
    return rows


def lines_of(explanation) -> list[tuple[str, str]]:
    """Question and answers, each with its colour."""
    if explanation.question is None:
        return []
    lines = [(explanation.question, INK)]
    if not explanation.ablation:
        return [*lines, (explanation.text, ANSWER)]
    answers = explanation.ablation.items()
    return lines + [(f"{PARTS[part]}: {text}", ANSWER if part == "full" else PALE) for part, text in answers]


def rows_of(explanation, maps: list[str], height: int) -> list[list[Image.Image]]:
    """The pictures of the frames themselves, and of each map."""
    size = size_of(explanation.frames, height)
    plain = [resized(frame, size) for frame in explanation.frames]
    return [plain, *(overlay(explanation.frames, explanation.map(name).numpy(), height) for name in maps)]


def steps(explanation, maps: list[str]) -> list[Image.Image]:
    """One picture for each frame: the frame and its maps side by side."""
    rows, captions = rows_of(explanation, maps, HEIGHT), captions_of(explanation, maps)
    font = ImageFont.load_default(FONT)
    room = max(rows[0][0].width, *(int(font.getlength(line)) + 1 for caption in captions for line in caption))
    width = max(NARROWEST, MARGIN + len(rows) * (room + MARGIN))
    text = wrapped(lines_of(explanation), font, width - 2 * MARGIN)
    top = MARGIN + LINE * len(text) + (MARGIN // 2 if text else 0)
    height = top + HEIGHT + MARGIN // 2 + 3 * LINE + MARGIN // 2
    pictures = []
    for number in range(len(rows[0])):
        picture = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)  # H.264 needs even sides
        draw = ImageDraw.Draw(picture)
        write(draw, (MARGIN, MARGIN), text, font)
        for place, (row, caption) in enumerate(zip(rows, captions, strict=True)):
            left = MARGIN + place * (room + MARGIN)
            picture.paste(row[number], (left, top))
            lines = [(line, INK if index == 0 else PALE) for index, line in enumerate(caption)]
            if place == 0:
                lines[1] = (f"{number + 1} of {len(rows[0])}", PALE)
                lines[2:] = []
            write(draw, (left, top + HEIGHT + MARGIN // 2), lines, font)
        pictures.append(picture)
    return pictures


def sheet(explanation, maps: list[str]) -> Image.Image:
    """One picture of all frames: a row for the frames and one for each map."""
    rows, captions = rows_of(explanation, maps, HEIGHT // 2), captions_of(explanation, maps)
    font = ImageFont.load_default(FONT)
    side = max(int(font.getlength(line)) + 1 for caption in captions for line in caption) + MARGIN
    small = rows[0][0].width
    width = max(NARROWEST, MARGIN + side + len(rows[0]) * (small + 2) + MARGIN)
    text = wrapped(lines_of(explanation), font, width - 2 * MARGIN)
    top = MARGIN + LINE * len(text) + (MARGIN // 2 if text else 0)
    picture = Image.new("RGB", (width, top + len(rows) * (HEIGHT // 2 + MARGIN // 2) + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(picture)
    write(draw, (MARGIN, MARGIN), text, font)
    for row, caption in zip(rows, captions, strict=True):
        write(draw, (MARGIN, top), [(line, INK if n == 0 else PALE) for n, line in enumerate(caption)], font)
        for number, small_picture in enumerate(row):
            picture.paste(small_picture, (MARGIN + side + number * (small + 2), top))
        top += HEIGHT // 2 + MARGIN // 2
    return picture


def write(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: list[tuple[str, str]], font) -> None:
    for number, (line, colour) in enumerate(lines):
        draw.text((place[0], place[1] + number * LINE), line, colour, font)


def wrapped(lines: list[tuple[str, str]], font, width: int) -> list[tuple[str, str]]:
    """Lines that fit the width. A word that does not is cut."""
    fitting = []
    for line, colour in lines:
        current = ""
        for word in line.split():
            while font.getlength(word) > width:
                cut = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                fitting += [(part, colour) for part in (current, word[:cut]) if part]
                current, word = "", word[cut:]
            longer = f"{current} {word}".strip()
            if font.getlength(longer) > width:
                fitting.append((current, colour))
                longer = word
            current = longer
        fitting.append((current, colour))
    return fitting


# Files


def save(explanation, file: str | os.PathLike, maps: list[str], seconds_per_frame: float) -> None:
    suffix = Path(file).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{os.fspath(file)}: an explanation is written as {', '.join(SUFFIXES)}")
    if not 0 < seconds_per_frame < float("inf"):
        raise ValueError(f"`seconds_per_frame` is a number of seconds above 0, not {seconds_per_frame}")
    if suffix == ".png":
        sheet(explanation, maps).save(file)
    elif suffix == ".gif":
        save_gif(steps(explanation, maps), file, seconds_per_frame)
    else:
        save_mp4(steps(explanation, maps), file, seconds_per_frame)


def save_gif(pictures: list[Image.Image], file: str | os.PathLike, seconds_per_frame: float) -> None:
    """A GIF with one palette, so that what does not change takes no room."""
    together = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)))
    for number, picture in enumerate(pictures):
        together.paste(picture, (0, number * picture.height))
    palette = together.quantize(128)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    shown = {"duration": round(1000 * seconds_per_frame), "loop": 0}
    pictures[0].save(file, save_all=True, append_images=pictures[1:], optimize=True, **shown)


def save_mp4(pictures: list[Image.Image], file: str | os.PathLike, seconds_per_frame: float) -> None:
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(os.fspath(file), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(1 / seconds_per_frame).limit_denominator(1000))
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def show(picture: Image.Image) -> None:
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        shell = None
    else:
        shell = get_ipython()
    if shell is None:
        picture.show()
    else:
        display(picture)
