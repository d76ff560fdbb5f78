"""The frames of a video: their times, and where decoding must start for each."""

import math
import re
from array import array
from dataclasses import dataclass

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from .errors import Budget
from .sources import demux


# Containers in which every packet holds one frame and its presentation time.
_TIMED_CONTAINERS = {"mov", "matroska", "mpegts", "flv", "asf", "ivf", "gif", "nut", "ogg"}
# Codecs that may put each field of an interlaced frame into its own packet.
_FIELD_CODECS = {"h264", "hevc", "vc1"}
# Codecs for which the demuxer trusts the container's key frame flags and does not check the packets.
_UNCHECKED_CODECS = {"hevc", "mpeg1video", "mpeg2video", "mpeg4", "h263"}
_NOT_CODED_VOP = 8  # bytes; a smaller MPEG-4 packet is empty (vop_coded = 0) and gives no frame
_END_OF_DIRAC = 13  # bytes; a packet of this size only says that the stream ends
# Containers whose streams have a duration that FFmpeg estimates, or that is the whole file's. See `sources.look_at`.
_NO_DURATION_OF_STREAM = {"mpegts", "asf"}
DEFAULT_RATE = 25  # frames per second, if the file has no rate
_NEW_CLOCK = 60  # seconds, see `longest_step`
_PROGRESSIVE = (0, 1)  # AVFieldOrder unknown and progressive
_UNKNOWN, _NEVER = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass
class FrameIndex:
    """The P packets of a video stream in decoding order, in G groups, with N presented frames.

    A group is a key packet and all packets before the next key packet. All frames of earlier groups are presented
    before it, so the frames of a group have consecutive numbers. All times are in ticks of the stream's time base.

    * `pts`, `dts` (P,): presentation and decoding time of each packet. For an mp4 file, the presentation times of a
      group are `_UNKNOWN` until its packets are read.
    * `shown` (P,) bool: whether the packet's frame is presented. An edit list can cut it off.
    * `keys` (G,): first packet of each group.
    * `first_numbers` (G + 1,): number of each group's first frame; the last entry is N.
    * `duration`: from the start of the first frame to the end of the last one.
    """

    pts: np.ndarray
    dts: np.ndarray
    shown: np.ndarray
    keys: np.ndarray
    first_numbers: np.ndarray
    duration: int

    @classmethod
    def of(cls, pts, dts, is_key, shown, duration: int) -> "FrameIndex":
        keys = np.flatnonzero(is_key)
        numbers = np.concatenate([[0], np.cumsum(shown)])
        return cls(pts, dts, shown, keys, numbers[np.append(keys, len(shown))], duration)

    def __len__(self) -> int:
        return int(self.first_numbers[-1])

    @property
    def times(self) -> np.ndarray | None:
        """(N,) presentation times from the first frame on; `None` if a group is not read yet."""
        times = np.sort(self.pts[self.shown])
        return times - times[0] if times[0] != _UNKNOWN else None

    def group(self, number: int) -> int:
        """The group that frame `number` belongs to."""
        return int(np.searchsorted(self.first_numbers, number, side="right")) - 1

    def packets_of(self, group: int) -> slice:
        last = self.keys[group + 1] if group + 1 < len(self.keys) else len(self.pts)
        return slice(int(self.keys[group]), int(last))

    def is_read(self, group: int) -> bool:
        """Whether the presentation times of the group's packets are known."""
        return self.pts[self.keys[group]] != _UNKNOWN

    def set_times(self, group: int, times: list[int]) -> None:
        """Sets the presentation times of a group's packets: fewer than packets if the file ends within the group."""
        packets = self.packets_of(group)
        self.pts[packets] = times + [_NEVER] * (packets.stop - packets.start - len(times))

    def locate(self, number: int) -> tuple[int, int, int]:
        """(group to start decoding at, packet, presentation time) of frame `number`. Its group must be read.

        In an open GOP, a frame that is presented before its key frame may refer to the previous group.
        """
        group = self.group(number)
        packets = self.packets_of(group)
        shown = np.flatnonzero(self.shown[packets]) + packets.start
        packet = shown[np.argsort(self.pts[shown], kind="stable")[number - self.first_numbers[group]]]
        pts = self.pts[packet]
        is_leading = pts < self.pts[self.keys[group]]
        return max(0, group - int(is_leading)), int(packet), int(pts)


def index_frames(container: InputContainer, stream: VideoStream, budget: Budget, all_times: bool) -> FrameIndex | None:
    """Finds the frames of a video without decoding. `None` if only decoding can find them.

    The header of an mp4 or mov file lists its packets. For other files, or with `all_times`, every packet is read.
    """
    if not _packets_tell_frames(container, stream):
        return None
    index = None if all_times else _index_from_header(container, stream)
    return index or _index_from_packets(container, stream, budget)


def cut_off(container: InputContainer, stream: VideoStream, end: float) -> str | None:
    """Describes how a file is truncated, or `None` if it is not. All its packets must have been read.

    `end` is the end of its last frame, in seconds on the file's clock.
    """
    if container.format.name in _NO_DURATION_OF_STREAM:
        return None
    if "mov" in container.format.name:
        listed, size = len(stream.index_entries), container.size
        inside = sum(entry.pos + entry.size <= size for entry in stream.index_entries)
        return f"only {inside} of the {listed} packets in its header are in the file" if inside < listed else None
    declared = _declared_duration(container, stream)
    return f"it declares {declared:.2f} s but ends after {end:.2f} s" if end < 0.9 * declared else None


def longest_step(container: InputContainer, stream: VideoStream) -> float:
    """The most ticks from one frame to the next. A longer step is the start of another recording.

    A frame of MPEG-TS lasts at most 0.7 s (ISO 13818-1, 2.7.4). Where the clock falls back by a minute or more, FFmpeg
    takes it for one that overflows, and the next frame seems to come some hours later.
    """
    return _NEW_CLOCK / stream.time_base if container.format.name == "mpegts" else math.inf


def _declared_duration(container: InputContainer, stream: VideoStream) -> float:
    """Duration in the header, in seconds; 0 if it has none."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if written := re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):  # Matroska
        hours, minutes, seconds = map(float, written.groups())
        return 3600 * hours + 60 * minutes + seconds
    if len(container.streams) == 1 and container.duration:
        return container.duration / av.time_base
    return 0.0


def _packets_tell_frames(container: InputContainer, stream: VideoStream) -> bool:
    codec = stream.codec_context
    field_order = getattr(codec, "field_order", _PROGRESSIVE[0])  # PyAV has it since version 18
    if codec.name in _FIELD_CODECS and field_order not in _PROGRESSIVE:
        return False
    formats = set(container.format.name.split(","))
    return bool(formats & _TIMED_CONTAINERS) or ("avi" in formats and codec.codec.intra_only)


def _index_from_header(container: InputContainer, stream: VideoStream) -> FrameIndex | None:
    """The index of an mp4 or mov file, without presentation times. `None` if its header is not sufficient."""
    if "mov" not in container.format.name or not stream.frames or stream.codec_context.name == "mpeg4":
        return None
    dts, is_key, shown, size = array("q"), bytearray(), bytearray(), container.size
    for entry in stream.index_entries:
        if not 0 < entry.size <= size - entry.pos:  # this entry gives no packet
            return None
        dts.append(entry.timestamp)
        is_key.append(entry.is_keyframe)
        shown.append(not entry.is_discard)
    dts, is_key, shown = np.array(dts), np.array(is_key, dtype=bool), np.array(shown, dtype=bool)
    if is_key.all() and not stream.codec_context.codec.intra_only:  # the table of key frames is probably missing
        return None
    if len(dts) < 2 or not is_key[0] or not shown.any() or (np.diff(dts) <= 0).any():
        return None
    listed = dts[-1] - dts[shown][0] + (dts[-1] - dts[-2])
    if not stream.duration or abs(stream.duration - listed) > max(0.05 * listed, 1 / stream.time_base):
        return None  # more packets follow in fragments, or the header is wrong
    return FrameIndex.of(np.full(len(dts), _UNKNOWN), dts, is_key, shown, stream.duration)


def _index_from_packets(container: InputContainer, stream: VideoStream, budget: Budget) -> FrameIndex | None:
    is_mpeg4, is_vp8, is_dirac = (stream.codec_context.name == name for name in ("mpeg4", "vp8", "dirac"))
    latest, longest = None, longest_step(container, stream)
    pts, dts, is_key, shown, end = array("q"), array("q"), bytearray(), bytearray(), _UNKNOWN
    for packet in demux(container, stream, budget):
        if packet.pts is None or (is_mpeg4 and packet.size < _NOT_CODED_VOP):
            return None
        if is_dirac and packet.size <= _END_OF_DIRAC:
            continue
        if packet.dts is not None:
            if latest is not None and not 0 <= packet.dts - latest <= longest:
                return None  # its clock starts anew: two recordings in a row
            latest = packet.dts
        if not is_key and not packet.is_keyframe:  # cut from a longer video: these frames cannot be decoded
            continue
        pts.append(packet.pts)
        dts.append(packet.pts if packet.dts is None else packet.dts)
        is_key.append(packet.is_keyframe)
        shown.append(not packet.is_discard and not (is_vp8 and _is_hidden(packet)))
        if shown[-1]:
            end = max(end, packet.pts + (packet.duration or 0))
    if not pts:
        return None
    pts, dts = np.array(pts), np.array(dts)
    is_key, shown = np.array(is_key, dtype=bool), np.array(shown, dtype=bool)
    shown &= pts >= pts[0]  # frames presented before the first key frame refer to frames that were cut off
    if not shown.any() or len(np.unique(pts[shown])) < shown.sum():
        return None
    if is_key.all() and stream.codec_context.name in _UNCHECKED_CODECS:
        is_key[1:] = False
    is_key &= _begins_a_group(pts)
    first, last = pts[shown].min(), pts[shown].max()
    if end == last:  # the last packet has no duration
        rate = stream.average_rate or DEFAULT_RATE
        end += max(1, round((last - first) / (shown.sum() - 1) if last > first else 1 / (rate * stream.time_base)))
    return FrameIndex.of(pts, dts, is_key, shown, int(end - first))


def _is_hidden(packet: av.Packet) -> bool:
    """Whether a VP8 packet holds a reference frame that is never shown (RFC 6386 9.1: bit 4 of byte 0)."""
    return not memoryview(packet)[0] >> 4 & 1


def _begins_a_group(pts: np.ndarray) -> np.ndarray:
    """(P,) bool: whether this packet and all after it are presented after all packets before it."""
    latest_before = np.concatenate([[_UNKNOWN], np.maximum.accumulate(pts)[:-1]])
    earliest_after = np.minimum.accumulate(pts[::-1])[::-1]
    return latest_before < earliest_after
