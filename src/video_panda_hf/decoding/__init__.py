"""Frames of video files by their number, exactly, by seeking and within limits; and pictures.

`decode_video` is the function to use. Below it, `sources` opens what a user hands over, `readers` chooses a way
through the file, `index` numbers its frames, `groups` decodes stretches of it, `pixels` makes RGB of them.
"""

from .errors import (
    CorruptVideoError,
    DecodeLimits,
    NotAVideoError,
    UnsupportedCodecError,
    VideoDecodeError,
    VideoDecodeWarning,
    VideoLimitError,
    VideoNetworkError,
    VideoNotFoundError,
    VideoUnreadableError,
)
from .pictures import decode_picture
from .sources import VideoSource
from .video import decode_video, decode_video_or_picture


__all__ = [
    "CorruptVideoError",
    "DecodeLimits",
    "NotAVideoError",
    "UnsupportedCodecError",
    "VideoDecodeError",
    "VideoDecodeWarning",
    "VideoLimitError",
    "VideoNetworkError",
    "VideoNotFoundError",
    "VideoSource",
    "VideoUnreadableError",
    "decode_picture",
    "decode_video",
    "decode_video_or_picture",
]
