"""
Decodes videos that were edited in their structure, isolated, and counts what comes of it.

    PYTHONPATH=src:tests python tests/decoding/mutants.py [--count 3000] [--seed 0]

Every mutant must give frames or a `VideoDecodeError`. `tests/decoding/test_mutants.py` runs some of them.
"""

import argparse
import contextlib
import json
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from helpers.video_files import VideoSpec
from video_panda_hf.decoding import DecodeLimits, VideoDecodeError, decode_video, isolation


ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "8"}
PYRAMID = {"bf": "3", "b-pyramid": "normal"}
X265 = {"x265-params": "log-level=none:pools=1:keyint=12:open-gop=1"}
# The first half has frames that are never shown, or shown later than they are decoded.
SPECS = [
    VideoSpec("vp9.mp4", "libvpx-vp9", options=ALT_REF),
    VideoSpec("vp9.webm", "libvpx-vp9", options=ALT_REF),
    VideoSpec("av1.mp4", "libsvtav1", options={"preset": "10"}),
    VideoSpec("av1.webm", "libsvtav1", options={"preset": "10"}),
    VideoSpec("hevc.mp4", "libx265", options=X265),
    VideoSpec("hevc.mkv", "libx265", options=X265),
    VideoSpec("h264.mp4", "libx264", options=PYRAMID),
    VideoSpec("fast.mp4", "libx264", options=PYRAMID, muxing={"movflags": "faststart"}),
    VideoSpec("fragmented.mp4", "libx264", options=PYRAMID, muxing={"movflags": "frag_keyframe+empty_moov"}),
    VideoSpec("h264.mkv", "libx264", options=PYRAMID),
    VideoSpec("mpeg4.mov", "mpeg4", b_frames=2),
    VideoSpec("vp8.webm", "libvpx", options=ALT_REF),
]
LIMITS = DecodeLimits(isolate=True, max_seconds=20, max_memory_bytes=2**30)
BOX = re.compile(
    rb"moov|mvhd|trak|tkhd|edts|elst|mdia|mdhd|minf|stbl|stsd|stts|stss|ctts|stsc|stsz|stco|moof|traf|trun|mdat|ftyp|mfra"
)
TABLES = re.compile(rb"stss|ctts|stts|stsc|stsz|stco|elst|trun|tfhd|tfdt")
EBML = re.compile(
    rb"\x18\x53\x80\x67|\x1f\x43\xb6\x75|\x16\x54\xae\x6b|\x1c\x53\xbb\x6b|\x15\x49\xa9\x66|\x11\x4d\x9b\x74|\xa3|\xa0|\xae|\xe0"
)


def resized(data: bytes, random, _) -> bytes:
    """A box, or an EBML element, with another size."""
    edited = bytearray(data)
    if is_mp4(data):
        place = pick(BOX, data, random) - 4
        size = int.from_bytes(data[place : place + 4], "big")
        sizes = [0, 1, 7, size - 1, size + 1, size * 2, size // 2, 2**31, 2**32 - 1, int(random.integers(2**16))]
        edited[place : place + 4] = (sizes[random.integers(len(sizes))] % 2**32).to_bytes(4, "big")
    else:
        place = pick(EBML, data, random)
        place += 4 if data[place] < 0x20 else 1
        edited[place] = [0, 0x80, 0xFF, 0x01, 0x40, int(random.integers(256))][random.integers(6)]
    return bytes(edited)


def moved(data: bytes, random, _) -> bytes:
    """A box or an element is somewhere else, or there twice."""
    start, end = piece(data, random)
    rest = data if random.integers(3) == 0 else data[:start] + data[end:]
    place = pick(BOX if is_mp4(data) else EBML, rest, random) - 4 * is_mp4(data)
    return rest[:place] + data[start:end] + rest[place:]


def dropped(data: bytes, random, _) -> bytes:
    """A box or an element is missing, or has another name."""
    start, end = piece(data, random)
    if is_mp4(data) and random.integers(2):
        return data[: start + 4] + b"free" + data[start + 8 :]
    return data[:start] + data[end:]


def headed(data: bytes, random, others: list[bytes]) -> bytes:
    """The beginning of one file before the rest of another."""
    head = others[random.integers(len(others))]
    if is_mp4(data) and is_mp4(head) and random.integers(2):  # its tables before the data of this one
        begin = head.find(b"moov") - 4
        tables = head[begin : begin + int.from_bytes(head[begin : begin + 4], "big")]
        begin = data.find(b"moov") - 4
        return data[:begin] + tables + data[begin + int.from_bytes(data[begin : begin + 4], "big") :]
    cut = int(random.integers(20, min(len(head), len(data)) // 2))
    return head[:cut] + data[cut:]


def edited(data: bytes, random, _) -> bytes:
    """Entries of the tables of key frames, times, sizes and places, or of the blocks' headers, are others."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 5)):
        place = pick(TABLES if is_mp4(data) else EBML, data, random)
        place += (4 + 4 * int(random.integers(0, 12))) if is_mp4(data) else int(random.integers(1, 8))
        value = [0, 1, 2, 2**31, 2**32 - 1, int(random.integers(100)), int(random.integers(2**32))][random.integers(7)]
        size = min(4 if is_mp4(data) else 1, len(changed) - place)
        if size > 0:
            changed[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, "big")
    return bytes(changed)


def unkeyed(data: bytes, random, others: list[bytes]) -> bytes:
    """No table of key frames, so that all seem to be, and one of the other edits or a few other bytes."""
    without = data.replace(b"stss", b"free")
    if random.integers(2):
        return EDITS[random.integers(len(EDITS) - 1)](without, random, others)
    changed = bytearray(without)
    for place in random.integers(0, len(changed), random.integers(1, 10)):
        changed[place] = random.integers(256)
    return bytes(changed)


EDITS: list[Callable] = [resized, moved, dropped, headed, edited, unkeyed]


def is_mp4(data: bytes) -> bool:
    return b"ftyp" in data[:16] or b"moov" in data


def pick(pattern: re.Pattern, data: bytes, random) -> int:
    """A random place where `pattern` is."""
    places = [found.start() for found in pattern.finditer(data)] or [len(data) // 2]
    return places[random.integers(len(places))]


def piece(data: bytes, random) -> tuple[int, int]:
    if not is_mp4(data):
        start = pick(EBML, data, random)
        return start, start + int(random.integers(1, 2000))
    start = max(0, pick(BOX, data, random) - 4)
    return start, start + max(8, min(int.from_bytes(data[start : start + 4], "big"), len(data)))


def run(count: int, seed: int) -> dict:
    """Decodes `count` mutants and reports the outcomes."""
    warnings.simplefilter("ignore")
    outcomes, kinds, undocumented, slowest, memory = Counter(), Counter(), [], 0.0, []
    started, threads = isolation.Worker.__init__, torch.get_num_threads()
    processes = []

    def noted(worker):
        started(worker)
        processes.append(worker.process)

    isolation.Worker.__init__ = noted
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = [spec.write(Path(folder)).read_bytes() for spec in SPECS]
        for number in range(count):
            random = np.random.default_rng([seed, number])
            edit, data = EDITS[number // len(SPECS) % len(EDITS)], files[number % len(SPECS)]
            mutant = edit(data, random, files)
            torch.set_num_threads(int(random.integers(1, 5)))  # of the worker too
            begin = time.monotonic()
            try:
                frames, _ = decode_video(mutant, eight_frames, limits=LIMITS, strict=bool(number % 2))
                outcome = "frames" if frames.ndim == 4 and len(frames) else "an empty answer"
            except VideoDecodeError as error:
                outcome = "ended worker" if "worker process" in str(error) else type(error).__name__
                if type(error) is VideoDecodeError:
                    undocumented.append(f"{number}: {error}")
            except Exception as error:
                outcome = type(error).__name__
                undocumented.append(f"{number}: {error!r}")
            if outcome == "ended worker":
                undocumented.append(f"{number} ({edit.__name__} {SPECS[number % len(SPECS)].name}) ends a worker")
            slowest = max(slowest, time.monotonic() - begin)
            outcomes[outcome] += 1
            kinds[edit.__name__] += 1
            memory.append(resident("self") + sum(resident(process.pid) for process in processes))
    finally:
        torch.set_num_threads(threads)
        isolation.Worker.__init__ = started
        isolation._pool.end()
    quarter = len(memory) // 4
    return {
        "mutants": count,
        "kinds": kinds,
        "outcomes": outcomes,
        "undocumented": undocumented,
        "slowest": round(slowest, 2),
        "workers": len(processes),
        "left": sum(process.poll() is None for process in processes),
        "growth_megabytes": round(
            (np.median(memory[-quarter:]) - np.median(memory[quarter : 2 * quarter])) / 2**20, 1
        ),
    }


def eight_frames(metadata) -> np.ndarray:
    return np.linspace(0, metadata.total_num_frames - 1, 8).astype(int)


def resident(process: int | str) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * 4096
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.count, arguments.seed), indent=1))
