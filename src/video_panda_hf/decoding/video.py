"""`decode_video`: chosen frames of a video file, exactly, by seeking, within limits.

It lists the packets of the file without decoding them. This gives every frame its number and time. The caller then
chooses frames. Decoding runs only from the key frame before a chosen frame to that frame. Containers without
presentation times are decoded from start to end instead.

`opened_video` gives the frames of one file in several calls, so that not all of them are in memory at a time.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import index
from typing import Literal

import numpy as np
from transformers.video_utils import VideoMetadata

from .errors import Budget, DecodeLimits, VideoFrameError, check_limit, decoders_end_here, errors_of
from .isolation import open_any
from .pictures import bytes_of_base64
from .readers import FrameReader
from .sources import VideoSource, describe


SampleIndicesFn = Callable[[VideoMetadata], Sequence[int]]


def decode_video(
    source: VideoSource,
    sample_indices_fn: SampleIndicesFn | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
    limits: DecodeLimits | None = None,
    strict: bool = True,
    pixels: Literal["stored", "displayed"] = "stored",
    indices: Sequence[int] | None = None,
    isolate: bool | None = None,
) -> tuple[np.ndarray, VideoMetadata]:
    """
    Decodes chosen frames of a video.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `bytearray`, `memoryview`, `BinaryIO` or `list`):
            A path, an http(s) or base64 data URL, the bytes of a file, or a seekable binary file object. A folder of
            pictures is a video of these, in the natural order of their names ("9.png", "10.png") and without a rate.
            So is a list of names of picture files, in its own order.
        sample_indices_fn (`Callable[[VideoMetadata], Sequence[int]]`, *optional*):
            Called once with the metadata, complete except for `frames_indices`. Returns the numbers of the wanted
            frames, from 0 in presentation order, in any order, with repetitions if wanted. Defaults to all frames.
        start, end (`float`, *optional*):
            A window in seconds from the first frame. Only frames presented in [start, end) are decoded and numbered,
            as if the file were cut there. If none begins there, it is the one on the screen.
        limits (`DecodeLimits`, *optional*):
            Limits of time, memory and size. Defaults to `DecodeLimits()`.
        strict (`bool`, *optional*, defaults to `True`):
            Whether to raise an error if the video is damaged. `False` replaces a frame that cannot be decoded by the
            nearest one and issues a `VideoDecodeWarning`.
        pixels (`str`, *optional*, defaults to `"stored"`):
            `"stored"` gives the pixels of the file, by the colour matrix that it names, or else BT.601. This is what
            the released weights were trained on. `"displayed"` gives what a player shows: square pixels, and BT.709
            for high definition that names no matrix.
        indices (`Sequence[int]`, *optional*):
            The numbers of the wanted frames, in place of `sample_indices_fn`.
        isolate (`bool`, *optional*):
            Whether to decode in a worker process (Linux, macOS), so that a video that crashes the decoder, hangs it or
            takes more than `limits.max_memory_bytes` is a `VideoDecodeError`. Defaults to `limits.isolate`.

    Returns:
        `tuple[np.ndarray, VideoMetadata]`: frames, uint8 RGB of shape `(num_frames, height, width, 3)`, upright; and
        metadata: `total_num_frames` and `duration` (seconds) of the window, `fps` (average), `height` and `width` of
        the frames, `frames_indices` as chosen, `video_backend` `"pyav"`. A folder has no `fps` and no `duration`.

    Raises:
        VideoDecodeError: If the video cannot be decoded. The subclass tells why.
        VideoFrameError: (a `ValueError` and an `IndexError`) if a wanted frame does not exist.
        ValueError: If `start` is not before `end`, the window contains no frame, `pixels` has another value, or both
            `sample_indices_fn` and `indices` are given.
        TypeError: If `source` is of another type.
    """
    if indices is not None:
        if sample_indices_fn is not None:
            raise ValueError("`indices` and `sample_indices_fn` both choose frames: give one of them")
        sample_indices_fn = _always(indices)
    if isolate is not None:
        limits = replace(limits or DecodeLimits(), isolate=isolate)
    with opened_video(source, start=start, end=end, limits=limits, strict=strict, pixels=pixels) as video:
        return video.read(video.choose(sample_indices_fn)), video.metadata


def decode_video_or_picture(
    source: VideoSource,
    sample_indices_fn: SampleIndicesFn | None = None,
    *,
    limits: DecodeLimits | None = None,
    strict: bool = True,
    pixels: Literal["stored", "displayed"] = "stored",
    may_be_mjpeg: bool = True,
) -> tuple[np.ndarray, VideoMetadata]:
    """
    Decodes a video like `decode_video`, or a picture.

    A picture is read by Pillow and is one frame. `sample_indices_fn` is not called for it.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `bytearray`, `memoryview` or `BinaryIO`):
            See `decode_video`.
        sample_indices_fn (`Callable[[VideoMetadata], Sequence[int]]`, *optional*):
            See `decode_video`.
        limits (`DecodeLimits`, *optional*):
            See `decode_video`.
        strict (`bool`, *optional*, defaults to `True`):
            See `decode_video`.
        pixels (`str`, *optional*, defaults to `"stored"`):
            See `decode_video`. A picture's pixels are the same either way.
        may_be_mjpeg (`bool`, *optional*, defaults to `True`):
            Whether to open a JPEG a second time as a video: several JPEGs in a row are a raw MJPEG video.

    Returns:
        `tuple[np.ndarray, VideoMetadata]`: see `decode_video`. For a picture, one frame and `video_backend`
        `"pillow"`.

    Raises:
        VideoDecodeError: If the file cannot be decoded. The subclass tells why.
        VideoFrameError: (a `ValueError` and an `IndexError`) if a wanted frame does not exist.
        TypeError: If `source` is of another type.
    """
    pictures = {"may_be_picture": True, "may_be_mjpeg": may_be_mjpeg}
    with opened_video(source, limits=limits, strict=strict, pixels=pixels, **pictures) as video:
        return video.read(video.choose(sample_indices_fn)), video.metadata


def decode_picture(source: VideoSource, limits: DecodeLimits | None = None) -> np.ndarray:
    """
    Decodes a picture.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `bytearray`, `memoryview` or `BinaryIO`):
            See `decode_video`.
        limits (`DecodeLimits`, *optional*):
            Limits of size and time. Defaults to `DecodeLimits()`.

    Returns:
        `np.ndarray` of shape `(1, height, width, 3)`: uint8 RGB, upright, without alpha.

    Raises:
        NotAVideoError: If the source is not a picture, or an animated one.
        VideoDecodeError: If the picture cannot be decoded. The subclass tells why.
    """
    return picture_in("picture", source, limits)


def decode_image(source: VideoSource, limits: DecodeLimits | None = None) -> tuple[np.ndarray, VideoMetadata]:
    """
    Decodes an image: one picture, in any format that Pillow reads by itself. An animated one gives its first frame.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `bytearray`, `memoryview` or `BinaryIO`):
            See `decode_video`. A string may also be base64.
        limits (`DecodeLimits`, *optional*):
            Limits of size and time. Defaults to `DecodeLimits()`.

    Returns:
        `tuple[np.ndarray, VideoMetadata]`: uint8 RGB of shape `(1, height, width, 3)`, upright, without alpha; and its
        metadata as a video of one frame.

    Raises:
        NotAVideoError: If the source is not a picture.
        VideoDecodeError: If the picture cannot be decoded. The subclass tells why.
    """
    pixels = picture_in("image", bytes_of_base64(source), limits)
    return pixels, picture_metadata(*pixels.shape[1:3])


def picture_in(kind: str, source: VideoSource, limits: DecodeLimits | None) -> np.ndarray:
    with open_any(kind, source, Budget(describe(source), limits or DecodeLimits())) as reader:
        return reader.read([0])


@contextmanager
def opened_video(
    source: VideoSource,
    *,
    start: float | None = None,
    end: float | None = None,
    limits: DecodeLimits | None = None,
    strict: bool = True,
    pixels: Literal["stored", "displayed"] = "stored",
    may_be_picture: bool = False,
    may_be_mjpeg: bool = True,
) -> Iterator["OpenedVideo"]:
    """
    A context with an open video, whose frames can be read in parts.

    `limits.max_output_bytes` is for each part, and `limits.max_seconds` counts the time inside of `read` only.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `bytearray`, `memoryview` or `BinaryIO`):
            See `decode_video`.
        start, end, limits, strict, pixels (*optional*):
            See `decode_video`.
        may_be_picture (`bool`, *optional*, defaults to `False`):
            Whether a picture is read by Pillow, as `decode_video_or_picture` does.
        may_be_mjpeg (`bool`, *optional*, defaults to `True`):
            See `decode_video_or_picture`.

    Returns:
        A context manager that gives the `OpenedVideo`.

    Raises:
        VideoDecodeError: If the video cannot be opened or decoded. The subclass tells why.

    Example:

    ```python
    with opened_video("film.mkv") as video:
        for first in range(0, video.metadata.total_num_frames, 64):
            frames = video.read(range(first, min(first + 64, video.metadata.total_num_frames)))
    ```
    """
    kind = "video"
    if may_be_picture:
        kind = "video or picture" if may_be_mjpeg else "video or picture, no mjpeg"
    budget = Budget(describe(source), limits or DecodeLimits(), strict, pixels)
    with decoders_end_here(), ExitStack() as closing:
        all_times = start is not None or end is not None
        video = OpenedVideo(closing.enter_context(open_any(kind, source, budget, all_times)), (start, end))
        closing.callback(video._close)
        yield video


class OpenedVideo:
    """
    A video that is open, or a part of it. Make it by `opened_video`.

    Attributes:
        metadata (`VideoMetadata`):
            See `decode_video`; complete except for `frames_indices`.
        is_picture (`bool`):
            Whether it is a picture, which has one frame.
    """

    def __init__(self, reader: FrameReader, window: tuple[float | None, float | None]):
        self._open_reader: FrameReader | None = reader
        self.is_picture = reader.is_picture
        if self.is_picture:
            self._first, self.metadata = 0, picture_metadata(*reader.size)
        else:
            self._first, count, duration = _window(reader, *window)
            self.metadata = _metadata(reader, count, duration)
        self._left_at = time.monotonic()

    @property
    def _reader(self) -> FrameReader:
        if self._open_reader is None:
            raise ValueError("the video is closed: read its frames inside of `with opened_video(...)`")
        return self._open_reader

    def _close(self) -> None:
        """Lets go of the decoders: an error whose traceback names this video would keep them alive."""
        self._open_reader = None

    def choose(self, sample_indices_fn: SampleIndicesFn | None = None) -> list[int]:
        """The numbers of the frames that the function wants of `metadata`, where they are noted; by default all."""
        if self.is_picture:
            return [0]
        total, limits = self.metadata.total_num_frames, self._reader.budget.limits
        if sample_indices_fn is None:  # before there is a list of them
            check_limit(self._reader.video, "the number of frames asked for", total, limits.max_frames, "max_frames")
        numbers = range(total) if sample_indices_fn is None else sample_indices_fn(self.metadata)
        self.metadata.frames_indices = self.check(numbers)
        return self.metadata.frames_indices

    def check(self, indices: Sequence[int]) -> list[int]:
        """These numbers of frames as integers. Raises `VideoDecodeError` for one that does not exist, or too many."""
        video, total = self._reader.video, self.metadata.total_num_frames
        indices = [int(index) for index in indices]
        if outside := [index for index in indices if not 0 <= index < total]:
            raise VideoFrameError(
                f"{video}: frame {outside[0]} was asked for, but the video has {total} frames, 0 to {total - 1}"
            )
        most = self._reader.budget.limits.max_frames
        check_limit(video, "the number of frames asked for", len(indices), most, "max_frames")
        return indices

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The frames of these numbers, in this order: uint8 RGB `(num_frames, height, width, 3)`."""
        reader, indices = self._reader, self.check(indices)
        size, most = len(indices) * math.prod(reader.size) * 3, reader.budget.limits.max_output_bytes
        check_limit(reader.video, "the size in bytes of the frames asked for", size, most, "max_output_bytes")
        reader.budget.start += time.monotonic() - self._left_at
        try:
            with errors_of(reader.video):
                return reader.read([self._first + index for index in indices])
        finally:
            self._left_at = time.monotonic()


def picture_metadata(height: int, width: int) -> VideoMetadata:
    """The metadata of a picture as a video."""
    return VideoMetadata(1, height=height, width=width, frames_indices=[0], video_backend="pillow")


def _always(indices: Sequence[int]) -> SampleIndicesFn:
    numbers = [index(number) for number in indices]
    return lambda _: numbers


def _window(reader: FrameReader, start: float | None, end: float | None) -> tuple[int, int, float | None]:
    """(number of the first frame, number of frames, seconds) of the frames presented in [start, end)."""
    if start is None and end is None:
        return 0, reader.count, reader.duration
    start, end = start or 0.0, np.inf if end is None else end
    if not start < end:
        raise ValueError(f"a window needs start < end, but start is {start:g} and end is {end:g}")
    times, duration = reader.times, reader.duration
    if times is None or duration is None:  # only pictures': the others were opened with `all_times`
        raise ValueError(f"{reader.video}: pictures in a folder have no times for a window. Choose them by `indices`.")
    first, last = np.searchsorted(times, [start, end], side="left")
    if first == last and start < duration:  # inside a frame that is shown all the while
        return int(first) - 1, 1, float(min(end, duration) - start)
    if first == last:
        raise ValueError(f"{reader.video}: shows no frame in [{start:g}, {end:g}) s; it lasts {duration:.3f} s")
    stop = times[last] if last < reader.count else duration
    return int(first), int(last - first), float(stop - times[first])


def _metadata(reader: FrameReader, count: int, duration: float | None) -> VideoMetadata:
    longest = reader.budget.limits.max_duration
    check_limit(reader.video, "the duration in seconds", duration or 0, longest, "max_duration")
    height, width = reader.size
    return VideoMetadata(
        total_num_frames=count,
        fps=duration and count / duration,
        duration=duration,
        height=height,
        width=width,
        video_backend="pyav",
    )
