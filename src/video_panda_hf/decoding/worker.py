"""Decodes in a process of its own: the worker's side and what both sides share. `isolation` has the other side.

A message is JSON and bytes. Nothing is pickled: whoever takes over the worker must not get into its parent.
"""

import errno
import io
import json
import math
import mmap
import os
import select
import socket
import struct
import sys
import threading
import time
import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from . import groups
from .errors import Budget, DecodeLimits, VideoDecodeError, decoders_end_here
from .pictures import open_source_as
from .readers import FrameReader


_LENGTHS = struct.Struct(">II")  # of the JSON and of the bytes after it
LONGEST = 2**30  # bytes of each
_LONGEST_ANSWER = 2**22  # bytes of the JSON of a worker: parsed, it may take a hundred times as much
_ALL_PAGES = getattr(mmap, "MAP_POPULATE", 0)  # at once, which is faster than one by one as they are written
KEPT_BYTES = 2**26  # memory for frames up to this size is kept, because new memory costs more than a copy
_LOOKS = 1.0  # seconds between two looks whether the parent lives


class Channel:
    """Sends and receives messages over a socket."""

    def __init__(self, sock: socket.socket, is_parents: bool = False):
        self.socket, self.longest_text = sock, _LONGEST_ANSWER if is_parents else LONGEST
        self.memory: mmap.mmap | None = None  # what both sides share and keep

    def send(self, message: dict, data=b"") -> None:
        text, size = json.dumps(message).encode("utf-8", "surrogatepass"), memoryview(data).nbytes
        self.socket.sendall(_LENGTHS.pack(len(text), size) + text)
        if size:
            self.socket.sendall(data)

    def receive(self, end: float = math.inf) -> tuple[dict, bytes]:
        """Raises `EOFError` if the other side is gone or sends no message, `TimeoutError` at the time `end`."""
        lengths = _LENGTHS.unpack(self._exactly(_LENGTHS.size, end))
        if lengths[0] > self.longest_text or lengths[1] > LONGEST:
            raise EOFError("too long a message")
        text, data = (self._exactly(length, end) for length in lengths)
        try:
            message = json.loads(text.decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise EOFError("not a message")
        return message, data

    def _exactly(self, count: int, end: float) -> bytes:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(None if left == math.inf else left)
            got = self.socket.recv_into(view)
            if not got:
                raise EOFError("the other side is gone")
            view = view[got:]
        return bytes(data)


class _ParentFile(io.RawIOBase):
    """A file object of the parent."""

    def __init__(self, channel: Channel, size: int):
        self.channel, self.size, self.position = channel, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        wanted, data = left if size < 0 else min(size, left), b""
        while len(data) < wanted:
            self.channel.send({"read": [self.position, min(wanted - len(data), LONGEST)]})
            answer, part = self.channel.receive()
            if "failed" in answer:
                raise OSError(answer["failed"])
            if not part:
                break
            self.position += len(part)
            data += part
        return data


def main(socket_number: int, parent: int) -> None:
    """Answers requests until the parent is gone."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    channel = Channel(socket.socket(fileno=socket_number))
    warnings.simplefilter("always")
    started = _address_space()
    while True:
        try:
            request, data = channel.receive()
        except (EOFError, OSError):
            return
        _answer(channel, request, data, started)


def _answer(channel: Channel, request: dict, data: bytes, started: int) -> None:
    limits = DecodeLimits(**request["limits"])
    room = None if limits.max_memory_bytes is None else started + limits.max_memory_bytes
    _limit_memory(room and room + len(channel.memory or b""))
    groups.threads_of_worker = request["threads"]
    budget = Budget(request["video"], replace(limits, isolate=False), request["strict"], request["pixels"])
    source: Any = data if request["source"] == "bytes" else request["name"]
    if request["source"] == "file":
        source = _ParentFile(channel, request["size"])
    try:
        with (
            decoders_end_here(),
            warnings.catch_warnings(record=True) as told,
            open_source_as(request["kind"], source, budget, request["all_times"]) as reader,
        ):
            times = b"" if reader.times is None else np.asarray(reader.times, dtype=np.float64).tobytes()
            facts = {name: getattr(reader, name) for name in ("count", "duration", "size", "is_picture")}
            channel.send(facts, times)
            while "numbers" in (wanted := _wanted(channel, budget)):
                _read(channel, reader, wanted, room)
                channel.send({"warnings": [str(warning.message) for warning in told]})
                told.clear()
    except VideoDecodeError as error:
        channel.send({"error": type(error).__name__, "message": str(error)})
    except EOFError:
        os._exit(0)
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            name, what = "VideoLimitError", f"needs more memory than `max_memory_bytes` = {limits.max_memory_bytes}"
        else:
            name, what = "VideoDecodeError", f"cannot be decoded ({error!r})"
        channel.send({"error": name, "message": f"{budget.video}: {what}."})


def _wanted(channel: Channel, budget: Budget) -> dict:
    """What the parent wants next. The time until then is not the video's."""
    begun = time.monotonic()
    wanted, _ = channel.receive()
    budget.start += time.monotonic() - begun
    return wanted


def _read(channel: Channel, reader: FrameReader, wanted: dict, room: int | None) -> None:
    """Reads frames into the kept memory, or into that whose descriptor comes next."""
    shape = len(wanted["numbers"]), *reader.size, 3
    size = int(np.prod(shape))
    if wanted["new_memory"]:
        channel.memory = None  # which frees it
        _, (descriptor, *_), *_ = socket.recv_fds(channel.socket, 1, 1)
        _limit_memory(room and room + size)
        with os.fdopen(descriptor, "r+b") as file:
            memory = mmap.mmap(file.fileno(), max(1, size), flags=mmap.MAP_SHARED | _ALL_PAGES)
        channel.memory = memory if size <= KEPT_BYTES else None
    else:  # the limit has room for it already
        assert channel.memory is not None
        memory = channel.memory
    reader.read(wanted["numbers"], out=np.frombuffer(memory, dtype=np.uint8, count=size).reshape(shape))


def _address_space() -> int:
    import resource  # not on Windows

    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return 2**36


def _limit_memory(size: int | None) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = resource.RLIM_INFINITY if size is None else size
    if hard != resource.RLIM_INFINITY and (size is None or size > hard):
        wanted = hard
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, also while it decodes."""
    while os.getppid() == parent:
        if select.select([sys.stdin], [], [], _LOOKS)[0] and not os.read(sys.stdin.fileno(), 1):
            break
    os._exit(0)
