"""A video that comes in, and questions about it at any time. Also long videos, encoded piece by piece."""

from .encoding import encode_videos
from .session import StopWhenSet, VideoPandaSession, add_chosen_frames


__all__ = ["StopWhenSet", "VideoPandaSession", "add_chosen_frames", "encode_videos"]
