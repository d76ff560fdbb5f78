"""Frames of a video file by their number: exact, by seeking, within limits.

`decode_video` is the one function to use. It lists the packets of the file (without decoding them), which gives every
frame its number and time; asks the caller which frames are wanted; and decodes only the stretches from the key frame
before a wanted frame to that frame. Containers that store no presentation times are decoded from start to end instead.
"""

from collections.abc import Callable, Sequence

import numpy as np
from transformers.video_utils import VideoMetadata

from .errors import Budget, DecodeLimits, check_limit, decoders_end_here, errors_of
from .pictures import read_picture
from .readers import FrameReader, open_reader
from .sources import VideoSource, describe, look_at, open_source


SampleIndicesFn = Callable[[VideoMetadata], Sequence[int]]


def decode_video(
    source: VideoSource,
    sample_indices_fn: SampleIndicesFn | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
    limits: DecodeLimits | None = None,
    strict: bool = True,
) -> tuple[np.ndarray, VideoMetadata]:
    """Decodes frames of a video.

    Args:
        source: a path, an http(s) or base64 data URL, the bytes of a file, or a seekable binary file object.
        sample_indices_fn: called once with the metadata (all but `frames_indices` filled); returns the numbers of the
            wanted frames, counted from 0 in the order of presentation, in any order and with repetitions. `None`: all.
        start, end: a window in seconds from the first frame. Only frames presented in [start, end) are counted, as if
            the file were cut there.
        limits: what the video may cost (default `DecodeLimits()`).
        strict: raise if the video is damaged. If `False`, a frame that cannot be decoded is replaced by the nearest
            one that can, and a `VideoDecodeWarning` tells.

    Returns:
        frames: (T, height, width, 3) uint8 RGB, upright and with square pixels (see `PictureConverter`).
        metadata: `total_num_frames` and `duration` (seconds) of the window, `fps` (average), `height` and `width` of
            the frames, `frames_indices` as wanted, `video_backend` "pyav".

    Raises:
        VideoDecodeError: of the kind that tells what is wrong with the video.
        IndexError: if a wanted frame does not exist.
    """
    with decoders_end_here():
        return _decode_video(source, sample_indices_fn, (start, end), limits or DecodeLimits(), strict)


def decode_video_or_picture(
    source: VideoSource,
    sample_indices_fn: SampleIndicesFn | None = None,
    *,
    limits: DecodeLimits | None = None,
    strict: bool = True,
    may_be_mjpeg: bool = True,
) -> tuple[np.ndarray, VideoMetadata]:
    """
    `decode_video` for a file that may hold a picture. That is one frame, read by Pillow; the function is not called.

    Args:
        may_be_mjpeg: whether a JPEG may be the first of several, which are a video then. That takes a second look.
    """
    pictures = {"may_be_mjpeg": may_be_mjpeg}
    with decoders_end_here():
        return _decode_video(source, sample_indices_fn, (None, None), limits or DecodeLimits(), strict, pictures)


def _decode_video(
    source: VideoSource,
    sample_indices_fn: SampleIndicesFn | None,
    window: tuple[float | None, float | None],
    limits: DecodeLimits,
    strict: bool,
    pictures: dict | None = None,
) -> tuple[np.ndarray, VideoMetadata]:
    budget = Budget(describe(source), limits, strict)
    with open_source(source, budget) as readable:
        with errors_of(budget.video):
            look = look_at(readable)
            picture = None if pictures is None else read_picture(readable, look, budget, **pictures)
        if picture is not None:
            return picture, _metadata_of_picture(picture)
        with open_reader(readable, look, budget, all_times=window != (None, None)) as reader:
            first, count, duration = _window(reader, *window)
            metadata = _metadata(reader, count, duration, limits)
            indices = _wanted_indices(sample_indices_fn, metadata)
            _check_output(budget.video, indices, metadata, limits)
            with errors_of(budget.video):
                frames = reader.read([first + index for index in indices])
    metadata.frames_indices = indices
    return frames, metadata


def _metadata_of_picture(picture: np.ndarray) -> VideoMetadata:
    _, height, width, _ = picture.shape
    return VideoMetadata(1, height=height, width=width, frames_indices=[0], video_backend="pillow")


def _window(reader: FrameReader, start: float | None, end: float | None) -> tuple[int, int, float]:
    """(number of the first frame, number of frames, seconds) of what is shown in [start, end)."""
    if start is None and end is None:
        return 0, reader.count, reader.duration
    start, end = start or 0.0, np.inf if end is None else end
    if not start < end:
        raise ValueError(f"a window needs start < end, but start is {start:g} and end is {end:g}")
    times = reader.times
    assert times is not None  # opened with `all_times`
    first, last = np.searchsorted(times, [start, end], side="left")
    if first == last:
        raise ValueError(f"{reader.video}: shows no frame in [{start:g}, {end:g}) s; it lasts {reader.duration:.3f} s")
    stop = times[last] if last < reader.count else reader.duration
    return int(first), int(last - first), float(stop - times[first])


def _metadata(reader: FrameReader, count: int, duration: float, limits: DecodeLimits) -> VideoMetadata:
    check_limit(reader.video, "the duration in seconds", duration, limits.max_duration, "max_duration")
    height, width = reader.size
    return VideoMetadata(
        total_num_frames=count,
        fps=count / duration,
        duration=duration,
        height=height,
        width=width,
        video_backend="pyav",
    )


def _wanted_indices(sample_indices_fn: SampleIndicesFn | None, metadata: VideoMetadata) -> list[int]:
    total = metadata.total_num_frames
    if sample_indices_fn is None:
        return list(range(total))
    indices = [int(index) for index in sample_indices_fn(metadata)]
    outside = [index for index in indices if not 0 <= index < total]
    if outside:
        raise IndexError(f"frame {outside[0]} was asked for, but the video has frames 0 to {total - 1}")
    return indices


def _check_output(video: str, indices: list[int], metadata: VideoMetadata, limits: DecodeLimits) -> None:
    check_limit(video, "the number of frames asked for", len(indices), limits.max_frames, "max_frames")
    size = len(indices) * metadata.height * metadata.width * 3
    check_limit(video, "the size in bytes of the frames asked for", size, limits.max_output_bytes, "max_output_bytes")
