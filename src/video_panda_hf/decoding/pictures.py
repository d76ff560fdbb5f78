"""Decodes pictures with Pillow, which handles their orientation and bit depth."""

import re
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import (
    Budget,
    CorruptVideoError,
    DecodeLimits,
    NotAVideoError,
    VideoDecodeError,
    check_picture_size,
    errors_of,
)
from .readers import open_reader
from .sources import Look, VideoSource, as_file, describe, look_at, open_source


PICTURE_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's names
PICTURE_START = re.compile(rb"BM|\xff\xd8\xff|\x89PNG|II\*\0|MM\0\*|RIFF....WEBP", re.DOTALL)


def decode_picture(source: VideoSource, limits: DecodeLimits | None = None) -> np.ndarray:
    """
    Decodes a picture.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `bytearray`, `memoryview` or `BinaryIO`):
            See `decode_video`.
        limits (`DecodeLimits`, *optional*):
            Limits of size and time. Defaults to `DecodeLimits()`.

    Returns:
        `np.ndarray` of shape `(1, height, width, 3)`: uint8 RGB, upright, without alpha.

    Raises:
        NotAVideoError: If the source is not a picture, or an animated one.
        VideoDecodeError: If the picture cannot be decoded. The subclass tells why.
    """
    budget = Budget(describe(source), limits or DecodeLimits())
    with open_source(source, budget) as readable, errors_of(budget.video):
        picture = read_picture(readable, look_at(readable), budget, may_be_mjpeg=False)
    if picture is None:
        raise NotAVideoError(f"{budget.video}: is not a picture, which the frames of one video must be.")
    return picture


def read_picture(readable: str | BinaryIO, look: Look, budget: Budget, may_be_mjpeg: bool) -> np.ndarray | None:
    """
    The picture in what `open_source` yields, (1, height, width, 3) uint8 RGB, upright, without alpha; `None` if it is
    none. An animated picture is a video. So are several JPEGs in a row (raw MJPEG), checked if `may_be_mjpeg`.
    """
    if not PICTURE_START.match(look.head):
        return None
    with as_file(readable) as file:
        try:
            picture = Image.open(file, formats=PICTURE_FORMATS)
        except (UnidentifiedImageError, Image.DecompressionBombError):  # the video decoder raises a better error
            return None
        except ValueError as error:  # its text chunks exceed Pillow's limit
            raise CorruptVideoError(f"{budget.video}: cannot be read as a picture ({error}).") from error
        if picture.format in ("PNG", "WEBP") and getattr(picture, "is_animated", False):
            return None
        check_picture_size(budget.video, picture.height, picture.width, budget.limits)
        is_jpeg = picture.format == "JPEG"
        try:
            pixels = eight_bits(ImageOps.exif_transpose(picture))
        except (OSError, SyntaxError, ValueError) as error:
            raise CorruptVideoError(
                f"{budget.video}: cannot be read as a picture ({error}). Check that the file is complete."
            ) from error
    if is_jpeg and may_be_mjpeg and is_raw_mjpeg(readable, look, budget):
        return None
    return pixels[None]


def eight_bits(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):  # 16 bits: `convert` would clip
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    return np.array(picture.convert("RGB"))


def is_raw_mjpeg(readable: str | BinaryIO, look: Look, budget: Budget) -> bool:
    try:
        with open_reader(readable, look, budget, all_times=False) as reader:
            return reader.count > 1
    except VideoDecodeError:
        return False
