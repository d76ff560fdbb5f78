"""Decodes chosen frames of video files exactly, by seeking, within limits. Also decodes pictures.

Start at `decode_video`. `sources` opens the input, `readers` chooses how to read it, `index` numbers its frames,
`groups` decodes ranges of packets, `pixels` converts frames to RGB. `isolation` lets a `worker` process do all this.
`read_live` reads a video that is still coming in.
"""

from .errors import (
    CorruptVideoError,
    DecodeLimits,
    NotAVideoError,
    UnsupportedCodecError,
    VideoDecodeError,
    VideoDecodeWarning,
    VideoFrameError,
    VideoLimitError,
    VideoNetworkError,
    VideoNotFoundError,
    VideoUnreadableError,
    limits_of,
)
from .isolation import CAN_ISOLATE
from .live import read_live
from .pictures import rgb_of
from .sources import VideoSource
from .video import (
    OpenedVideo,
    decode_image,
    decode_picture,
    decode_video,
    decode_video_or_picture,
    opened_video,
)


__all__ = [
    "CAN_ISOLATE",
    "CorruptVideoError",
    "DecodeLimits",
    "NotAVideoError",
    "OpenedVideo",
    "UnsupportedCodecError",
    "VideoDecodeError",
    "VideoDecodeWarning",
    "VideoFrameError",
    "VideoLimitError",
    "VideoNetworkError",
    "VideoNotFoundError",
    "VideoSource",
    "VideoUnreadableError",
    "decode_image",
    "decode_picture",
    "decode_video",
    "decode_video_or_picture",
    "limits_of",
    "opened_video",
    "read_live",
    "rgb_of",
]
