"""Decodes pictures with Pillow, which handles their orientation and bit depth."""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, TypeGuard

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import (
    Budget,
    CorruptVideoError,
    DecodeLimits,
    NotAVideoError,
    VideoDecodeError,
    VideoUnreadableError,
    check_picture_size,
    errors_of,
)
from .readers import FrameReader, open_reader
from .sources import Look, VideoSource, as_file, describe, is_url, look_at, open_source


PICTURE_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's names
PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
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


class FolderReader(FrameReader):
    """Reads the pictures in a folder as the frames of one video, in the natural order of their names."""

    times = duration = None

    def __init__(self, folder: str | os.PathLike, budget: Budget):
        super().__init__(budget)
        with errors_of(budget.video):
            files = [entry.path for entry in os.scandir(os.fspath(folder)) if is_picture_file(entry)]
        self.files = sorted(files, key=natural_key)
        self.count = len(self.files)
        if not self.files:
            raise VideoUnreadableError(
                f"{budget.video}: is a directory without pictures ({', '.join(PICTURE_SUFFIXES)}). "
                "Pass the path of one video file, or of a folder of pictures."
            )
        self._set_size(*self._picture(0).shape[:2])

    def _decode(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for number in numbers:
            try:
                picture = self._picture(number)
            except CorruptVideoError:
                if self.strict:
                    raise
                continue
            if picture.shape[:2] != self.size:
                raise NotAVideoError(
                    f"{self.files[number]!r}: is of {picture.shape[:2]} (height, width), but the first picture of its "
                    f"folder of {self.size}. The frames of one video have one size."
                )
            yield number, picture

    def _picture(self, number: int) -> np.ndarray:
        self.budget.spend()
        return decode_picture(self.files[number], self.budget.limits)[0]


def is_folder(source: VideoSource) -> TypeGuard[str | os.PathLike]:
    return isinstance(source, (str, os.PathLike)) and not is_url(source) and os.path.isdir(source)


def is_picture_file(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(PICTURE_SUFFIXES) and not entry.name.startswith(".") and entry.is_file()


def natural_key(name: str) -> list:
    """Sorts "9.png" before "10.png"."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]
