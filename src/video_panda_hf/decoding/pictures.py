"""Decodes pictures with Pillow, which handles their orientation and bit depth."""

import base64
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import BinaryIO, TypeGuard

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import (
    Budget,
    CorruptVideoError,
    NotAVideoError,
    VideoDecodeError,
    VideoLimitError,
    VideoUnreadableError,
    check_picture_size,
    errors_of,
)
from .readers import FrameReader, open_reader
from .sources import Look, VideoSource, as_file, describe, is_data_url, is_url, look_at, open_source


PICTURE_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's names
PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS_OF_OTHER_PROGRAMS = {"EPS"}  # Pillow has them read by Ghostscript
SHORTEST_PICTURE = 32  # bytes
PICTURE_START = re.compile(rb"BM|\xff\xd8\xff|\x89PNG|II\*\0|MM\0\*|RIFF....WEBP", re.DOTALL)


@contextmanager
def open_source_as(kind: str, source: VideoSource, budget: Budget, all_times: bool = False) -> Iterator[FrameReader]:
    """
    Opens a source with a suitable reader.

    `kind` says what it may be: "video", "video or picture", "video or picture, no mjpeg" (without looking whether a
    JPEG is a raw MJPEG video), "picture", or "image" (in any format of Pillow).
    """
    if kind not in ("picture", "image") and (isinstance(source, list) or is_folder(source)):
        yield PicturesReader(source if isinstance(source, list) else pictures_in(source, budget.video), budget)
        return
    with open_source(source, budget) as readable:
        picture = None
        with errors_of(budget.video):
            look = look_at(readable, budget.video)
            if kind == "image":
                picture = read_image(readable, budget)
            elif kind != "video":
                picture = read_picture(readable, look, budget, may_be_mjpeg=kind == "video or picture")
        if picture is not None:
            yield PictureReader(picture, budget)
        elif kind == "picture":
            raise NotAVideoError(f"{budget.video}: is not a picture, which the frames of one video must be.")
        else:
            with open_reader(readable, look, budget, all_times) as reader:
                yield reader


class PictureReader(FrameReader):
    """One picture (1, height, width, 3)."""

    count, duration, times, is_picture = 1, None, None, True

    def __init__(self, picture: np.ndarray, budget: Budget):
        super().__init__(budget)
        self.picture = picture
        self._set_size(*picture.shape[1:3])

    def _decode(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        return ((number, self.picture[0]) for number in numbers)


def read_image(readable: str | BinaryIO, budget: Budget) -> np.ndarray:
    Image.init()
    formats = sorted(set(Image.OPEN) - FORMATS_OF_OTHER_PROGRAMS)
    with as_file(readable) as file:
        try:
            picture = Image.open(file, formats=formats)
        except UnidentifiedImageError as error:
            raise NotAVideoError(f"{budget.video}: is not a picture in a format that Pillow reads.") from error
        except Image.DecompressionBombError as error:
            raise VideoLimitError(f"{budget.video}: {error}") from error
        except (SyntaxError, ValueError) as error:
            raise CorruptVideoError(f"{budget.video}: cannot be read as a picture ({error}).") from error
        return pixels_of(picture, budget)


def bytes_of_base64(source: VideoSource) -> VideoSource:
    """The file in a string of base64, as `transformers.image_utils.load_image` takes it. All else stays as it is."""
    if not isinstance(source, str) or is_url(source) or is_data_url(source) or os.path.exists(source):
        return source
    try:
        data = base64.b64decode("".join(source.split()), validate=True)
    except ValueError:
        return source
    return data if len(data) >= SHORTEST_PICTURE else source  # a short name of a missing file may look like base64


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
        pixels = pixels_of(picture, budget)
        is_jpeg = picture.format == "JPEG"
    if is_jpeg and may_be_mjpeg and is_raw_mjpeg(readable, look, budget):
        return None
    return pixels


def pixels_of(picture: Image.Image, budget: Budget) -> np.ndarray:
    check_picture_size(budget.video, picture.height, picture.width, budget.limits)
    try:
        return rgb_of(picture)[None]
    except (EOFError, OSError, SyntaxError, ValueError) as error:
        raise CorruptVideoError(
            f"{budget.video}: cannot be read as a picture ({error}). Check that the file is complete."
        ) from error


def rgb_of(picture: Image.Image) -> np.ndarray:
    """The pixels of a PIL picture, (height, width, 3) uint8: upright, without alpha, 16 bits scaled to 8."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits: `convert` would clip
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    return np.array(picture.convert("RGB"))


def is_raw_mjpeg(readable: str | BinaryIO, look: Look, budget: Budget) -> bool:
    try:
        with open_reader(readable, look, budget, all_times=False) as reader:
            return reader.count > 1
    except VideoDecodeError:
        return False


def pictures_in(folder: str | os.PathLike, video: str) -> list[str | os.PathLike]:
    """The pictures in a folder, in the natural order of their names."""
    with errors_of(video):
        files = [entry.path for entry in os.scandir(os.fspath(folder)) if is_picture_file(entry)]
    if not files:
        raise VideoUnreadableError(
            f"{video}: is a directory without pictures ({', '.join(PICTURE_SUFFIXES)}). "
            "Pass the path of one video file, or of a folder of pictures."
        )
    return sorted(files, key=natural_key)


class PicturesReader(FrameReader):
    """Reads picture files as the frames of one video."""

    times = duration = None

    def __init__(self, files: list[str | os.PathLike], budget: Budget):
        super().__init__(budget)
        self.files, self.count = files, len(files)
        if not files:
            raise NotAVideoError(f"{budget.video}: is an empty list. Give the names of picture files.")
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
                    f"video of {self.size}. The frames of one video have one size."
                )
            yield number, picture

    def _picture(self, number: int) -> np.ndarray:
        self.budget.spend()
        budget = copy(self.budget)
        budget.video = describe(self.files[number])
        with open_source_as("picture", self.files[number], budget) as reader:
            (picture,) = reader.read([0])
        self.budget.fetched = budget.fetched
        return picture


def is_folder(source: VideoSource) -> TypeGuard[str | os.PathLike]:
    return isinstance(source, (str, os.PathLike)) and not is_url(source) and os.path.isdir(source)


def is_picture_file(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(PICTURE_SUFFIXES) and not entry.name.startswith(".") and entry.is_file()


def natural_key(name: str) -> list:
    """Sorts "9.png" before "10.png"."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]
