"""Which frames a video has, when each is shown, and where decoding must start to get it."""

from dataclasses import dataclass

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from .decoding_errors import Deadline

# Containers in which every packet carries the presentation time of the one frame it holds.
_TIMED_CONTAINERS = {
    "mov",
    "mp4",
    "matroska",
    "webm",
    "mpegts",
    "flv",
    "asf",
    "ivf",
    "gif",
    "apng",
    "nut",
    "mxf",
    "ogg",
}
# Codecs that may spread one frame over packets, or hide frames that are decoded and never shown.
_UNTIMED_CODECS = {"theora"}


@dataclass
class FrameIndex:
    """The packets of a video stream, which hold one frame each. N frames are shown, some packets may not be.

    * `packet_pts`, `packet_dts` (packets,): presentation and decoding times of the packets, in the stream's time base,
      in the order of decoding.
    * `packets` (N,): the packet of frame n, in the order of presentation.
    * `starts` (N,): the key packet at which decoding must start for frame n. It is the last one before `packets[n]`
      that is not shown after n: frames that follow a key frame in the file but are shown before it (open GOP) may
      refer to frames before the key frame.
    """

    packet_pts: np.ndarray
    packet_dts: np.ndarray
    packets: np.ndarray
    starts: np.ndarray
    end: int

    def __len__(self) -> int:
        return len(self.packets)

    @property
    def times(self) -> np.ndarray:
        """(N,) int64: when each frame is shown, in the stream's time base."""
        return self.packet_pts[self.packets]


def index_frames(container: InputContainer, stream: VideoStream, deadline: Deadline) -> FrameIndex | None:
    """Reads the packets' headers; `None` if they do not tell which frames are shown, so that only decoding can."""
    names = set(container.format.name.split(","))
    if not names & _TIMED_CONTAINERS or stream.codec_context.name in _UNTIMED_CODECS:
        return None
    pts, dts, is_key, is_shown, end = [], [], [], [], 0
    for packet in container.demux(stream):
        deadline.check()
        if packet.size == 0 and packet.dts is None:  # the flush packet after the last
            break
        if packet.pts is None:
            return None
        pts.append(packet.pts)
        dts.append(packet.dts if packet.dts is not None else packet.pts)
        is_key.append(packet.is_keyframe)
        is_shown.append(not packet.is_discard and not _is_hidden(packet, stream))
        end = max(end, packet.pts + (packet.duration or 0))
    pts, dts, is_key, is_shown = (np.array(values) for values in (pts, dts, is_key, is_shown))
    if len(np.unique(pts[is_shown])) < is_shown.sum():
        return None
    packets = np.flatnonzero(is_shown)
    packets = packets[np.argsort(pts[packets], kind="stable")]
    return FrameIndex(pts, dts, packets, _starts(pts, is_key, packets), end)


def _is_hidden(packet, stream: VideoStream) -> bool:
    """Whether a VP8 packet holds a frame that is only referred to, never shown (RFC 6386 9.1: bit 4 of byte 0)."""
    return stream.codec_context.name in ("vp8", "libvpx") and packet.size > 0 and not memoryview(packet)[0] >> 4 & 1


def _starts(pts: np.ndarray, is_key: np.ndarray, packets: np.ndarray) -> np.ndarray:
    keys = np.flatnonzero(is_key)
    starts = np.zeros(len(packets), dtype=np.int64)
    if not len(keys):
        return starts
    chosen = np.searchsorted(keys, packets, side="right") - 1
    for _ in range(len(keys)):
        shown_later = (chosen >= 0) & (pts[keys[chosen]] > pts[packets])
        if not shown_later.any():
            break
        chosen[shown_later] -= 1
    return np.where(chosen >= 0, keys[chosen], 0)
