"""Broken, hostile and odd sources end in frames or in a `VideoDecodeError`, within bounds, and leave nothing open."""

import contextlib
import gc
import io
import json
import os
import resource
import signal
import struct
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import av.logging
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from helpers.video_files import VideoSpec, read_number
from video_panda_hf.decoding import groups, http, readers
from video_panda_hf.decoding.errors import (
    Budget,
    CorruptVideoError,
    DecodeLimits,
    NotAVideoError,
    VideoDecodeError,
    VideoDecodeWarning,
    VideoLimitError,
    VideoNetworkError,
    VideoNotFoundError,
    VideoUnreadableError,
)
from video_panda_hf.decoding.sources import demux
from video_panda_hf.decoding.video import decode_video
from video_panda_hf.processing import VideoPandaVideoProcessor


SPECS = [
    VideoSpec("h264.mp4", "libx264"),
    VideoSpec("fast_start.mp4", "libx264", muxing={"movflags": "faststart"}),
    VideoSpec("fragmented.mp4", "libx264", muxing={"movflags": "frag_keyframe+empty_moov"}),
    VideoSpec("h264.mkv", "libx264"),
    VideoSpec("h264.ts", "libx264"),
    VideoSpec("h264.flv", "libx264"),
    VideoSpec("h264.h264", "libx264"),
    VideoSpec("hevc.mp4", "libx265", options={"x265-params": "log-level=none:pools=1"}),
    VideoSpec("vp8.webm", "libvpx", options={"deadline": "realtime", "cpu-used": "8"}),
    VideoSpec("vp9.webm", "libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    VideoSpec("vp9.ivf", "libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    VideoSpec("av1.mp4", "libsvtav1", options={"preset": "10"}),
    VideoSpec("mpeg4.avi", "mpeg4", b_frames=2),
    VideoSpec("mpeg2.mpg", "mpeg2video", container="vob", b_frames=2),
    VideoSpec("mjpeg.mov", "mjpeg", pix_fmt="yuvj420p"),
    VideoSpec("gif.gif", "gif", pix_fmt="rgb8"),
    VideoSpec("webp.webp", "libwebp_anim", container="webp", pix_fmt="bgra"),
]
MUTANTS_PER_FILE = 60
SECONDS_PER_VIDEO = 5
HEADROOM = 1 << 30  # bytes that decoding a hostile video may add to the address space


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for spec in SPECS:
        spec.write(folder)
    return folder


# Damage: in a process of its own, with bounds on its memory and on the time of each video


@pytest.mark.slow
def test_truncation_and_byte_flips_give_frames_or_the_documented_error(forks, folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = forks.run([__file__, folder], env=environment)
    assert done.returncode == 0, f"ended with {done.returncode} at {done.stdout[-300:]} {done.stderr[-2000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["mutants"] == MUTANTS_PER_FILE * len(SPECS) >= 500
    assert report["truncated"] == 9 * len(SPECS)
    assert report["undocumented"] == []
    assert report["slowest"] < SECONDS_PER_VIDEO
    assert report["outcomes"]["CorruptVideoError"] > 100 and report["outcomes"]["frames"] > 100


def damage_everything(folder: Path) -> dict:
    """Decodes damaged copies of the videos in `folder` and reports the outcomes to the test above."""
    report = {"mutants": 0, "truncated": 0, "undocumented": [], "slowest": 0.0}
    outcomes = Counter()
    readers.WORTH_A_DECODER = 1  # so that several decoders share the work, whenever there are several threads
    warnings.simplefilter("ignore", VideoDecodeWarning)
    av.logging.set_level(None)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, used + HEADROOM))
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        damaged = [(f"first {tenth} tenths", data[: len(data) * tenth // 10]) for tenth in range(1, 10)]
        damaged += [(f"mutant {seed}", flip_bytes(data, seed)) for seed in range(MUTANTS_PER_FILE)]
        for number, (name, video) in enumerate(damaged):
            print(path.name, name, flush=True)  # the last line tells which video ended the process
            readers.decoding_threads = lambda number=number: 1 + number % 3
            signal.alarm(2 * SECONDS_PER_VIDEO)
            start = time.monotonic()
            try:
                frames, _ = decode_video(video, eight_frames, strict=number % 2 == 0)
                outcome = "frames" if frames.ndim == 4 and len(frames) else "an empty answer"
            except VideoDecodeError as error:
                outcome = type(error).__name__
            except Exception as error:
                outcome = repr(error)
                report["undocumented"].append(f"{path.name}, {name}: {outcome}")
            signal.alarm(0)
            report["slowest"] = max(report["slowest"], time.monotonic() - start)
            report["mutants" if name.startswith("mutant") else "truncated"] += 1
            outcomes[outcome] += 1
    return report | {"outcomes": outcomes}


def flip_bytes(data: bytes, seed: int) -> bytes:
    """`data` with 1 to 10 random bytes replaced, half of the time only in the first 500, where headers are."""
    random = np.random.default_rng(seed)
    damaged = bytearray(data)
    reach = len(data) if random.integers(2) else min(500, len(data))
    for place in random.integers(0, reach, random.integers(1, 11)):
        damaged[place] = random.integers(256)
    return bytes(damaged)


def eight_frames(metadata):
    return np.linspace(0, metadata.total_num_frames - 1, 8).astype(int)


@pytest.mark.parametrize(
    "name", ["fast_start.mp4", "h264.mkv", "vp9.webm", "h264.flv", "vp9.ivf", "h264.ts", "gif.gif"]
)
def test_a_file_that_is_cut_off_tells_how_many_frames_can_be_had(name, folder):
    data = (folder / name).read_bytes()
    half = data[: len(data) * 8 // 10]
    with pytest.warns(VideoDecodeWarning):
        frames, metadata = decode_video(half, strict=False)
    assert 10 < len(frames) < 48
    # The last frames that are there may need frames that are not.
    assert [read_number(frame) for frame in frames[:-8]] == list(range(len(frames) - 8))
    assert metadata.total_num_frames == len(frames)
    with pytest.raises(CorruptVideoError, match=f"cut off: .* {len(frames)} frames can be had"):
        decode_video(half)


def test_a_damaged_container_ends_there_in_lenient_mode():
    class Packet:
        size = 1

    class DamagedContainer:
        def demux(self, stream):
            yield Packet()
            raise av.error.InvalidDataError(1, "Invalid data found when processing input")

    budget = Budget("a.flv", DecodeLimits(), strict=False)
    assert len(list(demux(DamagedContainer(), None, budget))) == 1
    assert budget.damage == "its container is damaged"
    with pytest.raises(CorruptVideoError, match=r"a\.flv: its container is damaged"):
        list(demux(DamagedContainer(), None, Budget("a.flv", DecodeLimits(), strict=True)))


def damaged_in_the_middle(path: Path) -> bytes:
    """The bytes of a video whose 21st packet is zeros but for its first five bytes."""
    data = bytearray(path.read_bytes())
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    hurt = packets[20]
    place = data.find(bytes(hurt))
    data[place + 5 : place + hurt.size] = bytes(hurt.size - 5)
    return bytes(data)


@pytest.mark.parametrize("name", ["fast_start.mp4", "h264.mkv", "hevc.mp4"])
def test_damage_in_the_middle_is_told_and_can_be_passed_over(name, folder):
    data = damaged_in_the_middle(folder / name)
    with pytest.raises(CorruptVideoError, match=r"damaged|cannot be decoded"):
        decode_video(data)
    with pytest.warns(VideoDecodeWarning):
        frames, _ = decode_video(data, strict=False)
    assert len(frames) == 48
    assert [read_number(frame) for frame in frames[:8]] == list(range(8))
    before, _ = decode_video(data, lambda _: [2, 5])  # damage elsewhere does not matter
    assert [read_number(frame) for frame in before] == [2, 5]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by Linux's /proc")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("is_damaged", [True, False])
def test_no_thread_of_a_decoder_outlives_the_call(is_damaged, strict, tmp_path, monkeypatch):
    """A forked worker has none of its parent's threads: it would wait forever when it frees such a decoder."""
    monkeypatch.setattr(readers, "decoding_threads", lambda: 4)  # with one there is no thread
    open_gop = {"x264-params": "open-gop=1:keyint=12:scenecut=0"}
    options = {"bf": "3", "b-pyramid": "normal", **open_gop}  # frame 29 takes more than one attempt
    path = VideoSpec("open_gop.mp4", "libx264", options=options).write(tmp_path)
    data = damaged_in_the_middle(path) if is_damaged else path.read_bytes()

    def threads():
        return {path.name for path in Path("/proc/self/task").iterdir()}

    gc.collect()
    gc.disable()
    try:
        before, kept = threads(), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VideoDecodeWarning)
            try:
                decode_video(data, lambda _: range(18, 24) if is_damaged else [29], strict=strict)
            except CorruptVideoError as error:
                kept.append(error)
        assert len(kept) == (strict and is_damaged)
        deadline = time.monotonic() + 5  # the system lists a thread for a moment after it has ended
        while not threads() <= before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threads() <= before
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
def test_large_frames_are_decoded_by_fewer_threads(folder, monkeypatch):
    monkeypatch.setattr(readers, "decoding_threads", lambda: 4)
    frame = 96 * 64 * 3

    def threads_with(held: int) -> int:
        monkeypatch.setattr(groups, "HELD_BYTES", held)
        counts = [len(os.listdir("/proc/self/task"))]
        decode_video(folder / "h264.mkv", lambda _: counts.append(len(os.listdir("/proc/self/task"))) or [0])
        return counts[1] - counts[0]

    monkeypatch.setattr(readers, "WORTH_A_DECODER", 10**6)
    assert threads_with(4 * frame) == threads_with(2**30) == 4
    assert threads_with(2 * frame) == 2
    assert threads_with(frame // 2) == 0  # one thread is the caller's


def test_ffmpeg_logs_nothing_while_decoders_live(folder):
    """PyAV holds the GIL while it waits for a decoder's threads to end, and a thread that logs waits for the GIL."""
    seen = []

    def sample(_):
        seen.append(av.logging.get_level())
        if len(seen) < 3:
            decode_video(folder / "h264.mkv", sample)
            seen.append(av.logging.get_level())
        return [0]

    before = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: decode_video(folder / "h264.mkv", sample), range(4)))
        assert av.logging.get_level() == av.logging.ERROR
        with pytest.raises(VideoDecodeError):
            decode_video(folder / "no such file.mp4")
        assert av.logging.get_level() == av.logging.ERROR
    finally:
        av.logging.set_level(before)
    assert seen and set(seen) == {None}


@pytest.mark.parametrize("strict", [True, False])
def test_a_damaged_header_of_the_coding_is_told(strict, folder):
    data = bytearray((folder / "hevc.mp4").read_bytes())
    begin = data.index(b"hvcC") + 4
    data[begin + 23 : begin + 60] = b"\xff" * 37  # the parameter sets
    with pytest.raises(CorruptVideoError, match="header says of the coding"):
        decode_video(bytes(data), strict=strict)


# VP9 with hidden frames, made by FFmpeg (libvpx-vp9, auto-alt-ref) from its test pattern. Its table of key frames was
# overwritten, so that a seek leads to any packet, and some bytes were changed.
NOT_ONLY_KEY_FRAMES = Path(__file__).parents[1] / "data" / "vp9_altref_no_stss_damaged.mp4"
READ_AT_RANDOM = """
import sys, warnings
import numpy as np, torch
from video_panda_hf.decoding.video import decode_video
from video_panda_hf.decoding.index import FrameIndex
warnings.simplefilter("ignore")
path = sys.argv[1]
index_of = FrameIndex.of
FrameIndex.of = lambda pts, dts, is_key, *others: index_of(pts, dts, np.ones_like(is_key), *others)
torch.set_num_threads(1)
everything, _ = decode_video(path, strict=False)
torch.set_num_threads(4)
for seed in range(6):
    wanted = np.random.default_rng(seed).integers(0, len(everything), 8)
    frames, _ = decode_video(path, lambda _: wanted, strict=False)
    assert (frames == everything[wanted]).all(), f"other frames with seed {seed}"
print("the same frames")
"""


@pytest.mark.slow
def test_threads_survive_a_seek_to_what_is_no_key_frame(forks):
    done = forks.run(["-c", READ_AT_RANDOM, NOT_ONLY_KEY_FRAMES], timeout=120)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.endswith("the same frames\n")


# Things that are no video


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty"),
        (b"just some words, and a name that ends in mp4\n" * 50, "not a video"),
        (bytes(100_000), "not a video"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "not a video"),
        (b"ffconcat version 1.0\nfile '/etc/hostname'\n", "not a video"),
        (b"RIFF\x20\0\0\0WEBPVP8 not really a picture", "WebP"),
    ],
)
def test_what_is_no_video_is_called_so(content, message, tmp_path):
    path = tmp_path / "movie.mp4"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(NotAVideoError, match=message):
            decode_video(source)


@pytest.mark.parametrize("name", ["sound.wav", "sound.mp4", "sound.mkv"])
def test_a_file_with_sound_only_has_no_video_stream(name, tmp_path):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le" if name.endswith("wav") else "aac", rate=48000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 96000), dtype=np.int16), format="s16", layout="stereo")
        silence.sample_rate = 48000
        container.mux([*stream.encode(silence), *stream.encode(None)])
    with pytest.raises(NotAVideoError, match=f"{name}.*no video stream.*audio"):
        decode_video(path)


def test_paths_that_lead_nowhere_are_told_apart(tmp_path):
    with pytest.raises(VideoNotFoundError, match=r"absent\.mp4.*no such file") as caught:
        decode_video(tmp_path / "absent.mp4")
    assert isinstance(caught.value, FileNotFoundError) and isinstance(caught.value, ValueError)
    with pytest.raises(VideoUnreadableError, match="is a directory"):
        decode_video(tmp_path)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoUnreadableError, match="pipe"):
        decode_video(tmp_path / "pipe.mp4")


def test_file_objects_that_cannot_be_read_are_told_apart(folder):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError("the disk is on fire")

    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as pipe, open(writing, "wb"):
        with pytest.raises(VideoUnreadableError, match="cannot seek"):
            decode_video(pipe)
    with open(folder / "h264.mp4", "rb") as closed:
        pass
    for source in (closed, Failing(b"data")):
        with pytest.raises(VideoUnreadableError, match=r"closed file|on fire"):
            decode_video(source)
    for source in (None, 7, io.StringIO("text"), [b""]):
        with pytest.raises(TypeError, match=r"a video is a path|a list of pictures has their names"):
            decode_video(source)


# Odd but good


@pytest.mark.parametrize("name", ["title.mp4", "title.mkv", "title.avi"])
def test_metadata_need_not_be_utf8(name, tmp_path):
    path = VideoSpec(name, "mpeg4", frames=5, title="A title in ASCII").write(tmp_path)
    data = path.read_bytes()
    assert data.count(b"A title in ASCII") == 1
    latin = data.replace(b"A title in ASCII", "Ein Titel, schön".encode("latin-1"))
    frames, _ = decode_video(latin)
    assert [read_number(frame) for frame in frames] == [0, 1, 2, 3, 4]


def test_one_frame_is_a_video(tmp_path):
    for name, codec in (("one.mp4", "libx264"), ("one.webm", "libvpx-vp9"), ("one.avi", "mpeg4"), ("one.gif", "gif")):
        pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        frames, metadata = decode_video(VideoSpec(name, codec, frames=1, pix_fmt=pix_fmt).write(tmp_path))
        assert [read_number(frame) for frame in frames] == [0]
        assert metadata.total_num_frames == 1 and metadata.fps > 0 and metadata.duration > 0


@pytest.mark.parametrize("name, codec", [("one.flv", "flv"), ("one.asf", "wmv2"), ("one.mkv", "libx264")])
def test_one_frame_need_not_tell_how_long_it_is_shown(name, codec, tmp_path):
    path = VideoSpec(name, codec, frames=1).write(tmp_path)
    for window in ({}, {"start": 0.0}):
        frames, metadata = decode_video(path, **window)
        assert [read_number(frame) for frame in frames] == [0]
        assert metadata.duration == pytest.approx(0.04, abs=0.01) and metadata.fps == pytest.approx(25, abs=5)


def test_a_header_need_not_tell_the_duration(tmp_path):
    path = VideoSpec("short.mp4", "libx264", frames=12).write(tmp_path)
    data = bytearray(path.read_bytes())
    place = data.index(b"mdhd") + 20  # after the version, the flags, two dates and the ticks of a second
    assert int.from_bytes(data[place - 4 : place], "big") * 12 / 25 == int.from_bytes(data[place : place + 4], "big")
    data[place : place + 4] = bytes(4)
    frames, metadata = decode_video(bytes(data))
    assert [read_number(frame) for frame in frames] == list(range(12))
    assert metadata.duration == pytest.approx(12 / 25) and metadata.fps == pytest.approx(25)


@pytest.mark.parametrize("name, codec", [("pixel.mkv", "ffv1"), ("pixel.webm", "libvpx-vp9"), ("pixel.mp4", "mpeg4")])
def test_one_pixel_is_a_video(name, codec, tmp_path):
    frames, _ = decode_video(VideoSpec(name, codec, frames=5, width=1, height=1).write(tmp_path))
    assert frames.shape == (5, 1, 1, 3)


# Bombs


def gif_of(width: int, height: int) -> bytes:
    """A GIF of 40 bytes that claims to be a picture of any size."""
    size = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    return b"GIF89a" + size + b"\x80\0\0" + b"\0\0\0\xff\xff\xff" + b"," + bytes(4) + size + b"\0\x02\x02\x44\x01\0;"


def vp9_of(width: int, height: int, ivf: bytes) -> bytes:
    """An IVF file whose first VP9 key frame claims another size (bits 36 to 68 of its header)."""
    patched = bytearray(ivf)
    patched[12:16] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    header = int.from_bytes(patched[44:54], "big")
    size = (width - 1) << 16 | (height - 1)
    mask = 0xFFFFFFFF << (80 - 68)
    patched[44:54] = (header & ~mask | size << (80 - 68)).to_bytes(10, "big")
    return bytes(patched)


def test_a_picture_of_16k_by_16k_is_refused_before_it_is_decoded(folder):
    assert decode_video(vp9_of(96, 64, (folder / "vp9.ivf").read_bytes()))[1].width == 96
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in (gif_of(16384, 16384), vp9_of(16384, 16384, (folder / "vp9.ivf").read_bytes())):
        for strict in (True, False):
            with pytest.raises(VideoDecodeError):
                decode_video(bomb, strict=strict)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kB


def box(kind: bytes, *numbers: int) -> bytes:
    return struct.pack(f">I4s{len(numbers)}I", 8 + 4 * len(numbers), kind, *numbers)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("where", ["track", "fragment"])
def test_a_table_of_more_packets_than_the_file_holds_is_refused(where, strict, folder):
    """FFmpeg would take 32 bytes for each, 2 GB in all."""
    data = (folder / ("h264.mp4" if where == "track" else "fragmented.mp4")).read_bytes()
    name, fields = (b"stsz", (0, 1, 60_000_000)) if where == "track" else (b"trun", (1, 60_000_000, 0))
    begin = data.index(name) - 4
    size = int.from_bytes(data[begin : begin + 4], "big")
    table = box(name, *fields)
    bomb = data[:begin] + table + box(b"free", *[0] * ((size - len(table) - 8) // 4)) + data[begin + size :]
    assert len(bomb) == len(data)
    start = time.monotonic()
    with pytest.raises(CorruptVideoError, match=r"lists 6\d{7} packets"):
        decode_video(bomb, strict=strict)
    assert time.monotonic() - start < 2


def test_a_chunk_of_more_packets_than_there_are_is_the_packets(folder):
    """FFmpeg counts by the sizes of the packets, so it takes no memory for what `stsc` claims."""
    data = (folder / "h264.mp4").read_bytes()
    place = data.index(b"stsc") + 16  # the packets in each chunk from the first one on
    claiming = data[:place] + struct.pack(">I", 60_000_000) + data[place + 4 :]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        frames, _ = decode_video(claiming)
    except CorruptVideoError:
        frames = None
    assert frames is None or (frames == decode_video(data)[0]).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kB


def box_of(kind: bytes, *inside: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, inside)), kind) + b"".join(inside)


@pytest.mark.parametrize("where", ["behind another", "beside the others", "compressed", "compressed twice", "a bomb"])
def test_such_a_table_is_found_wherever_ffmpeg_reads_it(where, folder):
    data = (folder / "h264.mp4").read_bytes()
    begin, table = data.index(b"moov") - 4, data.index(b"stsz") + 4
    bomb = data[:table] + struct.pack(">III", 0, 1, 60_000_000) + data[table + 12 :]
    size = int.from_bytes(data[begin : begin + 4], "big")
    moov, rest = bomb[begin : begin + size], data[:begin] + data[begin + size :]

    def compressed(tables: bytes) -> bytes:
        packed = struct.pack(">I", len(tables)) + zlib.compress(tables, 9)
        return box_of(b"moov", box_of(b"cmov", box_of(b"dcom", b"zlib"), box_of(b"cmvd", packed)))

    track = moov[moov.index(b"trak") - 4 :]
    video = {
        "behind another": box_of(b"junk", b"junk") + rest + moov,
        "beside the others": track[: int.from_bytes(track[:4], "big")] + data,
        "compressed": rest + compressed(moov),
        "compressed twice": rest + compressed(compressed(moov)),
        "a bomb": rest + compressed(bytes(10**8)),
    }[where]
    with pytest.raises(CorruptVideoError, match=r"lists 6\d{7} packets|tables are compressed"):
        decode_video(video)
    assert data.index(b"mdat") < begin  # so the packets stay where they are
    good = data[:begin] + compressed(data[begin : begin + size])
    np.testing.assert_array_equal(decode_video(good)[0], decode_video(data)[0])


def test_more_frames_than_memory_holds_are_refused(folder):
    with pytest.raises(VideoLimitError, match="max_output_bytes"):
        decode_video(folder / "h264.mp4", lambda _: [0] * 90_000, limits=DecodeLimits(max_output_bytes=2**30))
    assert 8 < DecodeLimits().max_output_bytes / (7680 * 4320 * 3) < 32  # frames of 8K
    with pytest.raises(VideoLimitError, match="max_frames"):
        decode_video(folder / "h264.mp4", lambda _: [0] * 1_000_000)


# The net, on the loopback interface


class Server(BaseHTTPRequestHandler):
    """Serves /range/FILE and /plain/FILE, and behaves badly at the other paths."""

    folder: Path
    patience = threading.Event()

    def do_GET(self):
        kind, _, name = self.path.strip("/").partition("/")
        with contextlib.suppress(ConnectionError):
            getattr(self, kind, self.missing)(name)

    def range(self, name):
        data = (self.folder / name).read_bytes()
        first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.start(206, len(data) - first, **{"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"})
        self.wfile.write(data[first:])

    def plain(self, name):
        data = (self.folder / name).read_bytes()
        self.start(200, len(data))
        self.wfile.write(data)

    def huge(self, name):
        self.start(200, 10**12)

    def endless(self, name):
        self.start(200)
        for _ in range(10_000):
            self.wfile.write(bytes(2**16))

    def silent(self, name):
        self.patience.wait(30)

    def stalling(self, name):
        data = (self.folder / name).read_bytes()
        self.start(206, len(data), **{"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"})
        self.wfile.write(data[:1000])
        self.wfile.flush()
        self.patience.wait(30)

    def dripping(self, name):
        self.start(200, 10**6)
        for _ in range(1000):
            self.wfile.write(b"x")
            self.wfile.flush()
            if self.patience.wait(0.05):
                break

    def unfinished(self, name):
        """Headers that never end: byte by byte, line by line, or as endless "100 Continue" answers."""
        piece = {"bytes": b"x", "lines": b"x: y\r\n", "continue": b"HTTP/1.1 100 Continue\r\n\r\n"}[name]
        self.wfile.write(b"" if name == "continue" else b"HTTP/1.1 200 OK\r\nx: ")
        while not self.patience.wait(0 if name == "continue" else 0.1):
            self.wfile.write(piece)
            self.wfile.flush()

    def closing(self, name):
        """Promises the file, by ranges or as a whole, and closes the connection after three fifths."""
        kind, name = name.split("/")
        data = (self.folder / name).read_bytes()
        first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if kind == "range" else 0
        ranges = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if kind == "range" else {}
        self.start(206 if kind == "range" else 200, len(data) - first, **ranges)
        self.wfile.write(data[first : len(data) * 3 // 5])

    def odd(self, name):
        """Headers without information, or for another range than requested."""
        kind, name = name.split("/")
        data = (self.folder / name).read_bytes()
        later = self.headers["Range"] != "bytes=0-"
        if kind == "length":
            self.send_response(200)
            self.send_header("Content-Length", "abc")
            self.end_headers()
        elif kind == "whole" and later:
            self.start(200, len(data))
        else:
            total = {"star": "*", "none": "", "whole": len(data)}[kind]
            self.start(206, len(data), **({"Content-Range": f"bytes 0-{len(data) - 1}/{total}"} if total else {}))
        self.wfile.write(data)

    def chunks(self, name):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not self.patience.wait(0.1):
            self.wfile.write(b"0")
            self.wfile.flush()

    def elsewhere(self, name):
        self.send_response(302)
        self.send_header("Location", "file:///etc/hostname" if name == "file" else f"/range/{name}")
        self.end_headers()

    def missing(self, name):
        self.send_error(404)

    def start(self, status, length=None, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url(folder):
    Server.folder = folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Server.patience.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["range", "plain", "elsewhere"])
@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "mpeg4.avi", "webp.webp"])
def test_a_url_gives_the_frames_of_its_file(kind, name, folder, url):
    frames, metadata = decode_video(f"{url}/{kind}/{name}", lambda _: [40, 3])
    np.testing.assert_array_equal(frames, decode_video(folder / name, lambda _: [40, 3])[0])
    assert metadata.total_num_frames == 48


@pytest.mark.parametrize(
    "path, error, message",
    [
        ("silent", VideoNetworkError, "timed out"),
        ("stalling/h264.mp4", VideoNetworkError, "timed out"),
        ("nothing", VideoNetworkError, "404"),
        ("elsewhere/file", VideoNetworkError, "did not deliver"),
        ("huge", VideoLimitError, "max_url_bytes"),
        ("endless", VideoLimitError, "max_url_bytes"),
        ("dripping", VideoLimitError, "max_seconds"),
    ],
)
def test_a_bad_server_is_left_within_the_time_limit(path, error, message, url):
    start = time.monotonic()
    with pytest.raises(error, match=message):
        decode_video(f"{url}/{path}", limits=DecodeLimits(url_timeout=0.5, max_seconds=1.0, max_url_bytes=2**22))
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("path", ["unfinished/bytes", "unfinished/lines", "unfinished/continue", "chunks", "silent"])
def test_the_time_limits_hold_before_a_server_has_answered(path, url):
    start = time.monotonic()
    with pytest.raises(VideoLimitError, match="max_seconds"):
        decode_video(f"{url}/{path}", limits=DecodeLimits(max_seconds=1.0))
    assert 0.9 < time.monotonic() - start < 10
    if path != "chunks":
        with pytest.raises(VideoNetworkError, match="timed out"):
            decode_video(f"{url}/{path}", limits=DecodeLimits(url_timeout=0.5))
        assert time.monotonic() - start < 20


@pytest.mark.parametrize("path", ["range/h264.mkv", "plain/h264.mkv", "range/h264.mp4", "plain/h264.mp4"])
def test_a_connection_that_closes_early_is_an_error(path, url):
    with pytest.raises(VideoNetworkError, match="closed the connection after"):
        decode_video(f"{url}/closing/{path}")


@pytest.mark.parametrize("kind", ["star", "none"])
def test_ranges_that_say_nothing_are_an_error(kind, url):
    with pytest.raises(VideoNetworkError, match="Content-Range"):
        decode_video(f"{url}/odd/{kind}/h264.mp4")


def test_a_later_answer_with_the_whole_file_is_not_taken_for_a_part_of_it(url, monkeypatch):
    monkeypatch.setattr(http, "_WORTH_A_REQUEST", 0)
    with http.HttpFile(f"{url}/odd/whole/h264.mp4", Budget("clip", DecodeLimits())) as file:
        file.read(10)
        file.seek(1000)
        for _ in range(2):
            with pytest.raises(VideoNetworkError, match="another part of the file"):
                file.read(10)


def test_a_length_that_is_no_number_does_not_matter(folder, url):
    frames, _ = decode_video(f"{url}/odd/length/h264.mp4")
    np.testing.assert_array_equal(frames, decode_video(folder / "h264.mp4")[0])


@pytest.mark.parametrize(
    "source",
    ["http://[::1/clip.mp4", "clip\0.mp4", "clip\0.png", "data:video/mp4;base64,Bä==", "http://[::1/photo.png"],
    ids=["address", "path", "picture", "base64", "address of a picture"],
)
def test_names_that_cannot_be_are_the_documented_error(source):
    with pytest.raises(VideoDecodeError):
        decode_video(source)
    with pytest.raises(VideoDecodeError):
        VideoPandaVideoProcessor()([source])


def test_a_picture_with_too_much_text_is_the_documented_error(tmp_path):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "notes.png", pnginfo=notes)
    with pytest.raises(VideoDecodeError):
        VideoPandaVideoProcessor()([tmp_path / "notes.png"])


def test_other_kinds_of_url_are_refused():
    for other in ("ftp://127.0.0.1/a.mp4", "file:///etc/hostname", "concat://a|b", "rtsp://127.0.0.1/a"):
        with pytest.raises(VideoNetworkError, match="only http and https"):
            decode_video(other)
    with pytest.raises(VideoNetworkError, match="refused"):
        decode_video("http://127.0.0.1:1/a.mp4")


def test_a_url_that_holds_the_video_must_be_base64():
    for url in ("data:video/mp4,AAAA", "data:video/mp4;base64,A?A", "data:video/mp4;base64,AAA"):
        with pytest.raises(VideoUnreadableError, match=f"in a URL of {len(url)} characters.* base64"):
            decode_video(url)
    with pytest.raises(NotAVideoError, match="is empty"):
        decode_video("data:video/mp4;base64,")
    with pytest.raises(VideoLimitError, match="max_source_bytes"):
        decode_video("data:video/mp4;base64," + "A" * 4000, limits=DecodeLimits(max_source_bytes=1000))


# Nothing is left behind


def test_a_thousand_opens_leave_no_file_and_no_thread_open(folder):
    whole = (folder / "h264.mp4").read_bytes()
    sources = [folder / "h264.mp4", whole, whole[:-100], folder / "mpeg4.avi", folder / "webp.webp", b"no video"]
    sources += [folder / "h264.mkv", folder / "absent.mp4", whole.replace(b"avc1", b"none")]

    def open_once(number: int) -> None:
        with contextlib.suppress(VideoDecodeError):
            decode_video(sources[number % len(sources)], lambda _: [1])

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    for number in range(20):
        open_once(number)
    before = held()
    for number in range(1000):
        open_once(number)
    assert all(after <= first for after, first in zip(held(), before, strict=True))


if __name__ == "__main__":
    print(json.dumps(damage_everything(Path(sys.argv[1]))))
