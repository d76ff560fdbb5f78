"""Converts a checkpoint of the reference release for `from_pretrained`. The command is `video-panda convert`."""

from video_panda_cli.convert import main

from .convert import ConversionError, UploadError, convert_and_push, convert_checkpoint


__all__ = ["ConversionError", "UploadError", "convert_and_push", "convert_checkpoint", "main"]
