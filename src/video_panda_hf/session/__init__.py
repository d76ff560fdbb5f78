"""A video that comes in, and questions about it at any time."""

from .session import StopWhenSet, VideoPandaSession


__all__ = ["StopWhenSet", "VideoPandaSession"]
