"""From videos and text to the model's inputs."""

from video_panda_hf.decoding import DecodeLimits, VideoDecodeError, VideoDecodeWarning, decode_video

from .open_files import opened, opened_file
from .processing_video_panda import FLATTENED, ROW_TOKEN, VIDEO_TOKEN, VideoPandaProcessor, timestamp
from .templates import read_template
from .video_processing_video_panda import (
    SETTINGS,
    VideoPandaVideoProcessor,
    check_frame_count,
    list_metadata,
    rgb_frames,
)


# The conversation that the released model was trained on (Vicuna v1).
CHAT_TEMPLATE = read_template("vicuna")

__all__ = [
    "CHAT_TEMPLATE",
    "FLATTENED",
    "ROW_TOKEN",
    "SETTINGS",
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
    "timestamp",
]
