"""Makes small videos whose every picture shows its own number, for the tests of decoding."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


WIDTH, HEIGHT = 96, 64
BLOCK_ROWS, BLOCK_COLUMNS = 2, 4


def draw_number(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A (height, width, 3) uint8 picture of 2×4 blocks: white, black, then `number` (< 64) as six bits."""
    bits = [1, 0] + [number >> bit & 1 for bit in range(6)]
    blocks = np.array(bits, dtype=np.uint8).reshape(BLOCK_ROWS, BLOCK_COLUMNS) * 215 + 20
    rows = np.arange(height) * BLOCK_ROWS // height
    columns = np.arange(width) * BLOCK_COLUMNS // width
    return np.repeat(blocks[rows][:, columns, None], 3, axis=2)


def paint(number: int, height: int, width: int) -> np.ndarray:
    """A (height, width, 3) uint8 picture of waves of all colours that move with `number`."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (9 + channel) + number) + np.cos(y / (7 + channel) - number) for channel in range(3)]
    return (np.stack(waves, axis=-1) * 60 + 128).astype(np.uint8)


def read_number(picture: np.ndarray) -> int | None:
    """The number in a picture of any size by `draw_number`; `None` if its white and black marks are not in place."""
    height, width = picture.shape[:2]
    bits = []
    for row in range(BLOCK_ROWS):
        for column in range(BLOCK_COLUMNS):
            top, bottom = (int((row + part) * height / BLOCK_ROWS) for part in (0.25, 0.75))
            left, right = (int((column + part) * width / BLOCK_COLUMNS) for part in (0.25, 0.75))
            bits.append(picture[top : bottom + 1, left : right + 1].mean() > 127)
    if bits[:2] != [True, False]:
        return None
    return sum(int(bit) << place for place, bit in enumerate(bits[2:]))


@contextmanager
def ordinary_priority():
    """Resets the thread's priority. As root, the SVT-AV1 encoder gives the calling thread, and all that it starts, the
    highest real-time priority, which starves all other processes."""
    yield
    if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@dataclass(frozen=True)
class VideoSpec:
    """One video to generate. `times` gives frame n's presentation time in ticks of `1 / ticks` seconds."""

    name: str
    codec: str
    container: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    muxing: dict[str, str] = field(default_factory=dict)
    pix_fmt: str = "yuv420p"
    width: int = WIDTH
    height: int = HEIGHT
    frames: int = 48
    gop: int = 12
    b_frames: int | None = None
    ticks: int = 25
    times: Callable[[int], int] = lambda n: n
    first_shown: int = 0
    rotation: int = 0
    mirrored: bool = False
    aspect: Fraction | None = None
    colour: dict[str, int] = field(default_factory=dict)
    interlaced: bool = False
    draw: Callable[[int, int, int], np.ndarray] = draw_number
    title: str | None = None

    @property
    def numbers(self) -> list[int]:
        """The numbers that a player shows, in order."""
        return list(range(self.first_shown, self.frames))

    def write(self, folder: Path) -> Path:
        path = folder / self.name
        with (
            ordinary_priority(),
            av.open(str(path), "w", format=self.container, options=self.muxing) as container,
        ):
            if self.title is not None:
                container.metadata["title"] = self.title
            stream = container.add_stream(self.codec, rate=self.ticks, options=self.options)
            stream.width, stream.height, stream.pix_fmt = self.width, self.height, self.pix_fmt
            stream.codec_context.time_base = Fraction(1, self.ticks)
            stream.codec_context.gop_size = self.gop
            if self.b_frames is not None:
                stream.codec_context.max_b_frames = self.b_frames
            if self.aspect is not None:
                stream.codec_context.sample_aspect_ratio = self.aspect
            for name, value in self.colour.items():
                setattr(stream.codec_context, name, value)
            if self.rotation or self.mirrored:
                stream.set_display_rotation(self.rotation, hflip=self.mirrored)
            for number in range(self.frames):
                frame = av.VideoFrame.from_ndarray(self._stored_picture(number), format="rgb24")
                frame = frame.reformat(format=self.pix_fmt, dst_color_range=self.colour.get("color_range"))
                frame.pts, frame.time_base = self.times(number), Fraction(1, self.ticks)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    def _stored_picture(self, number: int) -> np.ndarray:
        turned = self.rotation % 180 != 0
        height, width = (self.width, self.height) if turned else (self.height, self.width)
        picture = self.draw(number, height, width)
        picture = picture[:, ::-1] if self.mirrored else picture
        return np.ascontiguousarray(np.rot90(picture, -self.rotation // 90))
