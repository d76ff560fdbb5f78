"""Frames of a video file by their number: exact, by seeking, within limits.

`decode_video` is the one function to use. It lists the packets of the file (without decoding them), which gives every
frame its number and time; asks the caller which frames are wanted; and decodes only the stretches from the key frame
before a wanted frame to that frame. Containers that store no presentation times are decoded from start to end instead.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence

import av
import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from .decoding_errors import (
    CorruptVideoError,
    Deadline,
    DecodeLimits,
    NotAVideoError,
    VideoDecodeWarning,
    check_limit,
    errors_of,
)
from .decoding_index import FrameIndex, index_frames
from .decoding_pixels import PictureConverter
from .decoding_source import VideoSource, describe, is_url, open_video

MAX_THREADS = 8  # more gain little and hold a frame each
WORTH_A_SEEK = 8  # packets that must be skipped before seeking is cheaper than decoding on
KEPT_BYTES = 64 * 2**20  # decoded frames that a linear pass keeps instead of decoding twice

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
        source: a path, an http(s) URL, the bytes of a file, or a seekable binary file object.
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
    limits = limits or DecodeLimits()
    video = describe(source)
    with open_video(source, limits) as (container, stream):
        with errors_of(video, is_url(source)):
            reader = open_reader(source, container, stream, Deadline(video, limits), limits)
            window = reader.window(start, end)
            metadata = reader.metadata(window)
        indices = _wanted_indices(sample_indices_fn, metadata)
        _check_output(video, indices, metadata, limits)
        with errors_of(video, is_url(source)):
            frames = reader.read([window[index] for index in indices], strict)
    metadata.frames_indices = indices
    return frames, metadata


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


def open_reader(source, container, stream, deadline: Deadline, limits: DecodeLimits) -> "FrameReader":
    """The reader that fits the file: by seeking where packets tell which frames are shown, else from start to end."""
    stream.thread_type = "AUTO"
    stream.thread_count = min(torch.get_num_threads(), MAX_THREADS)
    if limits.max_pixels is not None:
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
    index = index_frames(container, stream, deadline)
    if index is None:
        return LinearReader(source, container, stream, deadline, limits)
    return SeekingReader(source, container, stream, deadline, limits, index)


class FrameReader:
    """What both ways of reading share: the times of the frames, and the picture's size.

    Attributes:
        times: (N,) float seconds from the first frame, at which each frame is shown.
        end: seconds from the first frame to the end of the last one.
    """

    times: np.ndarray
    end: float
    first_frame: av.VideoFrame

    def __init__(self, source, container, stream, deadline: Deadline, limits: DecodeLimits):
        self.source, self.container, self.stream = source, container, stream
        self.deadline, self.limits = deadline, limits
        self.video = describe(source)

    def _use_picture_of(self, frame: av.VideoFrame) -> None:
        """Fixes the size of the pictures by the first frame."""
        self.convert = PictureConverter.of(frame, self.stream.sample_aspect_ratio)
        height, width = self.convert.size
        check_limit(self.video, "the longer side in pixels", max(height, width), self.limits.max_side, "max_side")
        check_limit(self.video, "the number of pixels", height * width, self.limits.max_pixels, "max_pixels")

    def window(self, start: float | None, end: float | None) -> np.ndarray:
        """The numbers of the frames that are shown in [start, end)."""
        if start is not None and end is not None and not start < end:
            raise ValueError(f"the window must have start < end, but start is {start} and end is {end}")
        inside = np.ones(len(self.times), dtype=bool)
        if start is not None:
            inside &= self.times >= start
        if end is not None:
            inside &= self.times < end
        if not inside.any():
            raise ValueError(
                f"{self.video}: no frame is shown in [{start}, {end}) s; the video lasts {self.end:.3f} s"
            )
        return np.flatnonzero(inside)

    def metadata(self, window: np.ndarray) -> VideoMetadata:
        """Describes the frames of `window` as if they were the whole video."""
        last = window[-1] + 1
        duration = (self.times[last] if last < len(self.times) else self.end) - self.times[window[0]]
        check_limit(self.video, "the duration in seconds", duration, self.limits.max_duration, "max_duration")
        height, width = self.convert.size
        return VideoMetadata(
            total_num_frames=len(window),
            fps=float(len(window) / duration) if duration > 0 else float(self.stream.average_rate or 0) or None,
            duration=float(duration),
            height=height,
            width=width,
            video_backend="pyav",
        )

    def read(self, numbers: Sequence[int], strict: bool) -> np.ndarray:
        """The frames of these numbers as (T, height, width, 3) uint8 RGB."""
        frames = np.empty((len(numbers), *self.convert.size, 3), dtype=np.uint8)
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(int(number), []).append(place)
        done: dict[int, int] = {}
        for number, frame in self._decode(sorted(places)):
            first, *others = places[number]
            frames[first] = self.convert(frame)
            frames[others] = frames[first]
            done[number] = first
            if len(done) == len(places):
                break
        missing = [number for number in places if number not in done]
        if missing:
            self._replace_missing(frames, places, done, missing, strict)
        return frames

    def _replace_missing(self, frames, places, done, missing, strict: bool) -> None:
        found = (
            f"{self.video}: {len(missing)} of the {len(places)} frames asked for cannot be decoded "
            f"(the first is frame {min(missing)} of {len(self.times)})"
        )
        if strict or not done:
            raise CorruptVideoError(
                f"{found}. The file is damaged: repair it, or take what is left with `strict=False`."
            )
        warnings.warn(f"{found}; the nearest decoded frames stand in for them.", VideoDecodeWarning, stacklevel=4)
        for number in missing:
            nearest = min(done, key=lambda other: abs(other - number))
            frames[places[number]] = frames[done[nearest]]

    def _decode(self, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields the frames of these ascending numbers, as far as they can be decoded."""
        raise NotImplementedError

    def _feed(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Frames that come out of the decoder when `packet` goes in (`None` drains it); none if the packet is bad."""
        self.deadline.check()
        try:
            return self.stream.codec_context.decode(packet)
        except (av.error.InvalidDataError, av.error.EOFError):
            return []


class SeekingReader(FrameReader):
    """Decodes from the key frame before each wanted frame, and only so far."""

    def __init__(self, source, container, stream, deadline, limits, index: FrameIndex):
        super().__init__(source, container, stream, deadline, limits)
        self.index = index
        if not len(index):
            raise NotAVideoError(f"{self.video}: has a video stream ({stream.name}) but not one frame in it.")
        seconds = float(stream.time_base)
        self.times = (index.times - index.times[0]) * seconds
        self.end = (index.end - index.times[0]) * seconds
        self.position = {int(pts): place for place, pts in enumerate(index.packet_pts)}
        self.first_frame = next((frame for _, frame in self._decode(range(len(index)))), None)
        if self.first_frame is None:
            raise CorruptVideoError(f"{self.video}: none of its {len(index)} frames can be decoded.")
        self._use_picture_of(self.first_frame)

    def _decode(self, numbers):
        for start, run in self._runs(numbers):
            wanted = {int(self.index.packet_pts[self.index.packets[number]]): number for number in run}
            last = max(self.index.packets[number] for number in run)
            for packet in self._packets(start, last):
                for frame in self._feed(packet):
                    if frame.pts in wanted:
                        yield wanted.pop(frame.pts), frame

    def _runs(self, numbers) -> Iterator[tuple[int, list[int]]]:
        """Groups wanted frames so that a seek is made only where it skips more than a few packets."""
        run, start, last = [], 0, -1
        for number in numbers:
            packet, key = int(self.index.packets[number]), int(self.index.starts[number])
            if run and key > last + WORTH_A_SEEK:
                yield start, run
                run = []
            if not run:
                start, last = key, packet
            run.append(number)
            last = max(last, packet)
        if run:
            yield start, run

    def _packets(self, start: int, last: int) -> Iterator[av.Packet | None]:
        """The packets `start` to `last` in the order of decoding, then `None`."""
        for packet in self._from(start):
            place = self.position.get(packet.pts, -1)
            if place >= start:
                yield packet
            if place >= last:
                break
        yield None

    def _from(self, start: int) -> Iterator[av.Packet]:
        """Packets from `start` or a little before: demuxers differ in which of a packet's two times they seek by."""
        for target in (self.index.packet_pts[start], self.index.packet_dts[start], self.index.packet_dts.min()):
            self.container.seek(int(target), stream=self.stream)
            packets = self.container.demux(self.stream)
            first = next(packets)
            if self.position.get(first.pts, len(self.position)) <= start:
                break
        yield first
        yield from packets


class LinearReader(FrameReader):
    """Decodes from start to end: once to count the frames and, if they are too many to keep, again to take some."""

    def __init__(self, source, container, stream, deadline, limits):
        super().__init__(source, container, stream, deadline, limits)
        self.kept: list[av.VideoFrame] | None = []
        pts = []
        for frame in self._decode_all(container, stream):
            if not pts:
                self._use_picture_of(frame)
            pts.append(frame.pts)
            if self.kept is not None:
                self.kept.append(frame)
                if sum(plane.buffer_size for plane in frame.planes) * len(self.kept) > KEPT_BYTES:
                    self.kept = None
        if not pts:
            raise NotAVideoError(f"{self.video}: has a video stream ({stream.name}) but no frame that can be decoded.")
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        if None not in pts and all(a < b for a, b in itertools.pairwise(pts)):
            self.times = (np.array(pts) - pts[0]) * float(stream.time_base)
        else:
            self.times = np.arange(len(pts)) / rate
        self.end = float(self.times[-1] + 1 / rate)

    def _decode(self, numbers):
        if self.kept is not None:
            yield from ((number, self.kept[number]) for number in numbers)
            return
        wanted = set(numbers)
        with open_video(self.source, self.limits) as (container, stream):
            for number, frame in enumerate(self._decode_all(container, stream)):
                if number in wanted:
                    yield number, frame

    def _decode_all(self, container, stream) -> Iterator[av.VideoFrame]:
        self.stream = stream
        for packet in container.demux(stream):
            yield from self._feed(packet)
