"""A video that comes in, and questions about it at any time."""

from .session import VideoPandaSession


__all__ = ["VideoPandaSession"]
