"""Converts a checkpoint of the reference release for `from_pretrained`. The command is `video-panda-convert`."""

from .convert import ConversionError, convert_checkpoint, main


__all__ = ["ConversionError", "convert_checkpoint", "main"]
