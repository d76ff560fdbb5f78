"""A worker process decodes: a crash, a hang or a bomb is an error there, and nothing is left of it."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from helpers.video_files import VideoSpec, read_number
from video_panda_hf.decoding import (
    CorruptVideoError,
    DecodeLimits,
    NotAVideoError,
    VideoDecodeError,
    VideoDecodeWarning,
    VideoFrameError,
    VideoLimitError,
    VideoNotFoundError,
    decode_image,
    decode_picture,
    decode_video,
    isolation,
    worker,
)
from video_panda_hf.processing import VideoPandaVideoProcessor


pytestmark = pytest.mark.skipif(os.name != "posix", reason="workers need Linux or macOS")
ISOLATED = DecodeLimits(isolate=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return VideoSpec("clip.mp4", "libx264").write(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def workers(monkeypatch) -> list:
    """The workers that are started from here on. There are none before."""
    isolation._pool.end()
    started = []

    class Noted(isolation.Worker):
        def __init__(self):
            super().__init__()
            started.append(self)

    monkeypatch.setattr(isolation, "Worker", Noted)
    return started


def test_any_source_is_read_in_a_worker_that_is_kept(clip, workers):
    expected, metadata = decode_video(clip, indices=[40, 3, 3])
    sources = [clip, str(clip), clip.read_bytes(), memoryview(clip.read_bytes()), io.BytesIO(clip.read_bytes())]
    with open(clip, "rb") as file:
        file.seek(10)
        for source in [*sources, file]:
            frames, found = decode_video(source, indices=[40, 3, 3], isolate=True)
            np.testing.assert_array_equal(frames, expected)
            assert found == metadata and frames.flags.writeable
        assert file.tell() == 10
    assert len(workers) == 1
    maps = Path(f"/proc/{workers[0].process.pid}/maps")
    if maps.exists():
        assert "libtorch" not in maps.read_text()  # which would take seconds and a lot of memory


def test_windows_pictures_and_the_processor_are_isolated_too(clip, workers, tmp_path):
    for how in ({"start": 0.31, "end": 1.05}, {"pixels": "displayed"}, {"limits": ISOLATED, "isolate": None}):
        frames, metadata = decode_video(clip, **{"isolate": True, **how})
        expected, found = decode_video(clip, **{key: how[key] for key in how if key not in ("limits", "isolate")})
        np.testing.assert_array_equal(frames, expected)
        assert metadata == found
    Image.fromarray(expected[0]).save(tmp_path / "9.png")
    pictures = decode_picture(tmp_path / "9.png", ISOLATED), decode_image(tmp_path / "9.png", ISOLATED)[0]
    folder, _ = decode_video(tmp_path, isolate=True)
    for picture in (*pictures, folder):
        np.testing.assert_array_equal(picture[0], expected[0])
    assert len(workers) == 1 and workers[0].videos == 6
    VideoPandaVideoProcessor(decode_limits={"isolate": True})([str(clip), str(tmp_path / "9.png")])
    assert workers[0].videos == 8
    VideoPandaVideoProcessor()([str(clip)])
    assert workers[0].videos == 8


def test_errors_and_warnings_are_those_of_plain_decoding(clip, workers, tmp_path):
    cut = clip.read_bytes()[:-2000]
    (tmp_path / "words.mp4").write_bytes(b"words " * 100)
    for source, error in ((b"", NotAVideoError), (tmp_path / "words.mp4", NotAVideoError), (7, TypeError)):
        with pytest.raises(error):
            decode_video(source, isolate=True)
    with pytest.raises(VideoNotFoundError, match=r"absent\.mp4.*no such file"):
        decode_video("absent.mp4", isolate=True)
    with pytest.raises(VideoFrameError, match="frame 48 was asked for"):
        decode_video(clip, indices=[48], isolate=True)
    with pytest.raises(ZeroDivisionError):
        decode_video(clip, lambda _: 1 // 0, isolate=True)
    with pytest.raises(VideoLimitError, match="max_side"):
        decode_video(clip, limits=DecodeLimits(max_side=10), isolate=True)
    damaged = VideoSpec("clip.mkv", "libx264").write(tmp_path).read_bytes()
    damaged = damaged[: len(damaged) * 8 // 10]
    with pytest.raises(CorruptVideoError) as plain:
        decode_video(damaged)
    with pytest.raises(CorruptVideoError) as isolated:
        decode_video(damaged, isolate=True)
    assert str(plain.value) == str(isolated.value)
    with pytest.warns(VideoDecodeWarning):
        frames, _ = decode_video(damaged, strict=False, isolate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoDecodeWarning)
        np.testing.assert_array_equal(frames, decode_video(damaged, strict=False)[0])
    with pytest.raises(VideoDecodeError):
        decode_video(cut, isolate=True)
    assert len(workers) == 1


@pytest.mark.parametrize("when", ["sampling", "idle"])
def test_a_crash_is_an_error_that_names_the_file(when, clip, workers):
    def crash(_=None):
        workers[0].process.send_signal(signal.SIGSEGV)
        return [0]

    if when == "sampling":
        with pytest.raises(CorruptVideoError, match=r"clip\.mp4': the worker process .*signal 11"):
            decode_video(clip, crash, isolate=True)
    else:
        decode_video(clip, isolate=True)
        crash()
        workers[0].process.wait()
    assert read_number(decode_video(clip, indices=[7], isolate=True)[0][0]) == 7
    assert len(workers) == 2 and workers[0].process.returncode == -signal.SIGSEGV


def test_a_hang_ends_soon_after_the_time_limit(clip, workers, monkeypatch):
    monkeypatch.setattr(isolation, "GRACE", 0.3)

    def hang(_):
        workers[-1].process.send_signal(signal.SIGSTOP)
        return [0]

    decode_video(clip, isolate=True)
    start = time.monotonic()
    with pytest.raises(VideoLimitError, match=r"clip\.mp4': its worker process did not answer .* 0\.5 s"):
        decode_video(clip, hang, limits=DecodeLimits(max_seconds=0.5), isolate=True)
    assert 0.5 < time.monotonic() - start < 5
    assert workers[0].process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the memory of a process")
@pytest.mark.parametrize("threads", [1, 4])
def test_a_bomb_is_an_error_and_the_worker_goes_on(threads, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "decoding_threads", lambda: threads)
    large = VideoSpec("large.mkv", "ffv1", width=2048, height=2048, frames=4).write(tmp_path)
    with pytest.raises(VideoLimitError, match=r"large\.mkv': needs more"):
        decode_video(large, limits=DecodeLimits(max_memory_bytes=2**20), isolate=True)
    frames, _ = decode_video(large, isolate=True)
    assert [read_number(frame) for frame in frames] == [0, 1, 2, 3]
    assert len(workers) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is looked up in Linux's /proc")
def test_memory_is_that_of_the_answer_and_a_few_frames(clip, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "decoding_threads", lambda: 2)
    size = {"width": 1024, "height": 1024, "frames": 60, "gop": 60}
    large = VideoSpec("large.mp4", "libx264", options={"preset": "ultrafast"}, **size).write(tmp_path)
    decode_video(clip, isolate=True)

    def peak() -> int:
        return int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{workers[0].process.pid}/status").read_text())[1]) * 1024

    before = peak()
    frames, _ = decode_video(large, isolate=True)
    assert frames.nbytes == 60 * 1024 * 1024 * 3
    assert peak() - before - frames.nbytes < 32 * 1024 * 1024 * 3 // 2  # the 60 as decoded would be 94 MB more


def test_kept_memory_has_the_frames_of_its_video_only(clip, workers, tmp_path, monkeypatch):
    """Whether it is reused, too small, too large to be kept, or of a reading that failed."""
    wide = VideoSpec("wide.mkv", "ffv1", width=512, height=512, frames=4).write(tmp_path)
    damaged = VideoSpec("damaged.mkv", "ffv1", width=512, height=512, frames=4, gop=1).write(tmp_path)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    damaged.write_bytes(data)
    monkeypatch.setattr(isolation, "KEPT_BYTES", 3 * 512 * 512 * 3)
    monkeypatch.setattr(isolation, "VIDEOS_OF_A_WORKER", 10**6)
    found, whole = [], [0, 1, 2, 3]
    for video, indices in [(clip, [3]), (clip, [4, 5]), (wide, [1, 2]), (clip, [6]), (wide, whole), (clip, [7])]:
        found.append((video, indices, decode_video(video, indices=indices, isolate=True)[0]))
        with pytest.raises(VideoDecodeError):
            decode_video(damaged, isolate=True)
    for video, indices, frames in found:
        assert [read_number(frame) for frame in frames] == indices
        assert (frames == decode_video(video, indices=indices)[0]).all()
    assert len(workers) == 1


def test_threads_have_a_worker_each_and_few_are_kept(clip, workers, monkeypatch):
    monkeypatch.setattr(isolation, "IDLE_WORKERS", 1)
    together, found = threading.Barrier(3), []

    def sample(_):
        together.wait(30)
        return [5]

    def read():
        found.append(read_number(decode_video(clip, sample, isolate=True)[0][0]))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [5, 5, 5] and len(workers) == 3
    assert [worker.process.poll() for worker in workers].count(None) == 1


class Numbers:
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 4

    def __getitem__(self, item):
        return read_number(decode_video(self.path, indices=[item], isolate=True)[0][0])


def test_data_loader_workers_have_workers_of_their_own(clip, workers):
    decode_video(clip, isolate=True)  # the parent's must not be used after the fork
    loader = DataLoader(Numbers(clip), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120)
    assert list(loader) == [0, 1, 2, 3]
    assert read_number(decode_video(clip, indices=[9], isolate=True)[0][0]) == 9
    assert len(workers) == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in Linux's /proc")
@pytest.mark.parametrize("ends", ["by itself", "by a kill"])
def test_no_worker_outlives_a_script(ends, clip):
    """One worker is idle, the other one decodes. The script does without `if __name__ == "__main__"`."""
    script = f"""
        import os, signal
        from video_panda_hf.decoding import decode_video, isolation
        workers = [isolation.Worker(), isolation.Worker()]
        for worker in workers:
            isolation._pool.give_back(worker)
        print(*(worker.process.pid for worker in workers), flush=True)
        def sample(metadata):
            if {ends == "by a kill"}:
                os.kill(os.getpid(), signal.SIGKILL)
            return [3]
        assert decode_video({str(clip)!r}, sample, isolate=True)[0].shape[0] == 1
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == (0 if ends == "by itself" else -signal.SIGKILL), done.stderr[-2000:]
    processes = [Path(f"/proc/{number}/stat") for number in done.stdout.split()]
    deadline = time.monotonic() + 10
    while any(map(runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(processes) == 2 and not any(map(runs, processes))


def runs(process: Path) -> bool:
    try:
        return ") Z " not in process.read_text()
    except OSError:
        return False


def test_many_videos_leave_no_descriptor_open(clip, workers):
    def held() -> int:
        return len(os.listdir("/dev/fd"))

    decode_video(clip, isolate=True)
    before = held()
    for number in range(50):
        source = [clip, b"nothing", clip.read_bytes(), io.BytesIO(clip.read_bytes())][number % 4]
        try:
            decode_video(source, indices=[1], isolate=True)
        except NotAVideoError:
            assert source == b"nothing"
    assert held() <= before and len(workers) == 1


@pytest.mark.parametrize("answer", [{}, {"count": "many"}, {"count": 3, "duration": [], "size": [1]}])
def test_a_worker_that_says_something_else_is_ended(clip, workers, answer, monkeypatch):
    monkeypatch.setattr(isolation.Channel, "receive", lambda *_: (answer, b""))
    with pytest.raises(VideoDecodeError, match=r"clip\.mp4.*worker process"):
        decode_video(clip, limits=ISOLATED)
    monkeypatch.undo()
    assert len(decode_video(clip, limits=ISOLATED)[0]) == 48


TAKEN_OVER = """
import json, os, socket, struct, sys, time
_, _, channel, _ = json.loads(sys.argv[1])
sock = socket.socket(fileno=channel)
def get():
    text, data = struct.unpack(">II", sock.recv(8, socket.MSG_WAITALL))
    return json.loads(sock.recv(text, socket.MSG_WAITALL))
def say(text, data=b""):
    sock.sendall(struct.pack(">II", len(text), len(data)) + text.encode() + data)
def facts(count="3", duration="1", size="[2, 2]", times=b""):
    say('{"count": %s, "duration": %s, "size": %s, "is_picture": false}' % (count, duration, size), times)
get()
"""
SAID = {
    "a number": "say('5')",
    "deep JSON": "say('[' * 10**6)",
    "a long text": "say('[' + '[],' * 2**21 + '0]')",
    "a long message": "sock.sendall(struct.pack('>II', 10, 2**32 - 1))",
    "an endless duration": "facts(duration='1e999')",
    "a duration that is none": "facts(duration='NaN')",
    "a count of 10^12": "facts(count='9' * 12)",
    "a count of infinity": "facts(count='1e999')",
    "no frame": "facts(count='0')",
    "a negative size": "facts(size='[-2, 2]')",
    "too few times": "facts(times=bytes(8))",
    "times that are none": "facts(times=bytes([255]) * 24)",
    "warnings that are none": "facts(); get(); sock.recv(1); say('{\"warnings\": 5}')",
    "an answer that is none": "facts(); get(); sock.recv(1); say('[]')",
    "a reading of nothing": "say('{\"read\": 5}'); get()",
    "endless readings": "while True: say('{\"read\": [0, 1]}'); get()",
    "a byte at a time": "while True: sock.sendall(bytes([0, 0, 1, 0])); time.sleep(0.1)",
}


@pytest.mark.parametrize("said", SAID)
def test_a_worker_that_was_taken_over_gets_an_error_only(said, clip, workers, monkeypatch):
    monkeypatch.setattr(isolation, "GRACE", 0.1)
    monkeypatch.setattr(isolation, "_START", TAKEN_OVER + SAID[said])
    with pytest.raises(VideoDecodeError, match=r"clip\.mp4"):
        decode_video(clip, limits=DecodeLimits(max_seconds=1), isolate=True)
    monkeypatch.undo()
    isolation._pool.end()
    assert len(decode_video(clip, isolate=True)[0]) == 48


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux seals memory")
def test_a_worker_cannot_take_back_the_memory_it_shares(clip, workers, monkeypatch):
    """The parent would die of it by SIGBUS."""
    cut = """
facts()
get()
memory = socket.recv_fds(sock, 1, 1)[1][0]
try:
    os.ftruncate(memory, 0)
    say('{"warnings": ["cut"]}')
except PermissionError:
    say('{"warnings": ["refused"]}')
get()
"""
    monkeypatch.setattr(isolation, "_START", TAKEN_OVER + cut)
    with pytest.warns(VideoDecodeWarning, match="refused"):
        frames, _ = decode_video(clip, indices=[1], isolate=True)
    assert frames.sum() == 0
    isolation._pool.end()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the memory of a process")
def test_kept_memory_is_not_taken_from_the_next_video(clip, workers, tmp_path):
    size = {"width": 1024, "height": 1024, "frames": 20, "gop": 10}
    large = VideoSpec("large.mp4", "libx264", options={"preset": "ultrafast"}, **size).write(tmp_path)
    assert decode_video(large, isolate=True)[0].nbytes < worker.KEPT_BYTES
    frames, _ = decode_video(large, indices=[15], limits=DecodeLimits(max_memory_bytes=48 * 2**20), isolate=True)
    assert read_number(frames[0]) == 15 and len(workers) == 1


def test_bytes_that_are_too_long_for_a_message_are_read_in_parts(clip, workers, monkeypatch):
    data = clip.read_bytes()
    expected, _ = decode_video(clip)
    monkeypatch.setattr(isolation, "LONGEST", 1000)
    for source in (data, io.BytesIO(data), "data:video/mp4;base64," + base64.b64encode(data).decode()):
        np.testing.assert_array_equal(decode_video(source, isolate=True)[0], expected)
    assert len(workers) == 1


def test_a_worker_that_stopped_while_it_was_idle_is_replaced(clip, workers, monkeypatch):
    """It does not read what is sent to it, and a long message does not fit into the pipe."""
    monkeypatch.setattr(isolation, "GRACE", 2)
    decode_video(clip, isolate=True)
    workers[0].process.send_signal(signal.SIGSTOP)
    data = clip.read_bytes() + bytes(2**22)
    frames, _ = decode_video(data, indices=[5], limits=DecodeLimits(max_seconds=1), isolate=True)
    assert read_number(frames[0]) == 5 and len(workers) == 2
