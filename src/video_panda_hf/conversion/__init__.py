"""Converts a checkpoint of the reference release for `from_pretrained`. The command is `video-panda convert`."""

from .convert import ConversionError, UploadError, convert_and_push, convert_checkpoint, main


__all__ = ["ConversionError", "UploadError", "convert_and_push", "convert_checkpoint", "main"]
