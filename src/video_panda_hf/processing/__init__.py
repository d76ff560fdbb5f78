"""From videos and text to the model's inputs."""

from video_panda_hf.decoding import DecodeLimits, VideoDecodeError, VideoDecodeWarning, decode_video

from .processing_video_panda import ROW_TOKEN, VIDEO_TOKEN, VideoPandaProcessor, timestamp, whole_part
from .templates import read_template
from .video_processing_video_panda import (
    IMAGE_KEYS,
    SETTINGS,
    SOURCE_KEYS,
    VideoPandaVideoProcessor,
    rgb_frames,
    rgb_of,
    source_of,
)


# The conversation that the released model was trained on (Vicuna v1).
CHAT_TEMPLATE = read_template("vicuna")

__all__ = [
    "CHAT_TEMPLATE",
    "IMAGE_KEYS",
    "ROW_TOKEN",
    "SETTINGS",
    "SOURCE_KEYS",
    "VIDEO_TOKEN",
    "DecodeLimits",
    "VideoDecodeError",
    "VideoDecodeWarning",
    "VideoPandaProcessor",
    "VideoPandaVideoProcessor",
    "decode_video",
    "rgb_frames",
    "rgb_of",
    "source_of",
    "timestamp",
    "whole_part",
]
