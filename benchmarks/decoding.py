"""Time and memory to read 8 frames of a video, compared with other libraries.

    python benchmarks/decoding.py [--folder FOLDER] [--repeats 5] [--json FILE]

Videos of a moving pattern are encoded in a temporary folder; long ones repeat a minute. Every cell is measured in its
own process: the fastest of some repeats, and the peak growth of the process.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tables import finish, measured


RATE = 25
NUM_FRAMES = 8
SLOW = 10  # seconds
TURNS = 10  # for each repeat, where the difference is small
WIDTH = 20  # of a table's first column
H264 = {"preset": "veryfast", "crf": "26", "sc_threshold": "0"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "row-mt": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to keep the videos; default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE, for tables.py")
    parser.add_argument("--measure", nargs=2, metavar=("READER", "VIDEO"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments.repeats)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        videos = make_videos(folder)
        times = print_times(videos, arguments.repeats)
        rates = {str(workers): videos_per_second(videos["720p h264, 10 s"], workers) for workers in (0, 2)}
        cost = isolated_cost(videos["720p h264, 10 s"], arguments.repeats)
        finish("decoding", {**ratios(times), "videos_per_second": rates, "isolated": cost}, arguments.json)


# Readers: functions of a path. Each is imported only in the process that measures it.


def decode_video_reader() -> Callable:
    from video_panda_hf.decoding.video import decode_video

    return lambda path: decode_video(path, evenly_spaced)


def load_video_reader() -> Callable:
    from transformers.video_utils import load_video

    return lambda path: load_video(
        path, backend="pyav", sample_indices_fn=lambda metadata, **_: evenly_spaced(metadata)
    )


def decord_reader() -> Callable:
    from decord import VideoReader, cpu

    def read(path):
        video = VideoReader(path, ctx=cpu(0))
        return video.get_batch(indices(len(video))).asnumpy()

    return read


def torchcodec_reader() -> Callable:
    from torchcodec.decoders import VideoDecoder

    def read(path):
        video = VideoDecoder(path, num_ffmpeg_threads=0)
        return video.get_frames_at(indices=indices(video.metadata.num_frames).tolist()).data

    return read


def processor_reader() -> Callable:
    from video_panda_hf.processing import VideoPandaVideoProcessor

    processor = VideoPandaVideoProcessor()
    return lambda path: processor(videos=path, num_frames=NUM_FRAMES, return_tensors="pt")


def processor_after_load_video_reader() -> Callable:
    from video_panda_hf.processing import VideoPandaVideoProcessor

    processor, load = VideoPandaVideoProcessor(), load_video_reader()
    return lambda path: processor(videos=load(path)[0], do_sample_frames=False, return_tensors="pt")


READERS = {
    "decode_video": decode_video_reader,
    "load_video(pyav)": load_video_reader,
    "decord": decord_reader,
    "torchcodec": torchcodec_reader,
    "to pixel_values_videos": processor_reader,
    "… after load_video(pyav)": processor_after_load_video_reader,
}


def evenly_spaced(metadata) -> np.ndarray:
    return indices(metadata.total_num_frames)


def indices(total: int) -> np.ndarray:
    return np.linspace(0, total - 1, NUM_FRAMES).astype(int)


# Measuring


def measure_apart(reader: str, path: Path, repeats: int) -> dict:
    if reader in ("decord", "torchcodec") and importlib.util.find_spec(reader) is None:
        return {"failed": "not installed"}
    command = [sys.executable, __file__, "--repeats", str(repeats), "--measure", reader, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": "fails"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(reader: str, path: str, repeats: int) -> dict:
    """Seconds of the fastest of `repeats` after a warm-up (only one run if it is slow), and growth in MB."""
    read = READERS[reader]()
    before = peak_megabytes()
    times = []
    while len(times) < repeats + 1 and (not times or times[0] < SLOW):
        start = time.perf_counter()
        read(path)
        times.append(time.perf_counter() - start)
    return {"seconds": min(times[1:] or times), "megabytes": peak_megabytes() - before}


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_times(videos: dict[str, Path], repeats: int) -> dict[str, dict[str, dict]]:
    """Measures every reader on every video; {video: {reader: result}}."""
    machine = f"{os.cpu_count()} processors, PyAV {av.__version__}"
    print(f"{NUM_FRAMES} frames, {machine}: seconds, and in brackets MB of growth")
    print(" " * WIDTH + "".join(f"{reader:>26}" for reader in READERS), flush=True)
    results = {}
    for video, path in videos.items():
        results[video] = {reader: measure_apart(reader, path, repeats) for reader in READERS}
        print(f"{video:<{WIDTH}}" + "".join(f"{cell(result):>26}" for result in results[video].values()), flush=True)
    return results


def ratios(results: dict[str, dict[str, dict]]) -> dict:
    """Seconds of `decode_video` and of the processor, and how many times as long the others take."""
    rows = []
    for video, row in results.items():
        ours, whole = row["decode_video"], row["to pixel_values_videos"]
        rows.append(
            {
                "video": video,
                "decode_video_seconds": ours["seconds"],
                "load_video": ratio(row["load_video(pyav)"], ours),
                "decord": ratio(row["decord"], ours),
                "torchcodec": ratio(row["torchcodec"], ours),
                "processor_seconds": whole["seconds"],
                "processor_after_load_video": ratio(row["… after load_video(pyav)"], whole),
            }
        )
    minute, half_hour = (results[f"720p h264, {length}"]["decode_video"] for length in ("1 min", "30 min"))
    growth = half_hour["megabytes"] - minute["megabytes"]
    return {"rows": rows, "half_hour_against_minute": {"time": ratio(half_hour, minute), "megabytes": growth}}


def isolated_cost(path: Path, repeats: int) -> dict:
    """How many times as long `decode_video` takes in a worker process, by the median of the seconds on the clock and
    by the processor time of both processes, and seconds to start one. Taken in turns, on a machine that is not busy:
    elsewhere the clock varies by more than the difference."""
    from video_panda_hf.decoding import isolation
    from video_panda_hf.decoding.video import decode_video

    start = time.perf_counter()
    decode_video(path, evenly_spaced, isolate=True)
    decode_video(path, evenly_spaced)
    begun = time.perf_counter() - start
    worker = Path(f"/proc/{isolation._pool.idle[0].process.pid}/stat")

    def processor_time() -> float:
        ticks = worker.read_text().rsplit(")", 1)[1].split()[11:13]
        return sum(os.times()[:2]) + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    spent: dict[bool, float] = {True: 0.0, False: 0.0}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(TURNS * repeats):
        for isolate in spent:
            before, start = processor_time(), time.perf_counter()
            decode_video(path, evenly_spaced, isolate=isolate)
            seconds[isolate].append(time.perf_counter() - start)
            spent[isolate] += processor_time() - before
    return {
        "clock": statistics.median(seconds[True]) / statistics.median(seconds[False]),
        "time": spent[True] / spent[False],
        "start_seconds": begun - sum(map(min, seconds.values())),
        **measured(),
    }


def cell(result: dict) -> str:
    return result.get("failed") or f"{result['seconds']:.3f} ({result['megabytes']:.0f})"


def ratio(other: dict, ours: dict) -> float | str:
    """A text for a reader that failed or is not installed."""
    return other.get("failed") or other["seconds"] / ours["seconds"]


def videos_per_second(path: Path, workers: int, count: int = 60) -> float:
    """The rate of a DataLoader that turns files into `pixel_values_videos`."""
    from torch.utils.data import DataLoader

    loader = DataLoader([str(path)] * count, batch_size=None, num_workers=workers, collate_fn=processor_reader())
    start = time.perf_counter()
    for _ in loader:
        pass
    return count / (time.perf_counter() - start)


# Making the videos


def make_videos(folder: Path) -> dict[str, Path]:
    """{description: path}. Existing files are kept."""
    minute = encode(folder / "720p_1min.mp4", "libx264", 1280, 720, 60, H264)
    vp9 = encode(folder / "720p_vp9_10s.webm", "libvpx-vp9", 1280, 720, 10, VP9)
    return {
        "720p h264, 10 s": encode(folder / "720p_10s.mp4", "libx264", 1280, 720, 10, H264),
        "720p h264, 1 min": minute,
        "720p h264, 5 min": repeat(minute, folder / "720p_5min.mp4", 5),
        "720p h264, 30 min": repeat(minute, folder / "720p_30min.mp4", 30),
        "1080p h264, 20 s": encode(folder / "1080p_20s.mp4", "libx264", 1920, 1080, 20, H264),
        "720p vp9, 1 min": repeat(vp9, folder / "720p_vp9_1min.webm", 6),
    }


def encode(path: Path, codec: str, width: int, height: int, seconds: int, options: dict[str, str]) -> Path:
    """Encodes a moving pattern with one slice per frame and a key frame every 250 frames."""
    if path.exists():
        return path
    pattern = drifting_pattern(width, height)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = width, height, "yuv420p", 250
        stream.codec_context.thread_type = "FRAME"
        for number in range(seconds * RATE):
            left, top = (
                round(half * (1 + np.sin(number / 97 * speed))) for half, speed in ((width / 2, 1), (height / 2, 2))
            )
            picture = np.ascontiguousarray(pattern[top : top + height, left : left + width])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def drifting_pattern(width: int, height: int) -> np.ndarray:
    """(2·height, 2·width, 3) uint8: waves and grain."""
    y, x = np.mgrid[0 : 2 * height, 0 : 2 * width]
    waves = [np.sin(x / 37) * 60 + np.sin(y / 23) * 60, np.cos(x / 53 + y / 91) * 90, np.sin((x + y) / 71) * 100]
    grain = np.random.default_rng(0).normal(0, 8, (2 * height, 2 * width, 1))
    return (np.stack(waves, axis=-1) + 128 + grain).clip(0, 255).astype(np.uint8)


def repeat(source: Path, path: Path, times: int) -> Path:
    """Writes the packets of `source` `times` times."""
    if path.exists():
        return path
    with av.open(str(source)) as container, av.open(str(path), "w") as longer:
        stream = container.streams.video[0]
        copy = longer.add_stream_from_template(stream)
        packets = [packet for packet in container.demux(stream) if packet.size]
        length = round(len(packets) / RATE / stream.time_base)
        for turn in range(times):
            for packet in packets:
                again = av.Packet(bytes(packet))
                dts = packet.pts if packet.dts is None else packet.dts
                again.pts, again.dts = packet.pts + turn * length, dts + turn * length
                again.duration, again.time_base = packet.duration, packet.time_base
                again.is_keyframe, again.stream = packet.is_keyframe, copy
                longer.mux(again)
    return path


if __name__ == "__main__":
    main()
