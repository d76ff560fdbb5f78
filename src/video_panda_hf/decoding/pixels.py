"""Converts a decoded frame to RGB, upright: its pixels as they are stored, or as a player shows them."""

from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter


# swscale's numbers of the colour matrices (SWS_CS_*), and the one of each AVColorSpace (ITU-T H.273, table 4).
_BT709, _FCC, _BT601, _SMPTE240M, _BT2020 = 1, 4, 5, 7, 9
_MATRICES = {1: _BT709, 4: _FCC, 5: _BT601, 6: _BT601, 7: _SMPTE240M, 9: _BT2020, 10: _BT2020}


def _unnamed(cls: type[SideDataType], value: int) -> SideDataType:
    member = object.__new__(cls)
    member._name_, member._value_ = f"UNNAMED_{value}", value
    return member


if not hasattr(SideDataType, "EXIF"):
    # Before version 19, PyAV cannot read a frame's side data if one entry has a type that it does not name, like EXIF.
    SideDataType._missing_ = classmethod(_unnamed)


@dataclass
class PictureConverter:
    """Converts the frames of one video to RGB pictures of one size.

    * The display matrix is applied if it is a rotation by a multiple of 90° or a mirror.
    * The colour matrix and the range are the file's. Without them they are BT.601 and limited range.
    * Pixels that are not square stay as they are.
    * This is PyAV's own conversion, and decord's and torchcodec's for 8-bit 4:2:0.
    * With `pixels="displayed"` it does as players do. Pixels that are not square are stretched (bicubic), not shrunk,
      and the matrix of a file that names none is BT.709 from 720 lines.
    * More than 8 bits are rounded. HDR is not tone-mapped.
    * Transparency is dropped. Interlaced fields stay interleaved.
    """

    height: int
    width: int
    orientation: "Orientation"
    default_matrix: int
    interpolation: Interpolation
    reformatter: VideoReformatter

    @classmethod
    def of(cls, frame: av.VideoFrame, sample_aspect_ratio: Fraction | None, pixels: str) -> "PictureConverter":
        """The converter for a video whose first frame is `frame`. `pixels` is "stored" or "displayed"."""
        height, width, matrix, interpolation = frame.height, frame.width, _BT601, Interpolation.BILINEAR
        if pixels == "displayed":
            interpolation = Interpolation.BICUBIC
            if sample_aspect_ratio and sample_aspect_ratio > 1:
                width = round(width * sample_aspect_ratio)
            elif sample_aspect_ratio and sample_aspect_ratio > 0:
                height = round(height / sample_aspect_ratio)
            if min(frame.height, frame.width) >= 720:
                matrix = _BT709
        return cls(height, width, Orientation.of(frame), matrix, interpolation, VideoReformatter())

    def another(self) -> "PictureConverter":
        """A copy for another thread."""
        return replace(self, reformatter=VideoReformatter())

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright picture."""
        return (self.width, self.height) if self.orientation.transposed else (self.height, self.width)

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """`frame` as (height, width, 3) uint8 RGB."""
        rgb = self.reformatter.reformat(
            frame,
            width=self.width,
            height=self.height,
            format="rgb24",
            src_colorspace=_MATRICES.get(frame.colorspace, self.default_matrix),
            src_color_range=frame.color_range or _default_range(frame),
            dst_color_range=ColorRange.JPEG,
            interpolation=self.interpolation,
            threads=1,
        )
        return self.orientation.apply(rgb.to_ndarray())


@dataclass(frozen=True)
class Orientation:
    """How to turn a stored picture upright: transpose first, then mirror."""

    transposed: bool = False
    mirror_rows: bool = False
    mirror_columns: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "Orientation":
        """Read from the display matrix of `frame`, which maps stored (x, y) to shown (a·x + c·y, b·x + d·y)."""
        side_data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
        if side_data is None:
            return cls()
        a, b, _, c, d, *_ = np.frombuffer(side_data, dtype=np.int32).tolist()
        if b == c == 0 and a and d:
            return cls(mirror_rows=d < 0, mirror_columns=a < 0)
        if a == d == 0 and b and c:
            return cls(transposed=True, mirror_rows=b < 0, mirror_columns=c < 0)
        return cls()  # other angles are ignored

    def apply(self, picture: np.ndarray) -> np.ndarray:
        if self.transposed:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.mirror_rows else 1, :: -1 if self.mirror_columns else 1]


def _default_range(frame: av.VideoFrame) -> ColorRange:
    return ColorRange.JPEG if frame.format.name.startswith("yuvj") or frame.format.is_rgb else ColorRange.MPEG
