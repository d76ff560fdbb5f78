"""Errors of decoding, and limits on the work that a video may cause."""

import math
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields

import av
import av.logging
from av import error as av_error


class VideoDecodeError(ValueError):
    """A video could not be decoded. Base of all errors here. The message names the video, the cause and the remedy."""


class VideoNotFoundError(VideoDecodeError, FileNotFoundError):
    """There is no file at the given path. It is also a `FileNotFoundError`."""


class VideoUnreadableError(VideoDecodeError):
    """The source cannot be read: a directory, a pipe, a file without permission, a failing file object."""


class VideoNetworkError(VideoDecodeError):
    """A URL could not be read: refused, not found, too slow, or not http(s)."""


class NotAVideoError(VideoDecodeError):
    """The file is empty, in no known video format, or without a video stream."""


class UnsupportedCodecError(VideoDecodeError):
    """The installed FFmpeg cannot decode the video's codec."""


class CorruptVideoError(VideoDecodeError):
    """The video is truncated or damaged. `strict=False` decodes what is left."""


class VideoLimitError(VideoDecodeError):
    """The video exceeds one of the `DecodeLimits`."""


class VideoFrameError(VideoDecodeError, IndexError):
    """A frame was asked for that the video does not have. It is also an `IndexError`."""


class VideoDecodeWarning(UserWarning):
    """A video that was decoded with `strict=False` is damaged."""


@dataclass(frozen=True)
class DecodeLimits:
    """
    Limits on one call of `decode_video`. `None` lifts a limit.

    The defaults accept 8K films and stop a decompression bomb before it fills the memory.

    Args:
        max_side (`int`, *optional*, defaults to 8192):
            Longest side of a frame, in pixels.
        max_pixels (`int`, *optional*, defaults to 8192 · 4320):
            Pixels of a frame.
        max_duration (`float`, *optional*, defaults to 86400.0):
            Duration of the video, in seconds.
        max_frames (`int`, *optional*, defaults to 100000):
            Frames that one call may ask for, repetitions included.
        max_output_bytes (`int`, *optional*, defaults to 2 GiB):
            Size of the returned frames, in bytes.
        max_source_bytes (`int`, *optional*, defaults to 64 GiB):
            Size of the file, in bytes.
        max_url_bytes (`int`, *optional*, defaults to 2 GiB):
            Size of a file behind a URL, and of what is fetched of it, in bytes.
        max_seconds (`float`, *optional*, defaults to 600.0):
            Time to work on the video, in seconds. It is checked between packets and while waiting for a server.
        url_timeout (`float`, *optional*, defaults to 20.0):
            Wait for the headers of a server's answer, and for each further piece of it, in seconds.
        isolate (`bool`, *optional*):
            Whether to decode in a worker process, see `decode_video`. `None` leaves it to the caller: no, except in
            `VideoPandaDataCollator(on_error="skip")`.
        max_memory_bytes (`int`, *optional*, defaults to 4 GiB):
            Memory that a worker process may take beside the returned frames, in bytes. Only with `isolate`.
    """

    max_side: int | None = 8192
    max_pixels: int | None = 8192 * 4320
    max_duration: float | None = 24 * 3600.0
    max_frames: int | None = 100_000
    max_output_bytes: int | None = 2 * 2**30
    max_source_bytes: int | None = 64 * 2**30
    max_url_bytes: int | None = 2 * 2**30
    max_seconds: float | None = 600.0
    url_timeout: float = 20.0
    isolate: bool | None = None
    max_memory_bytes: int | None = 4 * 2**30


def limits_of(given: DecodeLimits | dict | None) -> DecodeLimits | None:
    """Limits that may be given as a dictionary. Raises `ValueError` for one that does not exist."""
    if given is None or isinstance(given, DecodeLimits):
        return given
    known = [field.name for field in fields(DecodeLimits)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"`decode_limits` has {unknown}, but the limits are {known}")
    return DecodeLimits(**given)


# In messages: how to decode what is left of a damaged video.
LENIENT = "`strict=False` (to a processor: `strict_decoding=False`)"


class Budget:
    """The time and the downloaded bytes that one video may still use.

    It also says how to decode the video: `strict`, and which `pixels`, "stored" or "displayed". `damage` describes
    damage of the container. After damage, reading goes on only if not `strict`.
    """

    def __init__(self, video: str, limits: DecodeLimits, strict: bool = True, pixels: str = "stored"):
        if pixels not in ("stored", "displayed"):
            raise ValueError(f'`pixels` is "stored" or "displayed", not {pixels!r}')
        self.video, self.limits, self.strict, self.pixels = video, limits, strict, pixels
        self.damage: str | None = None
        self.start = time.monotonic()
        self.fetched = 0

    def spend(self, fetched: int = 0) -> None:
        """Adds `fetched` bytes that came from a server. Call it between packets too, to check the time.

        Raises:
            VideoLimitError: if the time or the bytes are used up.
        """
        self.fetched += fetched
        seconds = time.monotonic() - self.start
        check_limit(self.video, "the work in seconds", seconds, self.limits.max_seconds, "max_seconds")
        check_limit(self.video, "what was fetched in bytes", self.fetched, self.limits.max_url_bytes, "max_url_bytes")

    def seconds_left(self) -> float:
        limit = self.limits.max_seconds
        return math.inf if limit is None else max(0.0, self.start + limit - time.monotonic())


def check_limit(video: str, what: str, found: float, limit: float | None, name: str) -> None:
    """Raises `VideoLimitError` if `found` is above `limit`, the field `name` of `DecodeLimits`."""
    if limit is not None and found > limit:
        raise VideoLimitError(
            f"{video}: {what} is {found:.10g}, above the limit of {limit:.10g}. "
            f"If you trust the video, pass `limits=DecodeLimits({name}=...)` (to a processor: "
            f"`decode_limits={{'{name}': ...}}`)."
        )


def check_picture_size(video: str, height: int, width: int, limits: DecodeLimits) -> None:
    """Raises `VideoLimitError` for a picture of more pixels than `limits` allow."""
    check_limit(video, "its longer side in pixels", max(height, width), limits.max_side, "max_side")
    check_limit(video, "its number of pixels", height * width, limits.max_pixels, "max_pixels")


@contextmanager
def errors_of(video: str):
    """Translates errors of PyAV and the operating system into subclasses of `VideoDecodeError`."""
    try:
        yield
    except VideoDecodeError:
        raise
    except FileNotFoundError as error:
        raise VideoNotFoundError(f"{video}: no such file. Check the path.") from error
    except (av_error.DecoderNotFoundError, av_error.PatchWelcomeError, av_error.NotImplementedError) as error:
        raise UnsupportedCodecError(
            f"{video}: FFmpeg cannot decode its codec ({_reason(error)}). Convert it, for example to H.264 in mp4."
        ) from error
    except (MemoryError, av_error.BlockingIOError) as error:  # the latter where a thread cannot be started
        raise VideoLimitError(f"{video}: needs more memory or threads than there are.") from error
    except PermissionError as error:
        raise VideoUnreadableError(f"{video}: may not be read ({_reason(error)}). Check its permissions.") from error
    except av.FFmpegError as error:
        raise NotAVideoError(
            f"{video}: not a video in a known format, or cut off before its header ends ({_reason(error)}). "
            "Check that the file is complete."
        ) from error
    except OSError as error:
        raise VideoUnreadableError(f"{video}: cannot be read ({_reason(error)}).") from error


@contextmanager
def decoders_end_here():
    """
    No decoder outlives this context, also where an error leaves it.

    A forked process, such as a worker of a DataLoader, has none of its parent's threads. If it frees a decoder of its
    parent, it waits for them forever.
    """
    with _silent_ffmpeg:
        try:
            yield
        except BaseException as error:
            _clear_frames(error)
            raise


def _clear_frames(error: BaseException) -> None:
    """Clears the local variables of this package's functions that `error` passed through; they may hold decoders."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_globals.get("__package__") == __package__:
                with suppress(RuntimeError):  # still running
                    frame.clear()
        error = error.__cause__ or error.__context__


class _SilentFFmpeg:
    """
    A context in which FFmpeg logs nothing; several threads may be in it.

    PyAV holds the GIL while it waits for a decoder's threads to end, and a thread that logs waits for the GIL. PyAV
    logs nothing unless somebody turns it on. Importing torchvision 0.21 does.
    """

    def __init__(self):
        self.lock, self.inside, self.level = threading.Lock(), 0, None

    def __enter__(self):
        with self.lock:
            if self.inside == 0:
                self.level = av.logging.get_level()
                av.logging.set_level(None)
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                av.logging.set_level(self.level)


_silent_ffmpeg = _SilentFFmpeg()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
