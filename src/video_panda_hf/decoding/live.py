"""Reads a video that is still coming in: a growing file, a pipe, a network stream or a camera."""

import io
import itertools
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from .errors import (
    Budget,
    CorruptVideoError,
    DecodeLimits,
    NotAVideoError,
    VideoDecodeError,
    VideoNetworkError,
    VideoNotFoundError,
    VideoUnreadableError,
    check_picture_size,
    decoders_end_here,
    errors_of,
)
from .groups import PacketDecoder, prepare_decoder
from .index import DEFAULT_RATE
from .pixels import PictureConverter
from .sources import CONTAINER_FORMATS, demux, describe, is_url, open_video


# Network streams. Playlists of these formats may name other addresses, but no files: `file` is no protocol of theirs.
STREAM_SCHEMES = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")
_STREAM_PROTOCOLS = ",".join(STREAM_SCHEMES) + ",tls,crypto,httpproxy"
_STREAM_FORMATS = f"{CONTAINER_FORMATS},rtsp,rtp,sdp,hls,dash"
CAMERA_FORMATS = ("v4l2", "avfoundation", "dshow")  # FFmpeg's input devices of Linux, macOS and Windows
_POLL = 0.05  # seconds between two looks at a file that may grow
_LONGEST_STEP = 60  # seconds; timestamps that go on by more, or back, are a new clock
_TOLERANCE = Fraction(1, 10**6)  # seconds
_NO_PROTOCOL = "none"  # what is read through a file object needs no protocol


def read_live(
    source: str | os.PathLike | BinaryIO,
    fps: float,
    *,
    wait: float = 5.0,
    limits: DecodeLimits | None = None,
    pixels: str = "stored",
) -> Iterator[tuple[float, np.ndarray]]:
    """
    Reads a video while it comes in, and yields the pictures that it shows at 0, 1/fps, 2/fps … seconds.

    The timestamps of the stream decide what is shown when; its first frame is at 0 seconds. A picture is yielded once
    the stream has reached the next of these times. So by its end it has yielded the frames that a processor with
    `fps=` takes of the same video as a file. Timestamps that jump by more than a minute, or back, are a new clock.

    Damage does not end the video: what cannot be decoded is left out. Only at the end it is raised as an error.

    Args:
        source (`str`, `os.PathLike` or `BinaryIO`):
            A file that may still grow, a pipe or a binary file object, which need not seek. Or the address of a stream
            (rtsp, http and others, see `STREAM_SCHEMES`), a camera's device, or "FORMAT:NAME" with a format of
            `CAMERA_FORMATS`. For a file or a file object, nothing else is opened, whatever is in it.
        fps (`float`):
            Pictures for each second of video.
        wait (`float`, *optional*, defaults to 5.0):
            How long to wait for more at the end of a file, in seconds. A pipe ends where its writer closes it, and a
            network stream after `limits.url_timeout` without data.
        limits (`DecodeLimits`, *optional*):
            Limits on the size of a picture, and `url_timeout`. Time and length are not limited.
        pixels (`str`, *optional*, defaults to `"stored"`):
            See `decode_video`.

    Yields:
        `tuple[float, np.ndarray]`: the time in seconds, and the picture, uint8 RGB of shape `(height, width, 3)`. The
        shape may change where the stream's does.

    Raises:
        VideoDecodeError: Before the first picture, if there is none to be had. After the last one, if the stream broke
            off or was damaged. The subclass tells why.
        ValueError: If `fps` or `wait` cannot be.
    """
    if not 0 < fps < float("inf"):
        raise ValueError(f"`fps` is a number of frames a second above 0, not {fps}")
    if not 0 <= wait < float("inf"):
        raise ValueError(f"`wait` is a number of seconds of at least 0, not {wait}")
    limits = replace(limits or DecodeLimits(), max_seconds=None, max_url_bytes=None, max_duration=None)
    budget = Budget(without_password(describe(source)), limits, strict=False, pixels=pixels)
    return _read(source, Fraction(fps), wait, budget)


def _read(source, fps: Fraction, wait: float, budget: Budget) -> Iterator[tuple[float, np.ndarray]]:
    with decoders_end_here(), _opened(source, wait, budget) as (container, stream):
        decoder = PacketDecoder(stream, budget, strict=False)
        sampler = _Sampler(fps, stream, budget)
        broken = None
        packets = itertools.chain(demux(container, stream, budget), [None])
        while broken is None:
            try:
                packet = next(packets)
                frames = decoder.feed(packet)
            except StopIteration:
                break
            except av.FFmpegError as error:  # the connection, the device
                is_timeout = isinstance(error, av.error.ExitError)
                broken = f"nothing came for {budget.limits.url_timeout:g} s" if is_timeout else error.strerror
                frames = decoder.feed(None)
            for frame in frames:
                yield from sampler.show(frame)
            if sampler.shown is None:  # a stream is often joined between two key frames; that is not damage
                decoder.damage = None
        yield from sampler.finish()
        if sampler.shown is None:
            found = broken or budget.damage or f"a video stream ({stream.name}) but not one frame in it"
            raise NotAVideoError(f"{budget.video}: nothing could be read of it: {found}.")
        if found := broken or budget.damage or decoder.damage:
            error = VideoNetworkError if broken and is_url(source) else CorruptVideoError
            raise error(f"{budget.video}: broke off or is damaged: {found}. What could be read was used.")


class _Sampler:
    """
    Chooses from decoded frames those shown at 0, 1/fps, 2/fps … seconds, as RGB.

    Attributes:
        shown: the latest frame.
    """

    def __init__(self, fps: Fraction, stream: VideoStream, budget: Budget):
        self.fps, self.stream, self.budget = fps, stream, budget
        self.shown: av.VideoFrame | None = None
        self.stamp: Fraction | None = None  # of the latest frame, on the stream's clock
        self.now = Fraction(0)  # when the latest frame begins to be shown
        self.step = 1 / Fraction(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
        self.due = 0  # number of the next picture to choose
        self.chosen: tuple[float, np.ndarray] | None = None  # waits until its interval is over
        self.convert: PictureConverter | None = None
        self.shape: tuple[int, int] | None = None

    def show(self, frame: av.VideoFrame) -> Iterator[tuple[float, np.ndarray]]:
        """Takes the next frame, and yields what the time up to it completes."""
        stamp = None if frame.pts is None else frame.pts * self.stream.time_base
        if self.shown is not None:
            if stamp is not None and self.stamp is not None and 0 < stamp - self.stamp <= _LONGEST_STEP:
                self.step = stamp - self.stamp
            yield from self._pass(self.step)
        self.shown, self.stamp = frame, stamp

    def finish(self) -> Iterator[tuple[float, np.ndarray]]:
        """Yields the rest, once there are no more frames."""
        if self.shown is not None:
            own = self.shown.duration * self.stream.time_base if self.shown.duration else None
            yield from self._pass(own or self.step)
        if self.chosen and self.due == 1:  # the video is shorter than one interval
            yield self.chosen

    def _pass(self, seconds: Fraction) -> Iterator[tuple[float, np.ndarray]]:
        """Lets the latest frame be shown for so long. Yields the pictures whose interval is over then."""
        self.now += seconds
        picture = None
        while True:
            if self.chosen:
                if self.due / self.fps > self.now + _TOLERANCE:
                    return
                yield self.chosen
                self.chosen = None
            if self.due / self.fps >= self.now - _TOLERANCE:
                return
            picture = self._picture() if picture is None else picture
            self.chosen = float(self.due / self.fps), picture
            self.due += 1

    def _picture(self) -> np.ndarray:
        frame = self.shown
        assert frame is not None
        if self.convert is None or self.shape != (frame.height, frame.width):
            self.shape = frame.height, frame.width
            self.convert = PictureConverter.of(frame, self.stream.sample_aspect_ratio, self.budget.pixels)
            check_picture_size(self.budget.video, *self.convert.size, self.budget.limits)
        return self.convert(frame)


@contextmanager
def _opened(source, wait: float, budget: Budget) -> Iterator[tuple[InputContainer, VideoStream]]:
    with ExitStack() as closing:
        timeout = budget.limits.url_timeout
        with _network_errors(source, budget.video), errors_of(budget.video):
            if is_url(source):
                scheme = source.split("://", 1)[0].lower()
                if scheme not in STREAM_SCHEMES:
                    known = ", ".join(STREAM_SCHEMES)
                    raise VideoNetworkError(f"{budget.video}: streams of kind {scheme!r} are not read, only {known}.")
                how: dict[str, Any] = {
                    "formats": _STREAM_FORMATS,
                    "protocols": _STREAM_PROTOCOLS,
                    "timeout": (timeout, timeout),
                }
                how["options"] = {"rtsp_flags": "prefer_tcp"}  # nothing gets lost
                readable: Any = source
            elif camera := _camera_of(source):
                form, readable = camera
                if form not in av.formats_available:
                    raise VideoUnreadableError(f"{budget.video}: this build of PyAV reads no cameras ({form}).")
                how = {"formats": form, "protocols": "file", "format": form}
            else:
                readable = closing.enter_context(_growing_file(source, wait, budget.video))
                how = {"protocols": _NO_PROTOCOL}
            container, stream = closing.enter_context(open_video(readable, budget, **how))
            prepare_decoder(container, stream, budget, strict=False, threads=1)  # more would hold frames back
        yield container, stream


@contextmanager
def _network_errors(source, video: str) -> Iterator[None]:
    """Errors of a stream's address are not those of a file."""
    try:
        yield
    except VideoDecodeError as error:
        cause = error.__cause__
        if not is_url(source) or not isinstance(cause, av.FFmpegError) or isinstance(cause, av.error.InvalidDataError):
            raise
        raise VideoNetworkError(f"{video}: cannot be read ({cause.strerror}). Check the address.") from cause


def _camera_of(source) -> tuple[str, str] | None:
    """(format, name) of a camera's device; `None` if `source` is something else."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    name = os.fspath(source)
    form, colon, rest = name.partition(":")
    if colon and form in CAMERA_FORMATS:
        return form, rest
    with suppress(OSError, ValueError):
        if stat.S_ISCHR(os.stat(name).st_mode):
            return CAMERA_FORMATS[0], name
    return None


@contextmanager
def _growing_file(source, wait: float, video: str) -> Iterator[Any]:
    if isinstance(source, (str, os.PathLike)):
        try:
            if os.path.isdir(source):
                raise VideoUnreadableError(f"{video}: is a directory. Pass the path of one video file.")
            file = open(source, "rb", buffering=0)
        except ValueError as error:  # a NUL character in the path
            if isinstance(error, VideoDecodeError):
                raise
            raise VideoNotFoundError(f"{video}: is not a path ({error}).") from error
        with file:
            yield file if _ends_with_its_index(file) else _GrowingFile(file, wait)
    elif hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        yield source if _ends_with_its_index(source) else _GrowingFile(source, wait)
    else:
        raise TypeError(f"a live video is a path, an address or a binary file, not {type(source).__name__}")


class _GrowingFile:
    """Reads on where a regular file ends, once it has grown. It does not seek."""

    def __init__(self, file: BinaryIO, wait: float):
        self.read_some = getattr(file, "read1", file.read)
        self.patience = wait if _is_regular(file) else 0.0
        self.ended = False

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        deadline = time.monotonic() + self.patience
        while not self.ended:
            if data := self.read_some(size):
                return data
            if data == b"":  # not `None`, which a pipe that does not block gives where there is nothing yet
                self.ended = time.monotonic() >= deadline
            if not self.ended:
                time.sleep(_POLL)
        return b""


def _is_regular(file: BinaryIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (AttributeError, OSError):  # not a file of the system
        return False


def _ends_with_its_index(file: BinaryIO) -> bool:
    """Whether it is an mp4 or mov file whose index comes after its frames, so that FFmpeg has to seek in it."""
    if not _is_regular(file) or file.tell():
        return False
    position, found = 0, False
    while len(head := file.read(16)) == 16 and not found:
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        length = int.from_bytes(head[8:], "big") if length == 1 else length
        if length < 8 or (position == 0 and kind not in (b"ftyp", b"mdat", b"wide", b"free", b"skip")):
            break
        if kind in (b"moov", b"moof"):
            break
        found = kind == b"mdat"
        position += length
        file.seek(position)
    file.seek(0)
    return found


def without_password(name: str) -> str:
    """An address without the user and the password in it, for messages."""
    return re.sub(r"(?<=//)[^/@\s]*@", "", name)
