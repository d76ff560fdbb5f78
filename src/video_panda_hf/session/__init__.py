"""A video that comes in, and questions about it at any time. Also long videos, encoded piece by piece."""

from .encoding import encode_videos
from .session import VideoPandaSession


__all__ = ["VideoPandaSession", "encode_videos"]
