"""The ways to read frames from an opened video: by seeking, from start to end, or (WebP) with Pillow."""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.stream import VideoStream

from .decoding_errors import Budget, CorruptVideoError, DecodeLimits, NotAVideoError, VideoDecodeWarning, check_limit
from .decoding_index import FrameIndex, index_frames
from .decoding_pixels import PictureConverter
from .decoding_source import VideoSource, open_video


MAX_THREADS = 8  # more gain little, and each holds a frame
WORTH_A_SEEK = 8  # packets to be skipped for a seek to be cheaper than decoding on
KEPT_BYTES = 128 * 2**20  # decoded frames that a linear pass keeps, so as not to decode twice


def open_reader(
    source: VideoSource,
    container: InputContainer,
    stream: VideoStream,
    budget: Budget,
    strict: bool,
    all_times: bool,
) -> "FrameReader":
    """The reader that fits: by seeking if the packets tell which frames are shown, else from start to end."""
    _prepare_decoder(stream, budget.limits, strict)
    index = index_frames(container, stream, budget, all_times)
    if index is None:
        return LinearReader(source, container, stream, budget, strict)
    return SeekingReader(container, stream, budget, strict, index)


def _prepare_decoder(stream: VideoStream, limits: DecodeLimits, strict: bool) -> None:
    codec = stream.codec_context
    codec.thread_type = "AUTO"
    codec.thread_count = min(torch.get_num_threads(), MAX_THREADS)  # a DataLoader worker has one
    if strict:
        codec.options["err_detect"] = "explode"  # otherwise FFmpeg paints over damage without a word
    if limits.max_pixels is not None:
        codec.options["max_pixels"] = str(limits.max_pixels)


class FrameReader:
    """Reads the frames of one video stream.

    Attributes:
        count: N, the number of frames.
        duration: seconds from the first frame's start to the last frame's end.
        times: (N,) float64, seconds from the first frame at which each is shown; `None` if not known.
        size: (height, width) of the frames as returned.
    """

    count: int
    duration: float
    times: np.ndarray | None
    convert: PictureConverter

    def __init__(self, stream: VideoStream, budget: Budget, strict: bool):
        self.stream, self.budget, self.strict = stream, budget, strict
        self.video = budget.video
        self.damage: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.convert.size

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """The frames of these numbers, in this order, as (T, height, width, 3) uint8 RGB."""
        frames = np.empty((len(numbers), *self.size, 3), dtype=np.uint8)
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(int(number), []).append(place)
        read: dict[int, int] = {}
        for number, frame in self._decode(sorted(places)):
            first, *others = places[number]
            frames[first] = self.convert(frame)
            frames[others] = frames[first]
            read[number] = first
        missing = sorted(places.keys() - read.keys())
        if missing:
            self._stand_in(frames, places, read, missing)
        elif self.damage:
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

    def _decode(self, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields the frames of these ascending numbers in any order, as far as they can be decoded."""
        raise NotImplementedError

    def _feed(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """What comes out of the decoder when `packet` goes in; `None` drains it."""
        self.budget.spend(packet)
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

    def _use_picture_of(self, frame: av.VideoFrame) -> None:
        """Fixes the size and orientation of all frames by the first."""
        self.convert = PictureConverter.of(frame, self.stream.sample_aspect_ratio)
        height, width = self.size
        limits = self.budget.limits
        check_limit(self.video, "the longer side in pixels", max(height, width), limits.max_side, "max_side")
        check_limit(self.video, "the number of pixels", height * width, limits.max_pixels, "max_pixels")


class SeekingReader(FrameReader):
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
        self.first_frame: tuple[int, av.VideoFrame] | None = None
        self.first_frame = next(self._decode([0]), None) or next(self._decode(range(self.count)), None)
        if self.first_frame is None:
            raise CorruptVideoError(f"{self.video}: none of its {self.count} frames can be decoded.")
        self._use_picture_of(self.first_frame[1])

    def _decode(self, numbers):
        missing = list(numbers)
        if self.first_frame and self.first_frame[0] in missing:
            missing.remove(self.first_frame[0])
            yield self.first_frame
        # Some key frames (gradual refresh) are whole only some frames later; what comes before needs an earlier start.
        for groups_back in (0, 1, len(self.index.keys)):
            for number, frame in self._decode_from(tuple(missing), groups_back):
                missing.remove(number)
                yield number, frame
            if not missing:
                break

    def _decode_from(self, numbers: Sequence[int], groups_back: int) -> Iterator[tuple[int, av.VideoFrame]]:
        for start, last, wanted in self._runs(numbers, groups_back):
            for packet in itertools.chain(self._decodable(start, last), [None]):
                for frame in self._feed_for(wanted, packet):
                    if frame.pts in wanted:
                        yield wanted[frame.pts], frame

    def _runs(self, numbers: Sequence[int], groups_back: int) -> Iterator[tuple[int, int, dict[int, int]]]:
        """The stretches to decode: (group to start at, last packet, {presentation time: wanted number})."""
        start, last, wanted = 0, -1, {}
        for number in numbers:
            self._read_times(self.index.group(number))
            group, packet, pts = self.index.locate(number)
            group = max(0, group - groups_back)
            self._read_times(group)
            if wanted and self.index.keys[group] > last + WORTH_A_SEEK:
                yield start, last, wanted
                wanted = {}
            if not wanted:
                start, last = group, packet
            wanted[pts] = number
            last = max(last, packet)
        if wanted:
            yield start, last, wanted

    def _read_times(self, group: int) -> None:
        if not self.index.is_read(group):
            last = self.index.packets_of(group).stop - 1
            self.index.set_times(group, [packet.pts for packet in self._packets(group, last)])

    def _feed_for(self, wanted: dict[int, int], packet: av.Packet | None) -> list[av.VideoFrame]:
        """`_feed`, but frames that are neither wanted nor referred to by others are not decoded."""
        skip = "DEFAULT" if packet is None or packet.pts in wanted else "NONREF"
        if self.stream.codec_context.skip_frame != skip:
            self.stream.codec_context.skip_frame = skip
        return self._feed(packet)

    def _decodable(self, group: int, last: int) -> Iterator[av.Packet]:
        """`_packets` without those that are shown before the first key frame and may refer to what is not decoded."""
        key_time = self.index.pts[self.index.keys[group]]
        return (packet for packet in self._packets(group, last) if group == 0 or packet.pts >= key_time)

    def _packets(self, group: int, last: int) -> Iterator[av.Packet]:
        """The packets from `group` to number `last` in the order of decoding."""
        return itertools.islice(self._from(group), last + 1 - int(self.index.keys[group]))

    def _from(self, group: int) -> Iterator[av.Packet]:
        """Seeks to `group` and yields its packets and those after it."""
        key, by_pts = self.index.keys[group], self.index.is_read(group)
        key_time = (self.index.pts if by_pts else self.index.dts)[key]
        start = min(self.index.dts[0], self.index.pts[0])
        for target in (self._seek_time(group), self._seek_time(max(0, group - 1)), start):
            with suppress(av.error.PermissionError):  # "cannot seek", as an mp4 file without key frames says
                self.container.seek(int(target), stream=self.stream)
            packets = (packet for packet in self.container.demux(self.stream) if packet.size)
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


class LinearReader(FrameReader):
    """Decodes from start to end: once to count the frames and, if they are too many to keep, again to take some."""

    def __init__(
        self, source: VideoSource, container: InputContainer, stream: VideoStream, budget: Budget, strict: bool
    ):
        super().__init__(stream, budget, strict)
        self.source = source
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
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        if None in pts or any(a >= b for a, b in itertools.pairwise(pts)):
            self.times = np.arange(self.count) / rate
        else:
            self.times = (np.array(pts) - pts[0]) * float(stream.time_base)
        self.duration = float(self.times[-1] + 1 / rate)

    def _keep(self, frame: av.VideoFrame) -> None:
        if self.kept is not None:
            self.kept.append(frame)
            if len(self.kept) * sum(plane.buffer_size for plane in frame.planes) > KEPT_BYTES:
                self.kept = None

    def _decode(self, numbers):
        if self.kept is not None:
            yield from ((number, self.kept[number]) for number in numbers)
            return
        wanted = set(numbers)
        with open_video(self.source, self.budget.limits) as (container, stream):
            _prepare_decoder(stream, self.budget.limits, self.strict)
            for number, frame in enumerate(self._decode_all(container, stream)):
                if number in wanted:
                    yield number, frame
                if number >= numbers[-1]:
                    break

    def _decode_all(self, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
        self.stream = stream
        for packet in container.demux(stream):
            yield from self._feed(packet)


def _seconds(packet: av.Packet | None) -> str:
    return (
        "an unknown time" if packet is None or packet.pts is None else f"{float(packet.pts * packet.time_base):.2f} s"
    )
