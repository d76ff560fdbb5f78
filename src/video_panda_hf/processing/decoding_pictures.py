"""Pictures: files of one frame that is no video's. Pillow reads them, which knows their orientation and depth."""

import os
import re
from contextlib import ExitStack
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .decoding_errors import Budget, CorruptVideoError, DecodeLimits, VideoDecodeError, check_picture_size, errors_of
from .decoding_readers import open_reader
from .decoding_source import VideoSource, as_file, describe, is_url, open_source


PICTURE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
PICTURE_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # as Pillow calls them
PICTURE_START = re.compile(rb"BM|\xff\xd8\xff|\x89PNG|II\*\0|MM\0\*|RIFF....WEBP", re.DOTALL)


def decode_picture(source: VideoSource, limits: DecodeLimits | None = None) -> np.ndarray | None:
    """
    The picture that `source` holds, (1, height, width, 3) uint8 RGB, upright, without alpha; `None` if it holds none.
    An animated picture is a video, and so are several JPEGs in a row (raw MJPEG).

    Raises:
        VideoDecodeError: of the kind that tells what is wrong with the source.
    """
    budget = Budget(describe(source), limits or DecodeLimits())
    with ExitStack() as stack:
        stack.enter_context(errors_of(budget.video))
        file = stack.enter_context(as_file(stack.enter_context(open_source(source, budget))))
        file.seek(0)
        if not PICTURE_START.match(file.read(12)):
            return None
        file.seek(0)
        try:
            picture = Image.open(file, formats=PICTURE_FORMATS)
        except (UnidentifiedImageError, Image.DecompressionBombError):  # the decoder says what these are
            return None
        except ValueError as error:  # more text in it than Pillow takes
            raise CorruptVideoError(f"{budget.video}: cannot be read as a picture ({error}).") from error
        if picture.format in ("PNG", "WEBP") and picture.is_animated:
            return None
        check_picture_size(budget.video, picture.height, picture.width, budget.limits)
        is_jpeg = picture.format == "JPEG"
        try:
            pixels = eight_bits(ImageOps.exif_transpose(picture))
        except (OSError, SyntaxError, ValueError) as error:
            raise CorruptVideoError(
                f"{budget.video}: cannot be read as a picture ({error}). Check that the file is complete."
            ) from error
    if is_jpeg and not has_picture_name(source) and is_raw_mjpeg(source, budget):
        return None
    return pixels[None]


def has_picture_name(item) -> bool:
    if not isinstance(item, (str, os.PathLike)):
        return False
    path = re.split(r"[?#]", item)[0] if is_url(item) else os.fspath(item)
    return PurePosixPath(path).suffix.lower() in PICTURE_SUFFIXES


def eight_bits(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):  # 16 bits, which `convert` would clip
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    return np.array(picture.convert("RGB"))


def is_raw_mjpeg(source: VideoSource, budget: Budget) -> bool:
    try:
        with open_reader(source, budget, all_times=False) as reader:
            return reader.count > 1
    except VideoDecodeError:
        return False
