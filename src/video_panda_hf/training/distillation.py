"""Distillation [paper 3.2, eq. 19]: what the LLM makes of a video's patches, drawn towards a frozen vision model's.

`VideoPandaTeacher` sees the very frames that the student got, `VideoPandaDistillationHead` takes the LLM's hidden
states into the teacher's space, `distillation_loss` compares the two. `attach_distillation_head` puts the head into a
model.
"""

import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from video_panda_hf.modeling import (
    VideoPandaCausalLMOutputWithPast,
    VideoPandaForConditionalGeneration,
    VideoPandaVisionConfig,
    enumerate_parts,
    lay_out,
)


HEAD_FILE = "distillation_head.safetensors"  # beside the model's weights
LAYERS_APART = 4


class VideoPandaDistillationHead(nn.Module):
    r"""
    Hidden states of the LLM → features in the teacher's space.

    Every fourth layer counts, from the last one down: L, L-4, L-8, …, and always layer 0, what the projector gave.
    Layers are counted as in `output_hidden_states`, so layer L is behind the LLM's final norm. Parameters are named
    and shaped as the reference's `video_tower_compressor`: `norm_layer.N` belongs to layer L-4N.

    Args:
        text_hidden_size, teacher_hidden_size (`int`):
            Widths of the LLM and of the teacher. The latter must be a multiple of `num_heads`.
        num_layers (`int`):
            L, the number of the LLM's layers.
        num_heads (`int`, *optional*, defaults to 8):
            Heads of the attention from layer L to the others.
    """

    def __init__(self, text_hidden_size: int, teacher_hidden_size: int, num_layers: int, num_heads: int = 8):
        super().__init__()
        if teacher_hidden_size % num_heads:
            raise ValueError(f"The teacher's width {teacher_hidden_size} is not a multiple of {num_heads} heads.")
        self.num_heads = num_heads
        self.layers = [*range(num_layers, 0, -LAYERS_APART), 0]
        self.norm_layer = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(text_hidden_size), nn.Linear(text_hidden_size, teacher_hidden_size, bias=False))
            for _ in self.layers
        )
        self.input_layer = nn.Linear(text_hidden_size, teacher_hidden_size)
        self.output_layer = nn.Linear(teacher_hidden_size, teacher_hidden_size)

    def forward(self, hidden_states: list[torch.Tensor]) -> torch.Tensor:
        """`hidden_states` of each of `self.layers`, (patches, text size) → (patches, teacher size)."""
        hidden_states = [hidden.to(self.input_layer.weight.dtype) for hidden in hidden_states]
        query, *keys = (
            norm(hidden).unflatten(-1, (self.num_heads, -1))  # (patches, heads, d)
            for norm, hidden in zip(self.norm_layer, hidden_states, strict=True)
        )
        keys = torch.stack(keys, 2)  # (patches, heads, layers - 1, d)
        # The reference scales by the whole width, not by a head's.
        scores = (keys @ query[..., None]).squeeze(-1) * (self.num_heads * query.shape[-1]) ** -0.5
        attended = (scores.softmax(-1).to(keys.dtype)[..., None, :] @ keys).flatten(1)  # (patches, teacher size)
        return self.input_layer(hidden_states[0]) + self.output_layer(attended)


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    patches_per_frame: torch.LongTensor,
    num_frames_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Mean over frames of 1 - mean cosine over a frame's patches [eq. 19], in float32 or better.

    Args:
        student, teacher: packed patches of all frames, (patches, teacher size).
        patches_per_frame: (frames,), how many of them are each frame's.
        num_frames_in_batch: frames that the batch has in all its parts, where this is one part of it (gradient
            accumulation, several processes): the parts' losses add up to the batch's.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    distance = 1 - F.cosine_similarity(student.to(dtype), teacher.to(dtype), dim=-1)  # (patches,)
    patches_per_frame = patches_per_frame.to(distance.device)
    weight = patches_per_frame.to(dtype).reciprocal().repeat_interleave(patches_per_frame, output_size=len(distance))
    num_frames = len(patches_per_frame) if num_frames_in_batch is None else num_frames_in_batch
    return (distance * weight).sum() / num_frames


class VideoPandaTeacher:
    r"""
    A frozen vision model: packed student pixels in, its features of the pictures' patches out.

    Any vision model of `transformers` that turns square pictures into patch features, with or without tokens before
    them (CLIP, SigLIP, DINOv2, …). Each frame is shown at half the student's size, on a square canvas of the teacher's
    mean colour, so that CLIP ViT-L/14 at 224 px has one patch where the released student has one token. Its features
    are those of the layer before the last. It is no part of the trained model: neither saved nor wrapped with it.

    Args:
        model (`PreTrainedModel`):
            The vision model. It is frozen, and runs in evaluation mode.
        vision_config (`VideoPandaVisionConfig`):
            The student's STAB.
        image_mean, image_std (`tuple[float, float, float]`):
            The teacher's normalisation of pixels 0..1.
        student_mean, student_std (`tuple[float, float, float]`, *optional*):
            The student's, CLIP's by default.
    """

    def __init__(
        self,
        model: nn.Module,
        vision_config: VideoPandaVisionConfig,
        image_mean,
        image_std,
        student_mean=OPENAI_CLIP_MEAN,
        student_std=OPENAI_CLIP_STD,
    ):
        self.model = model.eval().requires_grad_(False)
        self.vision_config = vision_config
        self.mean, self.std = tuple(image_mean), tuple(image_std)
        self.student_mean, self.student_std = tuple(student_mean), tuple(student_std)
        self.patch_size = model.config.patch_size
        if not isinstance(self.patch_size, int):
            raise ValueError(f"The teacher needs square patches of one size, not {self.patch_size}.")
        self.side = max(
            1, round(vision_config.image_size / 2 / self.patch_size)
        )  # of the teacher's canvas, in patches
        self.hidden_size = model.config.hidden_size
        self.options = {}
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self.options["interpolate_pos_encoding"] = self.side * self.patch_size != model.config.image_size

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, vision_config: VideoPandaVisionConfig, dtype=torch.float32, **normalisation
    ) -> "VideoPandaTeacher":
        """The vision model, or the vision half of a model such as CLIP, in this folder or of this Hub id, and the
        normalisation that its image processor says. `normalisation`: `student_mean`, `student_std`."""
        model = AutoModel.from_pretrained(name_or_path, dtype=dtype)
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        model = getattr(model, "vision_model", model)
        return cls(model, vision_config, processor.image_mean, processor.image_std, **normalisation)

    def to(self, device) -> "VideoPandaTeacher":
        self.model.to(device)
        return self

    def grids(self, video_grid_thw: torch.LongTensor) -> torch.LongTensor:
        """Frames, rows and columns of each video in the teacher's patches, (videos, 3), from the student's grids."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        rows_columns = (video_grid_thw[:, 1:] * self.side / side).round().long().clamp(min=1)
        return torch.cat([video_grid_thw[:, :1], rows_columns], 1)

    @torch.no_grad()
    def __call__(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.LongTensor) -> torch.Tensor:
        """Packed patches (patches, channels · p²) of the student's videos → features of the teacher's patches of the
        same pictures, packed as `grids` says: (patches, teacher size)."""
        grids = frame_grids(self.grids(video_grid_thw.cpu()))
        frames = self.frames(pixel_values_videos, video_grid_thw)
        features = self.model(frames.to(self.model.dtype), output_hidden_states=True, **self.options).hidden_states[-2]
        features = features[:, -(self.side**2) :]  # without class token or registers, which come first
        # The pictures' own patches among those of their canvases.
        frame, position = enumerate_parts(grids.prod(1))
        row, column = position // grids[frame, 1], position % grids[frame, 1]
        top, left = ((self.side - grids[frame]) // 2).unbind(1)
        cells = (frame * self.side + top + row) * self.side + left + column
        return features.flatten(0, 1)[cells.to(features.device)]

    def frames(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.LongTensor) -> torch.Tensor:
        """The student's frames as the teacher takes them: (frames, channels, side, side) normalised pixels."""
        student_grids, grids = frame_grids(video_grid_thw.cpu()), frame_grids(self.grids(video_grid_thw.cpu()))
        pixels = pixel_values_videos.float()
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (self.student_mean, self.student_std, self.mean, self.std)
        )
        p, side = self.vision_config.patch_size, self.side * self.patch_size
        background = (torch.floor(255 * own_mean) / 255).expand(len(grids), -1, side, side)
        canvas = background.clone()
        for (rows, columns), frames, patches in frames_by_shape(student_grids):
            pictures = pixels[patches.to(pixels.device)].view(len(frames), rows, columns, -1, p, p)
            pictures = pictures.permute(0, 3, 1, 4, 2, 5).reshape(len(frames), -1, rows * p, columns * p)
            height, width = (grids[frames[0]] * self.patch_size).tolist()
            pictures = F.interpolate(pictures * std + mean, (height, width), mode="bicubic", antialias=True)
            top, left = ((self.side - grids[frames[0]]) // 2 * self.patch_size).tolist()
            canvas[frames.to(pixels.device), :, top : top + height, left : left + width] = pictures.clamp(0, 1)
        return (canvas - own_mean) / own_std


@dataclass
class VideoPandaDistillationOutput(VideoPandaCausalLMOutputWithPast):
    r"""
    distillation_loss (`torch.FloatTensor` of shape `()`, *optional*):
        See `distillation_loss`.
    """

    distillation_loss: torch.FloatTensor | None = None


class VideoPandaDistillationMixin:
    """
    A Video-Panda with a distillation head, `distillation_head`. Whatever wraps the model (DDP, FSDP, autocast) treats
    head and model alike; `save_pretrained` saves the model alone.
    """

    @functools.wraps(VideoPandaForConditionalGeneration.forward)  # `Trainer` and `generate` look at the signature
    def forward(
        self,
        *args,
        teacher_features: torch.Tensor | None = None,
        teacher_grid_thw: torch.LongTensor | None = None,
        num_frames_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ):
        if teacher_features is None:
            return super().forward(*args, **kwargs)
        outputs = super().forward(*args, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        grids, patches = torch.zeros(0, 3, dtype=torch.long), slice(0)
        if kwargs.get("pixel_values_videos") is not None:
            grids = kwargs["video_grid_thw"].cpu()
            patches = patch_positions(self.config, kwargs["input_ids"], grids)
        head = self.distillation_head
        hidden_states = [outputs.hidden_states[layer].flatten(0, 1)[patches] for layer in head.layers]
        tokens = frame_grids(grids) // self.config.vision_config.spatial_merge_size
        student, teacher, patches_per_frame = align_grids(
            head(hidden_states), tokens, teacher_features, frame_grids(teacher_grid_thw)
        )
        loss = distillation_loss(student, teacher, patches_per_frame, num_frames_in_batch)
        # The hidden states are of no further use, and large.
        return VideoPandaDistillationOutput(**{**outputs, "hidden_states": None, "distillation_loss": loss})


def attach_distillation_head(model: VideoPandaForConditionalGeneration, head: VideoPandaDistillationHead) -> None:
    """
    Makes the head part of the model, as `distillation_head`, and of its forward: a call with `teacher_features` also
    gives `distillation_loss`.

    The forward's new arguments: `teacher_features` (teacher's patches, teacher size), `teacher_grid_thw` (videos, 3)
    on the CPU, `num_frames_in_batch`. See [`VideoPandaDistillationMixin`].
    """
    model.distillation_head = head
    model._keys_to_ignore_on_save.update(f"distillation_head.{name}" for name in head.state_dict())
    plain = type(model)
    if not issubclass(plain, VideoPandaDistillationMixin):
        # The plain class' name and module, because files name a model's class: `architectures`, PEFT's `auto_mapping`.
        attributes = {"__module__": plain.__module__}
        model.__class__ = type(plain.__name__, (VideoPandaDistillationMixin, plain), attributes)


def patch_positions(config, input_ids: torch.LongTensor, video_grid_thw: torch.LongTensor) -> torch.LongTensor:
    """Where in the flattened batch (batch · sequence,) LSD's tokens stand, i.e. neither contexts nor `<row>`. They
    come in the order (video, frame, row, column). `video_grid_thw` is on the CPU."""
    vision = config.vision_config
    grids = tuple(map(tuple, video_grid_thw.tolist()))
    layout = lay_out(grids, None, vision.spatial_merge_size, vision.frames_per_clip, vision.use_row_tokens)
    is_patch = (layout.token_order < len(layout.windows)).nonzero().squeeze(1)
    placeholders = (input_ids == config.video_token_id) | (input_ids == config.row_token_id)
    return placeholders.flatten().nonzero().squeeze(1)[is_patch.to(input_ids.device)]


def align_grids(student, student_grids, teacher, teacher_grids):
    """
    Average-pools whichever has the finer grid, in rows and in columns, until both coincide.

    Args: packed features (patches, D) and the rows and columns of each frame (frames, 2), of student and teacher.
    Returns: both features on the same grids, and the patches of each frame (frames,).
    """
    grids = torch.minimum(student_grids, teacher_grids)
    return pool(student, student_grids, grids), pool(teacher, teacher_grids, grids), grids.prod(1)


def pool(features: torch.Tensor, grids: torch.LongTensor, targets: torch.LongTensor) -> torch.Tensor:
    """Packed features (patches, D) of frames of these grids (frames, 2) → averaged down to the target grids."""
    if torch.equal(grids, targets):
        return features
    first = targets.prod(1).cumsum(0) - targets.prod(1)
    parts, places = [], []
    for (rows, columns), frames, patches in frames_by_shape(grids):
        # One shape has one target, for both follow from the student's grid.
        target = targets[frames[0]].tolist()
        pictures = features[patches.to(features.device)].view(len(frames), rows, columns, -1).permute(0, 3, 1, 2)
        parts.append(F.adaptive_avg_pool2d(pictures, target).permute(0, 2, 3, 1).flatten(0, 2))
        places.append((first[frames][:, None] + torch.arange(math.prod(target))).flatten())
    return torch.cat(parts)[torch.cat(places).argsort().to(features.device)]


def frame_grids(video_grid_thw: torch.LongTensor) -> torch.LongTensor:
    """Rows and columns of every frame, (frames, 2), of videos (videos, 3)."""
    return video_grid_thw[:, 1:].repeat_interleave(video_grid_thw[:, 0], dim=0)


def frames_by_shape(
    grids: torch.LongTensor,
) -> Iterator[tuple[tuple[int, int], torch.LongTensor, torch.LongTensor]]:
    """Of each distinct shape (rows, columns) among the grids (frames, 2): the frames that have it, (n,), and their
    packed patches, (n · rows · columns,)."""
    patches = grids.prod(1)
    first = patches.cumsum(0) - patches
    for rows, columns in grids.unique(dim=0).tolist():
        frames = (grids == torch.tensor([rows, columns])).all(1).nonzero().squeeze(1)
        yield (rows, columns), frames, (first[frames][:, None] + torch.arange(rows * columns)).flatten()


def load_head(head: VideoPandaDistillationHead, file_or_folder: str) -> None:
    """
    Loads a head's weights.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, if it is of another LLM or teacher.
    """
    path = Path(file_or_folder)
    path = path / HEAD_FILE if path.is_dir() else path
    try:
        head.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is the distillation head of another LLM or teacher: {error}") from error


def save_head(head: VideoPandaDistillationHead, folder: Path | None) -> None:
    """Writes a head's weights into the folder. Under FSDP2 every process calls this; those without a folder only
    give their shards."""
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in head.state_dict().items()
    }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / HEAD_FILE, {"format": "pt"})


__all__ = ["VideoPandaDistillationHead", "VideoPandaTeacher", "attach_distillation_head", "distillation_loss"]
