"""Writes all frames of videos as decord gives them: `python decord_frames.py FOLDER VIDEO…` → FOLDER/VIDEO.npy.

decord brings its own FFmpeg, which must not be in one process with PyAV's. A video that it cannot read gives no file.
"""

import sys
from pathlib import Path

import decord
import numpy as np


for name in sys.argv[2:]:
    try:
        reader = decord.VideoReader(name, num_threads=1)
        frames = [reader.next().asnumpy() for _ in range(len(reader))]
    except (decord.DECORDError, RuntimeError):
        continue
    np.save(Path(sys.argv[1]) / f"{Path(name).name}.npy", np.stack(frames))
