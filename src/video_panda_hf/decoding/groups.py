"""Decodes runs of packets: from a key frame to the last wanted frame after it."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from .errors import LENIENT, Budget, CorruptVideoError
from .index import FrameIndex
from .sources import demux


MAX_THREADS = 8  # more threads gain little, and each holds frames
HELD_BYTES = 256 * 2**20  # of frames that the threads of one decoder hold: fewer threads decode frames above 4K
WORTH_A_SEEK = 8  # packets: to skip more than this, a seek is cheaper than decoding on
# With frame threads, these decoders keep reference frames when they are flushed, as by a seek. The next frame may then
# use a wrong reference, or a missing one, which crashes the process.
_NOT_TO_BE_FLUSHED = {"vp9"}


threads_of_worker = 1  # in a process without torch


def decoding_threads() -> int:
    """Number of threads to decode one video; 1 in a DataLoader worker."""
    torch = sys.modules.get("torch")  # a process that only decodes has no need of it
    return min(torch.get_num_threads() if torch else threads_of_worker, MAX_THREADS)


def prepare_decoder(
    container: InputContainer, stream: VideoStream, budget: Budget, strict: bool, threads: int
) -> None:
    """Sets up and opens the decoder of `stream`.

    Raises:
        CorruptVideoError: if the decoder rejects the codec parameters in the file's header.
    """
    codec = stream.codec_context
    _open_codec(codec, "SLICE" if codec.name in _NOT_TO_BE_FLUSHED else "AUTO", threads, container, budget, strict)


def _open_codec(
    codec: av.CodecContext, thread_type: str, threads: int, container: InputContainer, budget: Budget, strict: bool
) -> None:
    held = 3 * codec.width * codec.height  # bytes that a thread holds: two frames of 8-bit 4:2:0
    codec.thread_type, codec.thread_count = thread_type, max(1, min(threads, HELD_BYTES // max(1, held)))
    if strict and container.format.name != "mpegts":  # a recorded broadcast starts anywhere; that is not damage
        codec.options["err_detect"] = "explode"  # otherwise FFmpeg conceals damage silently
    if budget.limits.max_pixels is not None:
        codec.options["max_pixels"] = str(budget.limits.max_pixels)
    try:
        codec.open()  # explicitly: PyAV 19 drops the codec after a failure
    except av.error.InvalidDataError as error:
        raise CorruptVideoError(
            f"{budget.video}: what its header says of the coding is damaged. Replace or repair the file."
        ) from error


class PacketDecoder:
    """Feeds the packets of one stream to its decoder. `damage` describes the last bad packet, if any."""

    def __init__(self, stream: VideoStream, budget: Budget, strict: bool):
        self.stream, self.budget, self.strict = stream, budget, strict
        self.codec = stream.codec_context
        self.damage: str | None = None

    def feed(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Decodes a packet and returns the frames that come out; `None` drains the decoder.

        Raises:
            CorruptVideoError: if `strict` and the packet cannot be decoded.
        """
        self.budget.spend()
        try:
            return self.codec.decode(packet)
        except av.error.EOFError:  # already drained
            return []
        except (av.error.InvalidDataError, av.error.PermissionError) as error:  # the latter by Theora's decoder
            self.damage = (
                "a packet that cannot be decoded" if packet is None else f"a damaged packet at {_seconds(packet)}"
            )
            if self.strict:
                raise CorruptVideoError(
                    f"{self.budget.video}: found {self.damage}. Repair the file, or pass {LENIENT} to take the rest."
                ) from error
            return []


@dataclass
class Run:
    """Packets to decode: from group `start` to packet `last`. Damage before group `own_start` is ignored."""

    start: int
    own_start: int
    last: int
    wanted: dict[int, int]
    """{presentation time: frame number}"""


class GroupDecoder(PacketDecoder):
    """Decodes chosen frames of one opened container by seeking.

    Several decoders, each with its own container, may share an index if `runs` is called on only one of them.

    Attributes:
        new_codecs: whether a long run may use a new decoder if only that allows frame threads. Its frames lack the
            container's display matrix.
    """

    new_codecs: bool = False

    def __init__(
        self, container: InputContainer, stream: VideoStream, budget: Budget, strict: bool, index: FrameIndex
    ):
        super().__init__(stream, budget, strict)
        self.container, self.index = container, index

    def decode(self, numbers: Iterable[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields (number, frame) of these numbers in any order, as far as they can be decoded."""
        missing = set(numbers)
        damage = None  # only the message: a stored error would keep the decoder alive
        # Some key frames need an earlier start. One that refers to frames before it (open GOP) fails FFmpeg's strict
        # checks. One that begins a gradual refresh is complete only some frames later.
        for groups_back in (0, 1, len(self.index.keys)):
            for run in self.runs(sorted(missing), groups_back):
                try:
                    for number, frame in self.decode_run(run):
                        missing.remove(number)
                        yield number, frame
                except CorruptVideoError as error:
                    damage = str(error)
            if not missing:
                return
        if damage:
            raise CorruptVideoError(damage)

    def runs(self, numbers: Iterable[int], groups_back: int = 0) -> Iterator[Run]:
        """The runs for these ascending numbers. Each starts `groups_back` groups before its first frame's group."""
        run = None
        for number in numbers:
            self._read_times(self.index.group(number))
            group, packet, pts = self.index.locate(number)
            begin = self.index.keys[max(0, group - groups_back)]
            if run and begin > run.last + WORTH_A_SEEK:
                yield run
                run = None
            if not run:
                start = max(0, group - groups_back)
                self._read_times(start)
                run = Run(start, group, packet, {})
            run.wanted[pts] = number
            run.last = max(run.last, packet)
        if run:
            yield run

    def decode_run(self, run: Run) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields (number, frame) of the run's wanted frames, each once, as far as they can be decoded.

        Raises:
            CorruptVideoError: if `strict` and a packet from group `own_start` on is damaged.
        """
        first, harmless = (self.index.keys[group] for group in (run.start, run.own_start))
        key_time, wanted = self.index.pts[first], dict(run.wanted)
        self.codec = self._codec_for(run.last - first)
        packets = zip(range(first, run.last + 1), self._from(run.start), strict=False)
        for place, packet in itertools.chain(packets, [(run.last + 1, None)]):
            if packet is not None and packet.pts < key_time:  # may refer to frames that are not decoded
                continue
            try:
                frames = self._feed_for(wanted, packet)
            except CorruptVideoError:
                if place >= harmless:
                    raise
                continue
            for frame in frames:
                if frame.pts in wanted and not (self.strict and frame.is_corrupt):
                    yield wanted.pop(frame.pts), frame

    def _codec_for(self, packets: int) -> av.CodecContext:
        own = self.stream.codec_context
        is_worth_it = packets >= WORTH_A_SEEK and own.thread_count > 1
        if own.name not in _NOT_TO_BE_FLUSHED or not self.new_codecs or not is_worth_it:
            return own
        codec = av.CodecContext.create(own.name, "r")
        codec.extradata = own.extradata
        _open_codec(codec, "FRAME", own.thread_count, self.container, self.budget, self.strict)
        return codec

    def _feed_for(self, wanted: dict[int, int], packet: av.Packet | None) -> list[av.VideoFrame]:
        """`feed`, but skips frames that are neither wanted nor references of others."""
        skip = "DEFAULT" if packet is None or packet.pts in wanted else "NONREF"
        if self.codec.skip_frame != skip:
            self.codec.skip_frame = skip
        return self.feed(packet)

    def _read_times(self, group: int) -> None:
        if not self.index.is_read(group):
            packets = self.index.packets_of(group)
            found = itertools.islice(self._from(group), packets.stop - packets.start)
            self.index.set_times(group, [packet.pts for packet in found])

    def _from(self, group: int) -> Iterator[av.Packet]:
        """Seeks to `group` and yields its packets and those after it."""
        key, by_pts = self.index.keys[group], self.index.is_read(group)
        key_time = (self.index.pts if by_pts else self.index.dts)[key]
        for target in (self._seek_time(group), self._seek_time(max(0, group - 1)), self.index.dts[0]):
            with suppress(av.FFmpegError):  # try the next target; if all fail, the frames count as missing
                self.container.seek(int(target), stream=self.stream)
            packets = demux(self.container, self.stream, self.budget)
            for packet in packets:
                time = packet.pts if by_pts else packet.dts
                if time == key_time:
                    yield packet
                    yield from packets
                    return
                if packet.is_keyframe and time is not None and time > key_time:  # the seek went too far
                    break

    def _seek_time(self, group: int) -> int:
        """The time to seek to for the key packet of `group`."""
        pts, dts, key = self.index.pts, self.index.dts, self.index.keys[group]
        if self.container.format.name == "mpegts":
            return dts[key]
        if self.index.is_read(group):
            return pts[key]
        delay = pts[0] - dts[0] if self.index.is_read(0) else 0
        return dts[key] + delay


def _seconds(packet: av.Packet) -> str:
    return "an unknown time" if packet.pts is None else f"{float(packet.pts * packet.time_base):.2f} s"
