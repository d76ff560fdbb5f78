"""Readers whose decoding happens in a worker process, so that a crash, a hang or a bomb is an error there."""

import atexit
import json
import math
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import errors
from .errors import Budget, CorruptVideoError, VideoDecodeError, VideoDecodeWarning, VideoLimitError, errors_of
from .groups import decoding_threads
from .pictures import is_folder, open_source_as
from .readers import FrameReader
from .sources import VideoSource, is_data_url, is_url, open_source
from .worker import KEPT_BYTES, LONGEST, Channel


IDLE_WORKERS = 8  # at most so many are kept
VIDEOS_OF_A_WORKER = 500  # then a new one takes its place
GRACE = 5.0  # seconds after `max_seconds` until a worker that does not answer is killed
CAN_ISOLATE = os.name == "posix"
# The worker imports this folder only: the package around it would take seconds for torch and transformers.
_START = """
import json, sys, types
paths, folder, channel, parent = json.loads(sys.argv[1])
sys.path[:] = paths
for name, path in (("video_panda_hf", None), ("video_panda_hf.decoding", folder)):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [path] if path else []
from video_panda_hf.decoding.worker import main
main(channel, parent)
"""


def open_any(kind: str, source: VideoSource, budget: Budget, all_times: bool = False):
    """`open_source_as`, in a worker process if `budget.limits.isolate`."""
    if isinstance(source, list) and not all(isinstance(name, (str, os.PathLike)) for name in source):
        raise TypeError(f"{budget.video}: a list of pictures has their names, str or os.PathLike")
    return (_open_isolated if budget.limits.isolate else open_source_as)(kind, source, budget, all_times)


class Worker:
    """A process that decodes one video at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = [sys.path, str(Path(__file__).parent), theirs.fileno(), os.getpid()]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, json.dumps(arguments)],
                stdin=subprocess.PIPE,  # it ends with this process
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for this process
                env=os.environ | {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"},  # threads reserve addresses
            )
        self.channel, self.videos = Channel(ours, is_parents=True), 0

    def forget(self) -> None:
        """Closes this process's ends only."""
        self.channel.socket.close()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def end(self) -> int:
        """Kills the process. Returns its exit status: its own, if it had ended already."""
        self.process.kill()
        self.forget()
        return self.process.wait()


class _Pool:
    """The workers that are idle. A fork of this process has none of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: list[Worker] = []

    def take(self, fresh: bool) -> Worker:
        with self.lock:
            return self.idle.pop() if self.idle and not fresh else Worker()

    def give_back(self, worker: Worker) -> None:
        worker.videos += 1
        with self.lock:
            if worker.videos < VIDEOS_OF_A_WORKER and len(self.idle) < IDLE_WORKERS:
                self.idle.append(worker)
                return
        worker.end()

    def end(self) -> None:
        with self.lock:
            workers, self.idle = self.idle, []
        for worker in workers:
            worker.end()

    def forget(self) -> None:
        workers, self.idle, self.lock = self.idle, [], threading.Lock()
        for worker in workers:
            worker.forget()
            worker.process.returncode = 0  # it is no child of this process


_pool = _Pool()
atexit.register(_pool.end)
if CAN_ISOLATE:
    os.register_at_fork(after_in_child=_pool.forget)


@contextmanager
def _open_isolated(kind: str, source: VideoSource, budget: Budget, all_times: bool) -> Iterator[FrameReader]:
    if not CAN_ISOLATE:
        raise ValueError("`isolate=True` needs Linux or macOS")
    request: dict[str, Any] = {
        "kind": kind,
        "video": budget.video,
        "limits": asdict(budget.limits),
        "strict": budget.strict,
        "pixels": budget.pixels,
        "threads": decoding_threads(),
        "all_times": all_times,
        "source": "name",
        "name": None,
        "size": 0,
    }
    with ExitStack() as closing:
        data: Any = b""
        file = None
        if isinstance(source, list):
            request["name"] = [_full_name(name) for name in source]
        elif (is_data_url(source) and len(source) < LONGEST) or is_url(source) or is_folder(source):
            request["name"] = _full_name(source)
        else:
            readable = closing.enter_context(open_source(source, budget))
            if isinstance(readable, str):
                request["name"] = os.path.abspath(readable.removeprefix("file:"))
            elif isinstance(source, (bytes, bytearray, memoryview)) and memoryview(source).nbytes <= LONGEST:
                request["source"], data = "bytes", memoryview(source).cast("B")
            else:
                file = readable
                with errors_of(budget.video):
                    request["source"], request["size"] = "file", file.seek(0, os.SEEK_END)
        reader = closing.enter_context(_remote_reader(request, data, file, budget))
        yield reader


@contextmanager
def _remote_reader(request: dict, data, file: BinaryIO | None, budget: Budget) -> Iterator["RemoteReader"]:
    worker, reader = _pool.take(fresh=False), None
    try:
        try:
            worker.channel.socket.settimeout(_patience(budget))
            worker.channel.send(request, data)
        except OSError:  # it had ended while it was idle, or does not listen
            worker.end()
            worker = _pool.take(fresh=True)
            worker.channel.socket.settimeout(_patience(budget))
            try:
                worker.channel.send(request, data)
            except OSError:
                raise _died(worker, budget.video) from None
        reader = RemoteReader(worker, file, budget)
        yield reader
        reader.close()
    except _Refused as error:
        _pool.give_back(worker)
        raise error.decoding from None
    except BaseException as error:
        if reader is None or not reader.is_open or not isinstance(error, Exception):
            worker.end()
            raise
        reader.close()  # the error is the caller's, and the worker waits for numbers
        _pool.give_back(worker)
        raise
    _pool.give_back(worker)


class _Refused(Exception):
    """What the worker says of the video. It is ready for another one."""

    def __init__(self, decoding: VideoDecodeError):
        self.decoding = decoding


class RemoteReader(FrameReader):
    """A reader in a worker."""

    def __init__(self, worker: Worker, file: BinaryIO | None, budget: Budget):
        super().__init__(budget)
        self.worker, self.file, self.is_open = worker, file, True
        facts, times = self._receive()
        try:
            self.count, self.duration = int(facts["count"]), facts["duration"] and float(facts["duration"])
            self.is_picture = bool(facts["is_picture"])
            height, width = map(int, facts["size"])
            self.times = np.frombuffer(times) if times else None
            if min(self.count, height, width) < 1 or not math.isfinite(self.duration or 0):
                raise ValueError("this is no video")
            if self.times is not None and (len(self.times) != self.count or not np.isfinite(self.times).all()):
                raise ValueError("these are no times of it")
        except (KeyError, TypeError, ValueError, OverflowError):  # a video has taken it over
            raise self._died() from None
        self._set_size(height, width)

    def read(self, numbers: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        shape = len(numbers), *self.size, 3
        size = int(np.prod(shape))
        channel = self.worker.channel
        memory, wanted = channel.memory, [int(number) for number in numbers]
        self.is_open = False
        if memory is not None and len(memory) >= size:
            self._send({"numbers": wanted, "new_memory": False})
        else:
            channel.memory = None  # until the worker has answered, it is not known what it holds
            memory, descriptor = _shared_memory(max(1, size))
            try:
                self._send({"numbers": wanted, "new_memory": True}, descriptor=descriptor)
            finally:
                os.close(descriptor)
        answer, _ = self._receive()
        if not isinstance(told := answer.get("warnings"), list):
            raise self._died()
        for text in told:
            warnings.warn(str(text), VideoDecodeWarning, stacklevel=3)
        self.is_open = True
        frames = np.frombuffer(memory, dtype=np.uint8, count=size).reshape(shape)
        if size > KEPT_BYTES:
            return frames
        channel.memory = memory
        return frames.copy()

    def close(self) -> None:
        """Lets the worker go, if it still waits for numbers."""
        if self.is_open:
            self._send({})
            self.is_open = False

    def _send(self, message: dict, data=b"", descriptor: int | None = None) -> None:
        try:
            self.worker.channel.socket.settimeout(_patience(self.budget))
            self.worker.channel.send(message, data)
            if descriptor is not None:
                socket.send_fds(self.worker.channel.socket, [b"f"], [descriptor])
        except OSError:
            raise self._died() from None

    def _receive(self) -> tuple[dict, bytes]:
        """The worker's next answer. Until then, it may read from `file`."""
        patience = _patience(self.budget)
        end = math.inf if patience is None else time.monotonic() + patience  # however much it says until then
        while True:
            try:
                answer, data = self.worker.channel.receive(end)
            except TimeoutError:
                limit = self.budget.limits.max_seconds
                raise VideoLimitError(
                    f"{self.video}: its worker process did not answer within the limit of {limit:.10g} s and was "
                    "ended. If you trust the video, pass `limits=DecodeLimits(max_seconds=...)`."
                ) from None
            except (EOFError, OSError):
                raise self._died() from None
            if "error" in answer:
                found = getattr(errors, str(answer["error"]), None)
                if not (isinstance(found, type) and issubclass(found, VideoDecodeError)):
                    found = VideoDecodeError
                raise _Refused(found(str(answer.get("message"))))
            if "read" not in answer:
                return answer, data
            self._send(*self._read_for_worker(answer["read"]))

    def _read_for_worker(self, wanted) -> tuple[dict, bytes]:
        try:
            assert self.file is not None
            position, size = wanted
            self.file.seek(position)
            return {}, self.file.read(min(max(0, size), LONGEST))
        except Exception as error:
            return {"failed": str(error)}, b""

    def _died(self) -> VideoDecodeError:
        self.is_open = False
        return _died(self.worker, self.video)


def _died(worker: Worker, video: str) -> VideoDecodeError:
    """What to say of a worker that has ended, or says what no worker of ours does. It is ended."""
    with suppress(subprocess.TimeoutExpired):
        worker.process.wait(1)
    status = worker.end()
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return CorruptVideoError(
        f"{video}: the worker process that decoded it ended ({how}). It is damaged, or there was too little memory. "
        "Replace the file."
    )


def _full_name(source: str | os.PathLike) -> str:
    """A name that means the same in another working directory."""
    name = os.fspath(source)
    return name if is_url(name) or is_data_url(name) else os.path.abspath(name)


def _patience(budget: Budget) -> float | None:
    return None if budget.limits.max_seconds is None else budget.seconds_left() + GRACE


def _shared_memory(size: int) -> tuple[mmap.mmap, int]:
    """Memory that a worker can write to by its descriptor, and not make shorter where the system can forbid it."""
    if hasattr(os, "memfd_create"):
        import fcntl

        descriptor = os.memfd_create("video_panda_hf", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, size)
    return mmap.mmap(descriptor, size), descriptor
