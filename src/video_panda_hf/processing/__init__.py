"""From videos and text to the model's inputs."""

from video_panda_hf.decoding import CAN_ISOLATE, DecodeLimits, VideoDecodeError, VideoDecodeWarning, decode_video

from .open_files import opened, opened_file
from .processing_video_panda import FLATTENED, ROW_TOKEN, VIDEO_TOKEN, VideoPandaProcessor, timestamp, whole_part
from .templates import read_template
from .video_processing_video_panda import (
    IMAGE_KEYS,
    SETTINGS,
    SOURCE_KEYS,
    VideoPandaVideoProcessor,
    check_frame_count,
    list_metadata,
    rgb_frames,
    rgb_of,
    source_of,
)


# The conversation that the released model was trained on (Vicuna v1).
CHAT_TEMPLATE = read_template("vicuna")

__all__ = [
    "CAN_ISOLATE",
    "CHAT_TEMPLATE",
    "FLATTENED",
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
    "check_frame_count",
    "decode_video",
    "list_metadata",
    "opened",
    "opened_file",
    "rgb_frames",
    "rgb_of",
    "source_of",
    "timestamp",
    "whole_part",
]
