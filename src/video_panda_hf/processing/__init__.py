"""From video files and text to the model's inputs."""

from .decoding import decode_video
from .decoding_errors import DecodeLimits, VideoDecodeError, VideoDecodeWarning
from .processing_video_panda import CHAT_TEMPLATE, VideoPandaProcessor
from .video_processing_video_panda import VideoPandaVideoProcessor


__all__ = [
    "CHAT_TEMPLATE",
    "DecodeLimits",
    "VideoDecodeError",
    "VideoDecodeWarning",
    "VideoPandaProcessor",
    "VideoPandaVideoProcessor",
    "decode_video",
]
