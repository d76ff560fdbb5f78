"""A checkpoint of the reference release → a folder that `from_pretrained` loads. `video-panda-convert` runs it."""

from .convert import ConversionError, convert_checkpoint, main


__all__ = ["ConversionError", "convert_checkpoint", "main"]
