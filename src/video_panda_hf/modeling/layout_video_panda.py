"""Where everything is in a batch of packed videos, worked out on the host, so that STAB never waits for the device.

It takes a few vectorised integer operations for any number of videos and frames. The results are copied to the device
once, without waiting for it.
"""

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch

from .configuration_video_panda import VideoPandaVisionConfig


@dataclass
class ClipGroup:
    """Clips that LSTE, DPE and GSTRA compute together, on one grid of `rows` × `columns` cells.

    `patches` are rows of the packed patches, `cells` the places of the grid they fill; `None` stands for all of them.
    """

    clips: int
    frames_per_clip: int
    rows: int
    columns: int
    patches: torch.LongTensor | None
    cells: torch.LongTensor | None

    def place(self, patches: torch.Tensor, background: torch.Tensor | None) -> torch.Tensor:
        """Packed patches (patches, D) → cells (clips, F, H, W, D); cells without a patch get the background (1, D)."""
        patches = patches if self.patches is None else patches[self.patches]
        if self.cells is not None:
            num_cells = self.clips * self.frames_per_clip * self.rows * self.columns
            patches = background.repeat(num_cells, 1).index_copy(0, self.cells, patches)  # type: ignore[union-attr]
        return patches.view(self.clips, self.frames_per_clip, self.rows, self.columns, -1)

    def add(self, patches: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Adds the cells (clips, F, H, W, D) to the packed patches (patches, D) that stand on them."""
        cells = cells.flatten(0, 3)
        cells = cells if self.cells is None else cells[self.cells]
        return patches + cells if self.patches is None else patches.index_add(0, self.patches, cells)


@dataclass
class VideoLayout:
    """The places of patches, windows, frames and tokens in a batch of packed videos."""

    groups: list[ClipGroup]
    windows: torch.LongTensor  # (windows, merge²): the patches of each; order (frame, row, column)
    frame_tokens: torch.LongTensor | None  # (frames, longest): the windows of each frame; None: all frames alike
    token_mask: torch.BoolTensor | None  # (frames, longest): where `frame_tokens` holds a window
    clip_of_frame: torch.LongTensor  # (frames,): row of the groups' concatenated clips
    is_image: torch.BoolTensor | None  # (frames,): the frames that are videos of their own; None: there are none
    token_order: torch.LongTensor  # (tokens,): rows of [windows, contexts, ROW] that make up the sequences
    tokens_per_video: list[int]
    num_frames: int

    @property
    def has_background(self) -> bool:
        return any(group.cells is not None for group in self.groups)

    @classmethod
    @torch.compiler.disable  # Shapes follow from these values: a compiled model is traced around them.
    def of(cls, pixel_values_videos, video_grid_thw, config: VideoPandaVisionConfig) -> "VideoLayout":
        """The layout of these grids, on the CPU. Raises `ValueError` for grids that are impossible or do not fit."""
        grids = torch.as_tensor(video_grid_thw, device="cpu").long()
        check_grids(pixel_values_videos.shape, grids, config)
        side = config.image_size // config.patch_size if config.pad_to_square else None
        grids = tuple(map(tuple, grids.tolist()))
        return lay_out(grids, side, config.spatial_merge_size, config.frames_per_clip)

    def tokens_of_frames(self, windows: torch.Tensor) -> torch.Tensor:
        """LSD's tokens (windows, D) → (frames, longest, D)."""
        return windows.unflatten(0, (self.num_frames, -1)) if self.frame_tokens is None else windows[self.frame_tokens]

    def to(self, device) -> "VideoLayout":
        return move(self, device)


@lru_cache(maxsize=32)  # takes more host time than STAB's launches, and batches often have the same shapes
def lay_out(
    grids: tuple[tuple[int, int, int], ...], side: int | None, merge: int, frames_per_clip: int
) -> VideoLayout:
    """
    The layout of a batch of videos. It is cached and shared, so do not change it.

    Args:
        grids (`tuple[tuple[int, int, int], ...]`):
            Frames, rows and columns of each video, in patches.
        side (`int`, *optional*):
            Side of the canvas in patches. `None`: no canvas.
        merge (`int`):
            Side of a window in patches.
        frames_per_clip (`int`):
            Frames of a clip.
    """
    # Build the cached tensors on the CPU and outside inference mode, so that training can use them.
    with torch.inference_mode(False), torch.device("cpu"):
        grids = torch.tensor(grids)
        times, rows, columns = grids.unbind(1)

        # Frames, and the patches and windows of each: `first_*` counts what the frames before it hold.
        video_of_frame = torch.arange(len(grids)).repeat_interleave(times)
        rows, columns = rows[video_of_frame], columns[video_of_frame]  # (frames,)
        is_image = (times == 1)[video_of_frame]
        patches = rows * columns
        first_patch = patches.cumsum(0) - patches
        window_rows, window_columns = rows // merge, columns // merge
        tokens = window_rows * window_columns
        first_window = tokens.cumsum(0) - tokens

        # The patches of each window.
        frame, position = enumerate_parts(tokens)
        row, column = position // window_columns[frame], position % window_columns[frame]
        corner = first_patch[frame] + merge * (row * columns[frame] + column)
        offsets = torch.arange(merge)
        windows = corner[:, None, None] + offsets[:, None] * columns[frame][:, None, None] + offsets

        # The windows of each frame, as a rectangle with a mask where the frames differ.
        frame_tokens = token_mask = None
        if tokens.min() < tokens.max():
            position = torch.arange(int(tokens.max()))
            token_mask = position < tokens[:, None]
            frame_tokens = torch.where(token_mask, first_window[:, None] + position, 0)

        # The sequence of each frame: context, then the rows of its windows, ROW after every row.
        num_frames, num_windows = len(tokens), int(tokens.sum())
        row_length = window_columns + 1
        frame, position = enumerate_parts(1 + window_rows * row_length)
        row, column = (position - 1) // row_length[frame], (position - 1) % row_length[frame]
        token_order = first_window[frame] + row * window_columns[frame] + column
        token_order = torch.where(column == window_columns[frame], num_windows + num_frames, token_order)
        token_order = torch.where(position == 0, num_windows + frame, token_order)

        groups, clip_of_frame = group_clips(rows, columns, first_patch, is_image, side, merge, frames_per_clip)
        tokens_per_frame = 1 + (grids[:, 1] // merge) * (grids[:, 2] // merge + 1)
        return VideoLayout(
            groups=groups,
            windows=windows.flatten(1),
            frame_tokens=frame_tokens,
            token_mask=token_mask,
            clip_of_frame=clip_of_frame,
            is_image=is_image if bool(is_image.any()) else None,
            token_order=token_order,
            tokens_per_video=(times * tokens_per_frame).tolist(),
            num_frames=num_frames,
        )


def check_grids(pixel_shape: torch.Size, grids: torch.LongTensor, config: VideoPandaVisionConfig) -> None:
    """Raises `ValueError` where the grids (videos, 3) are impossible or do not add up to the packed patches."""
    patch_dim = config.num_channels * config.patch_size**2
    if len(pixel_shape) != 2 or pixel_shape[1] != patch_dim:
        raise ValueError(
            f"`pixel_values_videos` must have shape (patches, {patch_dim}): {config.num_channels} channels of "
            f"{config.patch_size} x {config.patch_size} pixels a patch. Got {tuple(pixel_shape)}."
        )
    if grids.ndim != 2 or grids.shape[1] != 3 or len(grids) == 0:
        raise ValueError(
            f"`video_grid_thw` must have shape (videos, 3): frames, rows, columns of each. Got {tuple(grids.shape)}."
        )
    side = config.image_size // config.patch_size
    merge, clip = config.spatial_merge_size, config.frames_per_clip

    for video, (t, h, w) in enumerate(grids.tolist()):
        if t != 1 and (t < 1 or t % clip):
            raise ValueError(
                f"Video {video} has {t} frames: a video needs 1 frame or a multiple of frames_per_clip={clip}. "
                "Sample another number of frames, or repeat the last one."
            )
        if min(h, w) < 1 or h % merge or w % merge:
            raise ValueError(
                f"Video {video} has {h} x {w} patches: both must be positive multiples of spatial_merge_size={merge}."
            )
        if config.pad_to_square and max(h, w) > side:
            raise ValueError(
                f"Video {video} has {h} x {w} patches, which do not fit the canvas of {side} x {side} (image_size="
                f"{config.image_size}, patch_size={config.patch_size}). Resize it, or set pad_to_square=False for a "
                "model that is trained without a canvas."
            )
    expected = int(grids.prod(1).sum())
    if expected != pixel_shape[0]:
        raise ValueError(
            f"`video_grid_thw` {grids.tolist()} describes {expected} patches, but `pixel_values_videos` has "
            f"{pixel_shape[0]}."
        )


def group_clips(rows, columns, first_patch, is_image, side, merge, frames_per_clip):
    """
    Groups the clips by the grid they are computed on: the shared canvas, or each shape of its own without it.

    Args:
        rows, columns (`torch.LongTensor` of shape `(frames,)`):
            The grid of each frame, in patches.
        first_patch (`torch.LongTensor` of shape `(frames,)`):
            The first of the packed patches of each frame.
        is_image (`torch.BoolTensor` of shape `(frames,)`):
            Whether the frame is a video of its own.
        side, merge, frames_per_clip:
            As in `lay_out`.

    Returns:
        The groups, and for each frame its clip, counted over the clips of all groups in turn.
    """
    height = rows if side is None else torch.full_like(rows, side)
    width = columns if side is None else torch.full_like(columns, side)
    grids = torch.stack([height, width], 1)
    shapes = grids[~is_image].unique(dim=0).tolist()

    groups, clip_of_frame, clips = [], torch.zeros_like(rows), 0
    for height, width in shapes:
        frames = ((grids == torch.tensor([height, width])).all(1) & ~is_image).nonzero().squeeze(1)
        frame, position = enumerate_parts((rows * columns)[frames])
        patches = first_patch[frames][frame] + position
        row, column = position // columns[frames][frame], position % columns[frames][frame]
        # The picture stands in the middle of its canvas, on whole windows.
        top = merge * ((height - rows[frames]) // (2 * merge))
        left = merge * ((width - columns[frames]) // (2 * merge))
        cells = (frame * height + top[frame] + row) * width + left[frame] + column
        clip_of_frame[frames] = clips + torch.arange(len(frames)) // frames_per_clip
        num_clips = len(frames) // frames_per_clip
        clips += num_clips
        all_patches = len(patches) == int((rows * columns).sum())
        all_cells = len(cells) == len(frames) * height * width
        groups.append(
            ClipGroup(
                clips=num_clips,
                frames_per_clip=frames_per_clip,
                rows=height,
                columns=width,
                patches=None if all_patches else patches,
                cells=None if all_cells else cells,
            )
        )
    return groups, clip_of_frame


def enumerate_parts(sizes: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """For parts of these sizes in a row: each element's part and its place there. [2, 1] → [0 0 1], [0 1 0]."""
    part = torch.arange(len(sizes)).repeat_interleave(sizes)
    first = sizes.cumsum(0) - sizes
    return part, torch.arange(len(part)) - first[part]


def move(layout, device):
    """A copy of a dataclass with its tensors (and those of the groups) on the device, sent without waiting."""

    def moved(value):
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, list):
            return [moved(item) for item in value]
        return move(value, device) if isinstance(value, ClipGroup) else value

    return replace(layout, **{field.name: moved(getattr(layout, field.name)) for field in fields(layout)})
