"""Which frames of a video that is still coming in belong to it: one every 1/fps seconds, chosen by time."""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np


TOLERANCE = 1e-6  # of a frame; rates and times are floats


@dataclass
class FrameSampler:
    """
    Takes frames at 0, 1/fps, 2/fps … seconds of a video that comes in parts.

    The frame at a time is the one that is shown then. It belongs to the video once the video has lasted until the next
    time, because the processor counts only whole intervals in a file. Until then it waits in `unfinished`.

    Args:
        fps (`Fraction`):
            Frames to take for each second.
        seconds (`Fraction`, *optional*, defaults to 0):
            The length of what has come in.
        taken (`int`, *optional*, defaults to 0):
            How many frames belong to the video.
        unfinished (`list[np.ndarray]`, *optional*):
            The next frame if it has come in already, or nothing.
    """

    fps: Fraction
    seconds: Fraction = Fraction(0)
    taken: int = 0
    unfinished: list[np.ndarray] = field(default_factory=list)

    def due(self, seconds: Fraction, rate: Fraction, start: Fraction = Fraction(0)) -> list[int]:
        """
        The frames to take from a part that comes in next.

        Args:
            seconds (`Fraction`):
                Length of the part.
            rate (`Fraction`):
                Frames that a second of it has.
            start (`Fraction`, *optional*, defaults to 0):
                Where the part begins in its file, in seconds.

        Returns:
            `list[int]`: their numbers, counted from the beginning of the file.
        """
        frames, number = [], self.taken + len(self.unfinished)
        while (position := (number / self.fps - self.seconds) * rate) + TOLERANCE < seconds * rate:
            frames.append(max(0, math.floor(start * rate + position + TOLERANCE)))
            number += 1
        return frames

    def take(self, frames: list[np.ndarray], seconds: Fraction) -> list[np.ndarray]:
        """Moves on by `seconds` with the frames that were due. Returns those that now belong to the video."""
        self.seconds += seconds
        frames = self.unfinished + frames
        finished = math.floor(self.seconds * self.fps + TOLERANCE) - self.taken
        self.taken += len(frames[:finished])
        self.unfinished = frames[finished:]
        return frames[:finished]
