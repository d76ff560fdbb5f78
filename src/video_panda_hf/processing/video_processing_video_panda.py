"""Videos of any kind → the packed patches and grids that Video-Panda takes: sample, resize, patchify, normalise."""

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeGuard

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tvF
from transformers import BaseVideoProcessor, BatchFeature, TensorType, VideosKwargs
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    load_image,
)
from transformers.processing_utils import Unpack
from transformers.video_utils import VideoMetadata


try:
    from video_panda_hf import decoding
except ImportError:  # this file came with a checkpoint, and the package is not installed
    decoding = None  # type: ignore[assignment]


class VideoPandaVideoProcessorKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]
    r"""
    patch_size (`int`, *optional*, defaults to 14):
        Side of a patch in pixels.
    merge_size (`int`, *optional*, defaults to 2):
        Side of the window of patches that the model turns into one token. Frames get sides that are multiples of
        `patch_size * merge_size`.
    frames_per_clip (`int`, *optional*, defaults to 4):
        Frames of one clip of the model. A video has 1 frame (an image) or a multiple of this.
    max_frames (`int`, *optional*):
        With `fps`: the most frames a video may have.
    decode_limits (`dict` or `DecodeLimits`, *optional*):
        What decoding one video may cost, for example `{"max_side": 4096, "max_seconds": 30}`.
    strict_decoding (`bool`, *optional*, defaults to `True`):
        Whether a damaged video is an error. If not, the nearest frames stand in for what cannot be decoded, and a
        `VideoDecodeWarning` tells.
    pixels (`str`, *optional*, defaults to `"stored"`):
        `"stored"` reads the pixels of a file as they are, as the released weights were trained. `"displayed"` reads
        what a player shows, see `decode_video`.
    max_video_tokens (`int`, *optional*):
        The most tokens that a video may take: it gets fewer frames, a multiple of `frames_per_clip`. `<row>` counts.
    timestamps (`bool`, *optional*, defaults to `False`):
        Whether the processor writes the time (`mm:ss`) before the tokens of each clip. The released weights have not
        seen it.
    """

    patch_size: int
    merge_size: int
    frames_per_clip: int
    max_frames: int | None
    decode_limits: dict | Any | None
    strict_decoding: bool
    pixels: str
    max_video_tokens: int | None
    timestamps: bool


class VideoPandaVideoProcessor(BaseVideoProcessor):
    """
    Turns videos into `pixel_values_videos`, float `(sum of T·h·w, 3·patch_size²)`, and `video_grid_thw`, int64
    `(videos, 3)`: frames, rows and columns of every video in patches.

    The longer side of a frame becomes `size["longest_edge"]`, the shorter one keeps the aspect ratio, rounded up to a
    multiple of `patch_size * merge_size`.

    A video is a path (also of a folder of pictures), an http(s) URL, bytes, a binary file object, an array or tensor
    (T, H, W, C), (T, C, H, W) or, where it can be no picture, (T, H, W), or a list of frames (PIL images, arrays,
    tensors; or picture files). For a part of a file, give a dictionary with "video" (or "path", "url") and "start" and
    "end" in seconds, or "indices", the numbers of its frames. Pixels are uint8, or floating point of the same range
    0..255 (0..1 with `do_rescale=False`). Grey frames become RGB, an alpha channel is dropped.

    `num_frames` (8) are spread over the video as `sample_frame_indices` says. `fps` takes frames at this rate, or
    `max_frames` spread over the whole video if that would be more. The last frame is repeated where a video is too
    short. Frames in memory, lists of picture files and folders are sampled as well, by the rate in `video_metadata` or
    evenly. A picture on its own (or as a list of one frame) is an image: T = 1, never repeated.

    Raises:
        ValueError: if a video has neither 1 frame nor a multiple of `frames_per_clip`, or if both `num_frames` and
            `fps` are given.
        VideoDecodeError: (a `ValueError`) for a video that it cannot read.
    """

    resample = PILImageResampling.BICUBIC
    size = {"longest_edge": 448}
    default_to_square = False
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    patch_size = 14
    merge_size = 2
    frames_per_clip = 4
    num_frames = 8
    fps = None
    max_frames = None
    decode_limits = None
    strict_decoding = True
    pixels = "stored"
    max_video_tokens = None
    timestamps = False
    valid_kwargs = VideoPandaVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    temporal_patch_size = property(lambda self: self.frames_per_clip)  # engines call it so

    def __init__(self, **kwargs: Unpack[VideoPandaVideoProcessorKwargs]):
        check_sampling(**kwargs)
        if decoding is not None and (limits := decoding.limits_of(kwargs.get("decode_limits"))) is not None:
            kwargs["decode_limits"] = dataclasses.asdict(limits)  # a dictionary, which JSON can hold
        super().__init__(**kwargs)
        if self.fps is not None:
            self.num_frames = None
        check_sampling(self.num_frames, self.fps, self.max_frames, self.frames_per_clip)

    # Methods, so that the processor uses this module's classes: it may come from another copy of the code.
    def list_videos(self, videos) -> list:
        return list_videos(videos)

    def list_pictures(self, images) -> list:
        return list_pictures(images)

    def preprocess(self, videos, **kwargs: Unpack[VideoPandaVideoProcessorKwargs]) -> BatchFeature:
        videos = list_videos(videos)
        if not videos:
            raise ValueError("there is no video among `videos`")
        check_sampling(**kwargs)
        how = self.how_to_decode(*(kwargs.pop(name, None) for name in ("decode_limits", "strict_decoding", "pixels")))
        videos = [dataclasses.replace(v, **how) if isinstance(v, EncodedVideo) else v for v in videos]
        for files in filter(is_list_of_files, videos):
            files[:] = [EncodedVideo(getattr(file, "source", file), **how) for file in files]
        # `fps` in the call replaces the processor's own `num_frames`, and the reverse.
        if kwargs.get("fps") is not None:
            kwargs["num_frames"] = None
        elif kwargs.get("num_frames") is not None:
            kwargs["fps"] = None
        by_rate = kwargs.get("fps") is not None or (self.fps is not None and kwargs.get("num_frames") is None)
        check_max_frames(kwargs.get("max_frames"), by_rate)
        wanted = 0 if by_rate else kwargs.get("num_frames") or self.num_frames
        if kwargs.get("do_sample_frames") and any(is_list_of_files(v) and 1 < len(v) < wanted for v in videos):
            raise ValueError(  # in the words of transformers, whose tests ask for it
                "Sampling frames from a list of images is not supported! Set `do_sample_frames=False`, "
                f"or give at least `num_frames` = {wanted} of them."
            )
        return super().preprocess(videos, **kwargs)

    def sample_frames(
        self, metadata, num_frames=None, fps=None, max_frames=None, frames_per_clip=None, max_video_tokens=None, **rest
    ) -> np.ndarray:
        """The frames to take of a video, int64 indices; see the class for the rules. `metadata` needs
        `total_num_frames`, `fps` for sampling by rate, and `height` and `width` for `max_video_tokens`."""
        if num_frames is None and fps is None:
            num_frames, fps = self.num_frames, self.fps
        max_frames = self.max_frames if max_frames is None else max_frames
        frames_per_clip = frames_per_clip or self.frames_per_clip
        check_sampling(num_frames, fps, max_frames, frames_per_clip)
        if (budget := max_video_tokens or self.max_video_tokens) is not None:
            fitting = self._frames_within(budget, metadata, frames_per_clip, rest)
            num_frames = num_frames and min(num_frames, fitting)
            max_frames = fitting if max_frames is None else min(max_frames, fitting)

        if fps is None:
            return sample_frame_indices(metadata.total_num_frames, metadata.fps, num_frames)
        if metadata.fps is None:
            raise ValueError(
                "sampling by `fps` needs the video's own rate: give `video_metadata` with `fps` and "
                "`total_num_frames`, or give `num_frames`"
            )
        return sample_frame_indices_by_rate(metadata.total_num_frames, metadata.fps, fps, max_frames, frames_per_clip)

    def _frames_within(self, budget: int, metadata: VideoMetadata, frames_per_clip: int, settings: dict) -> int:
        """How many frames of a video take at most `budget` tokens."""
        tokens = frames_per_clip * self.tokens_of_frame(metadata.height, metadata.width, **settings)
        if budget < tokens:
            raise ValueError(
                f"`max_video_tokens` = {budget}, but one clip of this video of {metadata.width}×{metadata.height} "
                f"pixels takes {tokens}"
            )
        return budget // tokens * frames_per_clip

    def fetch_videos(self, video_url_or_urls, sample_indices_fn=None):
        """Decode a video → (frames (T, H, W, 3) uint8, metadata), or a list of them → [all frames, all metadata]."""
        if isinstance(video_url_or_urls, list):
            decoded = [self.fetch_videos(video, sample_indices_fn) for video in video_url_or_urls]
            return list(zip(*decoded, strict=True))
        (video,) = list_videos(video_url_or_urls)
        return dataclasses.replace(video, **self.how_to_decode()).decode(sample_indices_fn)

    def how_to_decode(self, decode_limits=None, strict_decoding=None, pixels=None) -> dict:
        strict = self.strict_decoding if strict_decoding is None else strict_decoding
        limits = decode_limits or self.decode_limits
        limits = limits if decoding is None else decoding.limits_of(limits)
        return {"limits": limits, "strict": strict, "pixels": pixels or self.pixels}

    def _decode_and_sample_videos(self, videos, video_metadata=None, do_sample_frames=None, sample_indices_fn=None):
        frames, metadata = [], []
        for video, given in zip(videos, list_metadata(video_metadata, videos), strict=True):
            sample = self._own_sampling(video, sample_indices_fn)
            if is_frames(video):
                video, given = self._sample_in_memory(video, given, sample)
            else:
                video, given = video.decode(sample, given and given.fps)
            frames.append(video)
            metadata.append(given)
        return frames, metadata

    def _own_sampling(self, video, sample_indices_fn):
        """The function that samples this video: settings that stand beside it replace those of the call."""
        own = getattr(video, "sampling", None)
        if not own:
            return sample_indices_fn
        if "num_frames" in own or "fps" in own:
            own = {"num_frames": None, "fps": None, **own}
        sample = partial(sample_indices_fn or partial(self.sample_frames, fps=self.fps), **own)
        check_max_frames(own.get("max_frames"), by_rate=sample.keywords.get("fps") is not None)
        return sample

    def _sample_in_memory(self, video, metadata: VideoMetadata | None, sample_indices_fn):
        metadata = metadata or VideoMetadata(total_num_frames=len(video))
        if sample_indices_fn is None or len(video) == 1:
            if metadata.total_num_frames == len(video):  # else they were chosen before, and only the caller knows how
                metadata.frames_indices = list(range(len(video)))
            return video, metadata
        if metadata.total_num_frames != len(video):
            raise ValueError(f"video_metadata says {metadata.total_num_frames} frames, the video has {len(video)}")
        if metadata.height is None:
            metadata.height, metadata.width = rgb_frames(video[:1]).shape[2:]
        indices = sample_indices_fn(metadata=metadata)
        metadata.frames_indices = indices
        return [video[i] for i in indices] if isinstance(video, list) else video[indices], metadata

    def _prepare_input_videos(self, videos, do_convert_rgb=None, input_data_format=None, device=None):
        """Frames → (T, 3, H, W). RGB whatever `do_convert_rgb` says: patches have no room for other channels."""
        return [rgb_frames(video, input_data_format).to(device) for video in videos]

    def _preprocess(
        self,
        videos: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        patch_size: int,
        merge_size: int,
        frames_per_clip: int,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        patches, grids = [], []
        for index, frames in enumerate(videos):
            check_frame_count(len(frames), frames_per_clip, f"video {index} of the call")
            if do_rescale and frames.is_floating_point() and 0 < frames.max() <= 1:
                raise ValueError("floating point frames of the range 0..1 are scaled already: pass `do_rescale=False`")
            if do_resize:
                frames = self.resize(frames, size, resample, patch_size * merge_size)
            cut, grid = patchify(frames, patch_size, merge_size)
            patches.append(cut)
            grids.append(grid)
        # Scaled last, all at once: bytes are cut and joined faster than floats.
        pixels = self.rescale_and_normalize(
            torch.cat(patches), do_rescale, rescale_factor, do_normalize, image_mean, image_std
        )
        data = {
            "pixel_values_videos": pixels.flatten(1).to(torch.float32),
            "video_grid_thw": torch.tensor(grids, dtype=torch.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def resize(self, image: torch.Tensor, size: SizeDict, resample=None, factor: int | None = None, **kwargs):
        """Frames (T, 3, H, W) → (T, 3, H', W'), see `resized_size`. `factor` is the side of a token in pixels."""
        if not size.longest_edge:
            raise ValueError(f"`size` must be {{'longest_edge': pixels}}, the side of the canvas, not {dict(size)}")
        factor = factor or self.patch_size * self.merge_size
        height, width = image.shape[-2:]
        height, width = resized_size(height, width, size.longest_edge, factor)
        return super().resize(image, SizeDict(height=height, width=width), resample)

    def get_num_of_video_patches(self, num_frames: int, height: int, width: int, videos_kwargs: dict | None = None):
        """Patches, i.e. rows of `pixel_values_videos`, of `num_frames` sampled frames of height × width pixels."""
        rows, columns = self.grid_of(height, width, **(videos_kwargs or {}))
        return num_frames * rows * columns

    def grid_of(self, height: int, width: int, **given) -> tuple[int, int]:
        """Rows and columns of patches of a frame of height × width pixels, with settings as in a call."""
        size = given.get("size") or self.size
        patch_size = given.get("patch_size") or self.patch_size
        factor = patch_size * (given.get("merge_size") or self.merge_size)
        if given.get("do_resize", self.do_resize):
            height, width = resized_size(height, width, size["longest_edge"], factor)
        return height // patch_size, width // patch_size

    def tokens_of_frame(self, height: int, width: int, **given) -> int:
        """The tokens of a frame of height × width pixels: its context, and its rows with their `<row>`."""
        merge_size = given.get("merge_size") or self.merge_size
        rows, columns = (count // merge_size for count in self.grid_of(height, width, **given))
        return 1 + rows * (columns + 1)


# Sizes and frames: pure functions of numbers


def resized_size(height: int, width: int, longest_edge: int, factor: int) -> tuple[int, int]:
    """The longer side becomes `longest_edge`. The shorter keeps the aspect ratio, rounded up to a multiple of
    `factor`. Integers only, because a rounding error of floats could add a row of tokens."""
    if longest_edge % factor:
        raise ValueError(f"the longest edge, {longest_edge}, is not a multiple of {factor} (patch_size · merge_size)")
    short, long = min(height, width), max(height, width)
    short = -(-longest_edge * short // (long * factor)) * factor
    return (short, longest_edge) if height < width else (longest_edge, short)


def sample_frame_indices(num_frames_in_file: int, rate: float | None, num_frames: int) -> np.ndarray:
    """
    The numbers of `num_frames` frames, int64, of a video of `rate` frames a second, chosen as in training.

    Candidates are one frame a second. Too many are thinned out evenly; if they are too few, frames closer together are
    taken. Without a rate, every frame is a candidate. A video of fewer frames gives all, the last one repeated.
    """
    if num_frames_in_file < 1:
        raise ValueError("a video without frames")
    last = num_frames_in_file - 1
    if num_frames_in_file <= num_frames:
        return np.minimum(np.arange(num_frames), last)
    positions = np.arange(0, num_frames_in_file, max(1, round(rate or 1)))
    if len(positions) < num_frames:
        step = max(1, last // (num_frames - 1))
        return np.arange(num_frames) * step
    return positions[np.linspace(0, len(positions) - 1, num_frames).astype(int)]


def sample_frame_indices_by_rate(
    num_frames_in_file: int, rate: float, fps: float, max_frames: int | None, frames_per_clip: int
) -> np.ndarray:
    """
    The numbers of the frames at 0, 1/fps, 2/fps … seconds, int64, of a video of `rate` frames a second.

    If those are more than `max_frames`, that many are spread over the whole video. The last one is repeated up to a
    multiple of `frames_per_clip`.
    """
    count = max(1, int(num_frames_in_file * fps / rate + 1e-6))
    if max_frames is not None and count > max_frames:
        return np.linspace(0, num_frames_in_file - 1, max_frames).astype(int)
    indices = np.minimum((np.arange(count) * rate / fps + 1e-6).astype(int), num_frames_in_file - 1)
    return np.pad(indices, (0, -count % frames_per_clip), mode="edge")


def check_frame_count(count: int, frames_per_clip: int, what: str) -> None:
    """`what` is the setting or the video that gave `count`, named in the error."""
    if count != 1 and (count < 1 or count % frames_per_clip):
        raise ValueError(
            f"{what}: a video has 1 frame or a multiple of {frames_per_clip} (`frames_per_clip`), not {count}"
        )


def check_sampling(
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    frames_per_clip: int | None = None,
    pixels: str | None = None,
    **kwargs,
) -> None:
    """Raises `ValueError` for settings that no video can have. Counts are checked where `frames_per_clip` is given."""
    if pixels not in (None, "stored", "displayed"):
        raise ValueError(f'`pixels` is "stored" or "displayed", not {pixels!r}')
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"`fps` is a number of frames a second above 0, not {fps}")
    if num_frames is not None and fps is not None:
        raise ValueError(f"`num_frames` ({num_frames}) and `fps` ({fps}) are mutually exclusive: give one of them")
    for name, count in (("num_frames", num_frames), ("max_frames", max_frames)):
        if count is not None and frames_per_clip is not None:
            check_frame_count(count, frames_per_clip, f"`{name}` = {count}")


def check_max_frames(max_frames: int | None, by_rate: bool) -> None:
    if max_frames is not None and not by_rate:
        raise ValueError(f"`max_frames` = {max_frames} limits `fps`: give both, or `num_frames` for that many frames")


# Frames → patches


def patchify(frames: torch.Tensor, patch_size: int, merge_size: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """(T, 3, H, W) → (T·h·w, 3, patch_size, patch_size) in the order (frame, row, column), and the grid (T, h, w)."""
    num_frames, channels, height, width = frames.shape
    if height % (patch_size * merge_size) or width % (patch_size * merge_size):
        raise ValueError(
            f"frames of {height}×{width} pixels: without `do_resize` both sides must be multiples of "
            f"{patch_size * merge_size} (patch_size · merge_size)"
        )
    h, w = height // patch_size, width // patch_size
    patches = frames.reshape(num_frames, channels, h, patch_size, w, patch_size).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(num_frames * h * w, channels, patch_size, patch_size), (num_frames, h, w)


def rgb_frames(video, input_data_format: str | ChannelDimension | None = None) -> torch.Tensor:
    """An array, a tensor or a list of frames → (T, 3, H, W), as uint8 or as the floating point it came in. An array is
    not copied, and keeps its memory layout, for bytes with the channels last are resized fastest."""
    if isinstance(video, list):
        if is_list_of_files(video):
            video, input_data_format = pictures_of(video), ChannelDimension.LAST
        if isinstance(video[0], Image.Image):
            video, input_data_format = [rgb_of(frame) for frame in video], ChannelDimension.LAST
        shapes = {tuple(frame.shape) for frame in video}
        if len(shapes) > 1:
            raise ValueError(f"the frames of one video differ in shape: {sorted(shapes)}")
        video = torch.stack([as_tensor(frame) for frame in video])
        if video.ndim == 3:  # grey frames (H, W)
            video, input_data_format = video[..., None], ChannelDimension.LAST
    video = as_tensor(video)
    if video.is_floating_point():
        video = video.to(torch.float32)
    elif video.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8 or floating point, not {video.dtype}")

    layout = input_data_format or infer_channel_dimension_format(video, num_channels=(1, 3, 4))
    if ChannelDimension(layout) == ChannelDimension.LAST:
        video = video.permute(0, 3, 1, 2)
    if video.shape[1] not in (1, 3, 4):
        raise ValueError(f"frames must have 1, 3 or 4 channels; this video has the shape {tuple(video.shape)}")
    return tvF.grayscale_to_rgb(video) if video.shape[1] == 1 else video[:, :3]


def pictures_of(files: list) -> list:
    """Picture files → (H, W, 3) uint8 each. `EncodedVideo` among them say how to decode."""
    files = [file if isinstance(file, EncodedVideo) else EncodedVideo(file) for file in files]
    if decoding is None:
        return [file.decode_plainly()[0][0] for file in files]
    return list(decoding.decode_video([f.source for f in files], limits=files[0].limits, strict=files[0].strict)[0])


def rgb_of(picture: Image.Image) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(picture).convert("RGB")) if decoding is None else decoding.rgb_of(picture)


def as_tensor(array) -> torch.Tensor:
    if isinstance(array, np.ndarray) and (not array.flags.writeable or min(array.strides, default=0) < 0):
        array = array.copy()  # torch makes no view of such an array
    return torch.as_tensor(array)


# What a user may hand over


class Videos(list):
    """A flat list of videos, as `list_videos` makes it."""


class Frames(list):
    """The frames of one video: PIL images, arrays or tensors of one frame, or the names or URLs of picture files."""

    sampling: dict | None = None


class Picture(Frames):
    """A picture in memory that was given as an image, not as a video."""


def list_videos(videos) -> Videos:
    """
    The videos that were handed over, in a flat list. Each is an `EncodedVideo`, a `Frames`, or an array or tensor of
    four dimensions.

    Accepted are one video, a list of videos (or an array or tensor of five dimensions), and a list of such lists, one
    for each prompt. A picture, a list of pictures or a folder of them is one video. A list of strings in a list of
    lists names the pictures of one video.

    Raises:
        ValueError: for anything else, naming its type or shape.
    """
    return videos if isinstance(videos, Videos) else Videos(_videos_in(videos, depth=0))


def list_pictures(images) -> Videos:
    """The pictures handed over as `images`, however nested, in a flat list: each is a `Picture` or `EncodedVideo`."""
    if images is None:
        return Videos()
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4):
        return Videos(picture for item in images for picture in list_pictures(item))
    if isinstance(images, Mapping):
        return list_pictures(source_of(images, "image", IMAGE_KEYS, {})[0])
    if is_encoded(images):
        return Videos([EncodedVideo(images, is_picture=True)])
    if is_picture(images):
        return Videos([Picture([images])])
    raise ValueError(
        "an image is a PIL image, an array, a tensor, or a picture file (path, URL, base64, bytes, binary file), not "
        f"{type(images).__name__}"
    )


def _videos_in(item, depth: int) -> list:
    if isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim > 3:
        if item.ndim > 5:
            raise ValueError(f"a video is (frames, height, width, channels), not of the shape {tuple(item.shape)}")
        return [item] if item.ndim == 4 else list(item)
    if isinstance(item, (Frames, EncodedVideo)):
        return [item]
    if isinstance(item, Mapping):
        return [video_of(item)]
    if is_encoded(item):
        return [EncodedVideo(item)]
    if is_picture(item):
        return [Frames([item])]
    if isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 3:  # grey frames
        return [item[..., None]]
    if not isinstance(item, (list, tuple)) or depth > 2:
        what = "a list nested too deep" if isinstance(item, (list, tuple)) else type(item).__name__
        raise ValueError(
            "a video is a path, URL, bytes, binary file, array, tensor or list of frames (PIL images, arrays, picture "
            f"files), not {what}"
        )
    return [Frames(item)] if _are_frames(item, depth) else [v for part in item for v in _videos_in(part, depth + 1)]


def _are_frames(items, depth: int) -> bool:
    """Whether a list is one video. A single file in a list is a file, and names that are no pictures' are videos."""
    if len(items) == 1 and is_encoded(items[0]):
        return depth == 2 and isinstance(items[0], str)
    return bool(items) and (all(map(is_picture, items)) or (depth == 2 and all(isinstance(i, str) for i in items)))


@dataclass(frozen=True)
class EncodedVideo:
    """A video file or a part of it, and how to decode it."""

    source: str | os.PathLike | bytes | BinaryIO
    start: float | None = None
    end: float | None = None
    indices: list[int] | None = None
    limits: Any = None
    sampling: dict | None = None
    is_picture: bool = False
    strict: bool = True
    pixels: str = "stored"

    def decode(self, sample_indices_fn=None, rate: float | None = None) -> tuple[np.ndarray, VideoMetadata]:
        """Frames (T, H, W, 3) uint8 and metadata: those of `indices`, or else what the function says, or else all. A
        picture has one. `rate` is that of the pictures in a folder, which have none of their own."""
        if decoding is None:
            return self.decode_plainly(sample_indices_fn)
        if self.is_picture:
            return decoding.decode_image(self.source, self.limits)

        def sample(metadata):
            metadata.fps = metadata.fps or rate
            return range(metadata.total_num_frames) if sample_indices_fn is None else sample_indices_fn(metadata)

        how = {"limits": self.limits, "strict": self.strict, "pixels": self.pixels}
        if self.start is self.end is self.indices is None:
            may_be_mjpeg = not has_picture_name(self.source)
            return decoding.decode_video_or_picture(self.source, sample, may_be_mjpeg=may_be_mjpeg, **how)
        how |= {"start": self.start, "end": self.end, "indices": self.indices}
        return decoding.decode_video(self.source, sample if self.indices is None else None, **how)

    def decode_plainly(self, sample_indices_fn=None) -> tuple[np.ndarray, VideoMetadata]:
        """The same without the package: every frame of the file is decoded, and the file must be sound."""
        if (self.start, self.end, self.limits, self.strict, self.pixels) != (None, None, None, True, "stored"):
            raise ImportError(f"Parts in seconds, limits, damaged videos and displayed pixels {NEED_THE_PACKAGE}")
        file = io.BytesIO(self.source) if isinstance(self.source, (bytes, bytearray, memoryview)) else self.source
        if isinstance(file, (str, os.PathLike)) and os.path.isdir(file):
            raise ImportError(f"Folders of pictures {NEED_THE_PACKAGE}")
        if self.is_picture or has_picture_name(file):
            picture = plain_picture(file, self.is_picture)
            return picture, VideoMetadata(1, height=picture.shape[1], width=picture.shape[2], frames_indices=[0])
        if isinstance(self.source, str) and ("://" in self.source or self.source.startswith("data:")):
            raise ImportError(f"Videos behind a URL {NEED_THE_PACKAGE}")
        with open(file, "rb") if isinstance(file, (str, os.PathLike)) else contextlib.nullcontext(file) as file:
            # From a file object, and without protocols, FFmpeg can open no other file that this one names.
            with av.open(file, options={"protocol_whitelist": "none"}) as container:
                frames = list(container.decode(video=0))
                rate = float(container.streams.video[0].average_rate or 25)
        metadata = VideoMetadata(len(frames), fps=rate, duration=len(frames) / rate, video_backend="pyav")
        indices = self.indices or (range(len(frames)) if sample_indices_fn is None else sample_indices_fn(metadata))
        pictures = [upright(frames[index]) for index in indices]
        metadata.frames_indices = [int(index) for index in indices]
        metadata.height, metadata.width = pictures[0].shape[:2]
        return np.stack(pictures), metadata


def video_of(part: Mapping):
    """One video from `{"video": …, "start": …, "num_frames": …}`, the keys of a video in the content of a message."""
    source, given = source_of(part, "video", SOURCE_KEYS, SETTINGS)
    sampling = {key: given.pop(key) for key in ("num_frames", "fps", "max_frames") if key in given}
    if "indices" in given and sampling:
        raise ValueError(f'"indices" choose the frames of a video: leave out {sorted(sampling)}')
    if is_encoded(source):
        return EncodedVideo(source, **given, sampling=sampling)
    if given:
        raise ValueError(f"{sorted(given)} choose a part of a file; frames in memory are cut by slicing")
    videos = _videos_in(source, depth=2)
    if len(videos) != 1:
        raise ValueError(f"a video of a message is one video, not {len(videos)}")
    if sampling:
        videos = [Frames(videos[0])]
        videos[0].sampling = sampling
    return videos[0]


def source_of(part: Mapping, kind: str, keys: tuple, settings: Mapping) -> tuple[Any, dict]:
    """What stands under one of `keys`, and the settings beside it, by their own names."""
    given = {key: value for key, value in part.items() if value is not None and key != "type"}
    if "bytes" in given:  # a file of `datasets`, whose "path" is then but its name
        given.pop("path", None)
    sources = [given.pop(key) for key in (*keys, "bytes") if key in given]
    if unknown := sorted(given.keys() - settings):
        raise ValueError(f"{unknown[0]!r} is no key of {kind}: there are {[*keys, *settings]}")
    named = {settings[key]: value for key, value in given.items()}
    if len(sources) != 1 or len(named) < len(given):
        raise ValueError(f"{kind} has one of the keys {keys} and no setting twice, but this one has {sorted(part)}")
    for key, value in named.items():
        if key != "indices" and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(f"{key!r} of {kind} is a number, not {value!r}")
    return source_of(sources[0], kind, keys, {})[0] if isinstance(sources[0], Mapping) else sources[0], named


SOURCE_KEYS, IMAGE_KEYS = ("video", "path", "url"), ("image", "path", "url", "base64")
SETTINGS = {name: name for name in ("start", "end", "indices", "num_frames", "fps", "max_frames")}
SETTINGS |= {"video_start": "start", "video_end": "end", "nframes": "num_frames"}  # as others call them
PICTURE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
NEED_THE_PACKAGE = "need the package video-panda-hf: `pip install video-panda-hf`."


def plain_picture(source, is_image: bool = False) -> np.ndarray:
    """A picture file, (1, H, W, 3) uint8. An image may also be a URL or base64, and of what moves it is the start."""
    with load_image(source) if is_image and isinstance(source, str) else Image.open(source) as picture:
        if getattr(picture, "is_animated", False) and not is_image:
            raise ImportError(f"Animated pictures {NEED_THE_PACKAGE}")
        return rgb_of(picture)[None]


def upright(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, turned and mirrored as its display matrix says. PyAV's `rotation` leaves out the mirror."""
    step = 1
    with contextlib.suppress(KeyError, ValueError):  # no matrix; side data that PyAV before 19 cannot name
        a, b, _, c, d = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)[:5].tolist()
        step = -1 if a * d < b * c else 1
    return np.rot90(frame.to_ndarray(format="rgb24")[::step], frame.rotation // 90)


def list_metadata(video_metadata, videos: list) -> list[VideoMetadata | None]:
    """One for each of `videos`. Those given as images have none."""
    if video_metadata is None:
        return [None] * len(videos)
    if isinstance(video_metadata, Mapping):
        video_metadata = [video_metadata]
    flat = [entry for item in video_metadata for entry in (item if isinstance(item, (list, tuple)) else [item])]
    is_image = [isinstance(video, Picture) or getattr(video, "is_picture", False) for video in videos]
    if len(flat) != (count := is_image.count(False)):
        raise ValueError(f"{count} videos, but {len(flat)} entries of `video_metadata`: give one for each")
    for entry in filter(None, flat):
        if entry.get("total_num_frames") is None:
            raise ValueError(f"`video_metadata` needs `total_num_frames`, the video's own number of frames: {entry}")
        if entry.get("fps") is not None and not entry["fps"] > 0:
            raise ValueError(f"the `fps` of `video_metadata` must be above 0: {entry}")
    entries = iter(None if entry is None else VideoMetadata(**entry) for entry in flat)
    return [None if is_one else next(entries) for is_one in is_image]


def is_encoded(video) -> bool:
    return isinstance(video, (str, os.PathLike, bytes, bytearray, memoryview, io.IOBase)) or hasattr(video, "read")


def is_frames(video) -> bool:
    return isinstance(video, (Frames, np.ndarray, torch.Tensor))


def is_list_of_files(video) -> bool:
    return isinstance(video, list) and isinstance(video[0], (str, os.PathLike, EncodedVideo))


def has_picture_name(item) -> TypeGuard[str | os.PathLike]:
    if not isinstance(item, (str, os.PathLike)):
        return False
    path = re.split(r"[?#]", item)[0] if isinstance(item, str) and "://" in item else os.fspath(item)
    return PurePosixPath(path).suffix.lower() in PICTURE_SUFFIXES


def is_picture(item) -> bool:
    """Something that may be a frame. An array (A, B, C) is one if A or C may be a number of channels."""
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return item.ndim == 2 or (item.ndim == 3 and not {item.shape[0], item.shape[2]}.isdisjoint((1, 3, 4)))
    return isinstance(item, Image.Image) or has_picture_name(item)
