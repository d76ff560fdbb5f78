"""The ways to read frames from an opened video: by seeking, from start to end, or (WebP) with Pillow."""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO

import av
import numpy as np
import PIL.Image
import torch
from av.container import InputContainer
from av.video.stream import VideoStream

from .decoding_errors import (
    Budget,
    CorruptVideoError,
    DecodeLimits,
    NotAVideoError,
    VideoDecodeWarning,
    check_limit,
    errors_of,
)
from .decoding_index import FrameIndex, cut_off, index_frames
from .decoding_pixels import PictureConverter
from .decoding_source import VideoSource, demux, first_bytes, open_source, open_video


DEFAULT_RATE = 25.0  # frames per second where a file tells nothing
MAX_THREADS = 8  # more gain little, and each holds a frame
WORTH_A_SEEK = 8  # packets to be skipped for a seek to be cheaper than decoding on
KEPT_BYTES = 128 * 2**20  # decoded frames that a linear pass keeps, so as not to decode twice


@contextmanager
def open_reader(source: VideoSource, budget: Budget, strict: bool, all_times: bool) -> Iterator["FrameReader"]:
    """Opens `source` with the reader that fits it.

    `all_times` asks for a reader that knows when each frame is shown, which may take longer to open.
    """
    with open_source(source, budget) as readable, ExitStack() as closing:
        with errors_of(budget.video):
            if is_webp(first_bytes(readable)):
                reader = WebpReader(closing.enter_context(open_webp(readable, budget.video)), budget, strict)
            else:
                container, stream = closing.enter_context(open_video(readable, budget))
                _prepare_decoder(container, stream, budget.limits, strict)
                index = index_frames(container, stream, budget, all_times)
                if index is None:
                    reader = LinearReader(readable, container, stream, budget, strict)
                else:
                    reader = SeekingReader(container, stream, budget, strict, index)
        yield reader


def _prepare_decoder(container: InputContainer, stream: VideoStream, limits: DecodeLimits, strict: bool) -> None:
    codec = stream.codec_context
    codec.thread_type = "AUTO"
    codec.thread_count = min(torch.get_num_threads(), MAX_THREADS)  # a DataLoader worker has one
    if strict and container.format.name != "mpegts":  # a broadcast is cut anywhere, which is no damage
        codec.options["err_detect"] = "explode"  # otherwise FFmpeg paints over damage without a word
    if limits.max_pixels is not None:
        codec.options["max_pixels"] = str(limits.max_pixels)


class FrameReader:
    """Reads the frames of one video.

    Attributes:
        count: N, the number of frames.
        duration: seconds from the first frame's start to the last frame's end.
        times: (N,) float64, seconds from the first frame at which each is shown; `None` if not known.
        size: (height, width) of the frames as returned.
    """

    count: int
    duration: float
    times: np.ndarray | None
    size: tuple[int, int]

    def __init__(self, budget: Budget, strict: bool):
        self.budget, self.strict = budget, strict
        self.video = budget.video
        self.damage: str | None = None

    def _set_size(self, height: int, width: int) -> None:
        limits = self.budget.limits
        check_limit(self.video, "its longer side in pixels", max(height, width), limits.max_side, "max_side")
        check_limit(self.video, "its number of pixels", height * width, limits.max_pixels, "max_pixels")
        self.size = height, width

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """The frames of these numbers, in this order, as (T, height, width, 3) uint8 RGB."""
        frames = np.empty((len(numbers), *self.size, 3), dtype=np.uint8)
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(int(number), []).append(place)
        read: dict[int, int] = {}
        for number, frame in self._decode(sorted(places)):
            first, *others = places[number]
            frames[first] = frame
            frames[others] = frames[first]
            read[number] = first
        missing = sorted(places.keys() - read.keys())
        if missing:
            self._stand_in(frames, places, read, missing)
        elif self.damage and not self.strict:
            warnings.warn(f"{self.video}: {self.damage}; frames may show it.", VideoDecodeWarning, stacklevel=3)
        return frames

    def _stand_in(self, frames: np.ndarray, places: dict, read: dict, missing: list[int]) -> None:
        """Puts the nearest frame that was read in the place of each missing one."""
        found = (
            f"{self.video}: {len(missing)} of the {len(places)} frames asked for cannot be decoded, "
            f"first frame {missing[0]} of {self.count}"
        )
        if self.strict or not read:
            raise CorruptVideoError(
                f"{found}. The file is damaged: repair it, or pass `strict=False` to take the rest."
            )
        warnings.warn(f"{found}; the nearest frames stand in for them.", VideoDecodeWarning, stacklevel=4)
        for number in missing:
            nearest = min(read, key=lambda other: abs(other - number))
            frames[places[number]] = frames[read[nearest]]

    def _decode(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number, RGB picture) for these ascending numbers in any order, as far as they can be decoded."""
        raise NotImplementedError


class StreamReader(FrameReader):
    """What both ways of reading a stream with FFmpeg share."""

    def __init__(self, stream: VideoStream, budget: Budget, strict: bool):
        super().__init__(budget, strict)
        self.stream = stream

    def _feed(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """What comes out of the decoder when `packet` goes in; `None` drains it."""
        self.budget.spend()
        try:
            return self.stream.codec_context.decode(packet)
        except av.error.EOFError:  # already drained
            return []
        except av.error.InvalidDataError as error:
            self.damage = (
                "a packet that cannot be decoded" if packet is None else f"a damaged packet at {_seconds(packet)}"
            )
            if self.strict:
                raise CorruptVideoError(
                    f"{self.video}: found {self.damage}. Repair the file, or pass `strict=False` to take the rest."
                ) from error
            return []

    def _check_end(self, container: InputContainer, end: float) -> None:
        """Notes if the file ends before it should; `end` is when its last frame ends, on its own clock."""
        if missing := cut_off(container, self.stream, end):
            self.damage = missing
            if self.strict:
                raise CorruptVideoError(
                    f"{self.video}: is cut off: {missing}. {self.count} frames can be had: "
                    "fetch the file again, or pass `strict=False` to take those."
                )

    def _use_picture_of(self, frame: av.VideoFrame) -> None:
        """Fixes the size and orientation of all frames by the first."""
        self.convert = PictureConverter.of(frame, self.stream.sample_aspect_ratio)
        self._set_size(*self.convert.size)


class SeekingReader(StreamReader):
    """Decodes from the key frame before each wanted frame, and only so far."""

    def __init__(
        self, container: InputContainer, stream: VideoStream, budget: Budget, strict: bool, index: FrameIndex
    ):
        super().__init__(stream, budget, strict)
        self.container, self.index = container, index
        self.count = len(index)
        seconds = float(stream.time_base)
        self.duration = index.duration * seconds
        self.times = None if index.times is None else index.times * seconds
        if self.times is not None:
            self._check_end(container, float(index.pts.min() * stream.time_base) + self.duration)
        number, frame = self._find_first_frame()
        self._use_picture_of(frame)
        self.first_picture = number, self.convert(frame)

    def _find_first_frame(self) -> tuple[int, av.VideoFrame]:
        """(number, frame) of the first frame; if `strict` is off, of the first that is left."""
        for numbers in [0], range(0 if self.strict else self.count):
            for number, frame in self._decode_frames(numbers):
                return number, frame
        raise CorruptVideoError(
            f"{self.video}: frame 0 of {self.count} cannot be decoded. The file is damaged: replace or repair it."
        )

    def _decode(self, numbers):
        if self.first_picture[0] in numbers:
            yield self.first_picture
        others = [number for number in numbers if number != self.first_picture[0]]
        for number, frame in self._decode_frames(others):
            yield number, self.convert(frame)

    def _decode_frames(self, numbers: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields these frames in any order, as far as they can be decoded."""
        missing, damage = set(numbers), None
        # Some key frames need a start further back: one that refers to what came before (open GOP) fails the strict
        # checks of FFmpeg, one that begins a gradual refresh is whole only some frames later.
        for groups_back in (0, 1, len(self.index.keys)):
            for start, own_start, last, wanted in self._runs(sorted(missing), groups_back):
                try:
                    for frame in self._decode_run(start, own_start, last, wanted):
                        number = wanted.pop(frame.pts)
                        missing.remove(number)
                        yield number, frame
                except CorruptVideoError as error:
                    damage = error
            if not missing:
                return
        if damage:
            raise damage

    def _decode_run(self, start: int, own_start: int, last: int, wanted: dict[int, int]) -> Iterator[av.VideoFrame]:
        """Decodes from group `start` to packet `last`; damage before group `own_start` does no harm."""
        first, harmless = (self.index.keys[group] for group in (start, own_start))
        key_time = self.index.pts[first]
        packets = itertools.chain(zip(range(first, last + 1), self._from(start), strict=False), [(last + 1, None)])
        for place, packet in packets:
            if packet is not None and packet.pts < key_time:  # refers to what is not decoded
                continue
            try:
                frames = self._feed_for(wanted, packet)
            except CorruptVideoError:
                if place >= harmless:
                    raise
                continue
            for frame in frames:
                if frame.pts in wanted and not (self.strict and frame.is_corrupt):
                    yield frame

    def _runs(self, numbers: Sequence[int], groups_back: int) -> Iterator[tuple[int, int, int, dict[int, int]]]:
        """The stretches to decode for these frames, each from `groups_back` groups before it would have to begin.

        Yields (group to start at, group it would have to begin at, last packet, {presentation time: wanted number}).
        """
        start, last, wanted = 0, -1, {}
        for number in numbers:
            self._read_times(self.index.group(number))
            group, packet, pts = self.index.locate(number)
            begin = self.index.keys[max(0, group - groups_back)]
            if wanted and begin > last + WORTH_A_SEEK:
                yield max(0, start - groups_back), start, last, wanted
                wanted = {}
            if not wanted:
                start, last = group, packet
                self._read_times(max(0, group - groups_back))
            wanted[pts] = number
            last = max(last, packet)
        if wanted:
            yield max(0, start - groups_back), start, last, wanted

    def _read_times(self, group: int) -> None:
        if not self.index.is_read(group):
            packets = self.index.packets_of(group)
            found = itertools.islice(self._from(group), packets.stop - packets.start)
            self.index.set_times(group, [packet.pts for packet in found])

    def _feed_for(self, wanted: dict[int, int], packet: av.Packet | None) -> list[av.VideoFrame]:
        """`_feed`, but frames that are neither wanted nor referred to by others are not decoded."""
        skip = "DEFAULT" if packet is None or packet.pts in wanted else "NONREF"
        if self.stream.codec_context.skip_frame != skip:
            self.stream.codec_context.skip_frame = skip
        return self._feed(packet)

    def _from(self, group: int) -> Iterator[av.Packet]:
        """Seeks to `group` and yields its packets and those after it."""
        key, by_pts = self.index.keys[group], self.index.is_read(group)
        key_time = (self.index.pts if by_pts else self.index.dts)[key]
        for target in (self._seek_time(group), self._seek_time(max(0, group - 1)), self.index.dts[0]):
            with suppress(av.FFmpegError):  # the next target may do; if none does, the frames are found missing
                self.container.seek(int(target), stream=self.stream)
            packets = demux(self.container, self.stream, self.budget)
            for packet in packets:
                time = packet.pts if by_pts else packet.dts
                if time == key_time:
                    yield packet
                    yield from packets
                    return
                if packet.is_keyframe and time is not None and time > key_time:  # landed too late
                    break

    def _seek_time(self, group: int) -> int:
        """The time that, given to the demuxer, should lead to the key packet of `group`."""
        pts, dts, key = self.index.pts, self.index.dts, self.index.keys[group]
        if self.container.format.name == "mpegts":
            return dts[key]
        if self.index.is_read(group):
            return pts[key]
        delay = pts[0] - dts[0] if self.index.is_read(0) else 0
        return dts[key] + delay


class LinearReader(StreamReader):
    """Decodes from start to end: once to count the frames and, if they are too many to keep, again to take some."""

    def __init__(
        self,
        readable: str | BinaryIO,
        container: InputContainer,
        stream: VideoStream,
        budget: Budget,
        strict: bool,
    ):
        super().__init__(stream, budget, strict)
        self.readable = readable
        self.kept: list[av.VideoFrame] | None = []
        pts = []
        for frame in self._decode_all(container, stream):
            if not pts:
                self._use_picture_of(frame)
            pts.append(frame.pts)
            self._keep(frame)
        if not pts:
            raise NotAVideoError(f"{self.video}: has a video stream ({stream.name}) but not one frame in it.")
        self.count = len(pts)
        rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
        if None in pts or any(a >= b for a, b in itertools.pairwise(pts)):
            self.times = np.arange(self.count) / rate
        else:
            self.times = (np.array(pts) - pts[0]) * float(stream.time_base)
        self.duration = float(self.times[-1] + 1 / rate)
        self._check_end(container, self.duration + (stream.start_time or 0) * float(stream.time_base))

    def _keep(self, frame: av.VideoFrame) -> None:
        if self.kept is not None:
            self.kept.append(frame)
            if len(self.kept) * sum(plane.buffer_size for plane in frame.planes) > KEPT_BYTES:
                self.kept = None

    def _decode(self, numbers):
        if self.kept is not None:
            yield from ((number, self.convert(self.kept[number])) for number in numbers)
            return
        wanted = set(numbers)
        if not isinstance(self.readable, str):
            self.readable.seek(0)
        with open_video(self.readable, self.budget) as (container, stream):
            _prepare_decoder(container, stream, self.budget.limits, self.strict)
            for number, frame in enumerate(self._decode_all(container, stream)):
                if number in wanted:
                    yield number, self.convert(frame)
                if number >= numbers[-1]:
                    break

    def _decode_all(self, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
        self.stream = stream
        for packet in itertools.chain(demux(container, stream, self.budget), [None]):
            yield from self._feed(packet)


class WebpReader(FrameReader):
    """Reads WebP, moving or still, of which FFmpeg knows only the still kind."""

    def __init__(self, image: PIL.Image.Image, budget: Budget, strict: bool):
        super().__init__(budget, strict)
        self.image = image
        self._set_size(image.height, image.width)
        self.count = getattr(image, "n_frames", 1)
        durations = np.array([self._picture(number).info.get("duration", 0) / 1000 for number in range(self.count)])
        self.duration = float(durations.sum()) or self.count / DEFAULT_RATE
        self.times = np.cumsum(durations) - durations

    def _decode(self, numbers):
        return ((number, np.asarray(self._picture(number).convert("RGB"))) for number in numbers)

    def _picture(self, number: int) -> PIL.Image.Image:
        self.budget.spend()
        try:
            self.image.seek(number)
            self.image.load()
        except (OSError, EOFError, ValueError) as error:
            raise CorruptVideoError(
                f"{self.video}: frame {number} of {self.count} cannot be decoded ({error}). Replace the file."
            ) from error
        return self.image


def is_webp(start: bytes) -> bool:
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP"


@contextmanager
def open_webp(readable: str | BinaryIO, video: str) -> Iterator[PIL.Image.Image]:
    """Opens what `open_source` yields with Pillow."""
    try:
        image = PIL.Image.open(readable.removeprefix("file:") if isinstance(readable, str) else readable)
    except (PIL.UnidentifiedImageError, PIL.Image.DecompressionBombError, OSError, EOFError, ValueError) as error:
        raise NotAVideoError(f"{video}: begins like WebP but cannot be opened ({error}). Replace the file.") from error
    with image:
        yield image


def _seconds(packet: av.Packet | None) -> str:
    return (
        "an unknown time" if packet is None or packet.pts is None else f"{float(packet.pts * packet.time_base):.2f} s"
    )
