"""Writes all frames of videos as another decoder gives them, one after the other:
`python frames_of_others.py decord|torchcodec FOLDER VIDEO…` → FOLDER/VIDEO.npy.

Each brings or loads an FFmpeg of its own, which must not be in one process with PyAV's. A video that it cannot read
gives no file. The exit status is 3 if it does not work at all.
"""

import sys
from pathlib import Path

import numpy as np


def frames_of_decord(name: str) -> list[np.ndarray]:
    from decord import VideoReader

    reader = VideoReader(name, num_threads=1)
    return [reader.next().asnumpy() for _ in range(len(reader))]


def frames_of_torchcodec(name: str) -> list[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    return [frame.numpy() for frame in VideoDecoder(name, dimension_order="NHWC", num_ffmpeg_threads=1)]


frames_of = {"decord": frames_of_decord, "torchcodec": frames_of_torchcodec}[sys.argv[1]]
for number, name in enumerate(sys.argv[3:]):
    try:
        frames = frames_of(name)
    except Exception as error:
        if number == 0:
            print(error, file=sys.stderr)
            sys.exit(3)
        continue
    np.save(Path(sys.argv[2]) / f"{Path(name).name}.npy", np.stack(frames))
