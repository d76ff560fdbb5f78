"""Distillation [paper 3.2, eq. 19]: aligns the LLM's hidden states of video patches with a frozen vision model.

`VideoPandaTeacher` encodes the student's frames. `VideoPandaDistillationHead` maps the LLM's hidden states to the
teacher's space. `distillation_loss` compares the two. `attach_distillation_head` adds the head to a model. Pictures
may have a teacher and a head of their own.
"""

import functools
import inspect
import math
from collections.abc import Iterable, Iterator
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

from .languagebind import LanguageBindVideoTower, video_settings


HEAD_FILE = "distillation_head.safetensors"  # beside the model's weights
PICTURES = "picture_"  # before the names of what pictures have of their own
LAYERS_APART = 4
DISTANCES = {  # of features (patches, D)
    "cosine": lambda student, teacher: 1 - F.cosine_similarity(student, teacher, dim=-1),
    "mse": lambda student, teacher: (student - teacher).square().mean(-1),
}


class VideoPandaDistillationHead(nn.Module):
    r"""
    Maps hidden states of the LLM to features in the teacher's space.

    It uses every fourth layer from the last: L, L-4, L-8, …, and always layer 0, the projector's output. Layers are
    numbered as in `output_hidden_states`, so layer L comes after the LLM's final norm. Names and shapes of the
    parameters are those of the reference's `video_tower_compressor`: `norm_layer.N` belongs to layer L-4N.

    Args:
        text_hidden_size (`int`):
            Width of the LLM.
        teacher_hidden_size (`int`):
            Width of the teacher, a multiple of `num_heads`.
        num_layers (`int`):
            L, the number of the LLM's layers.
        num_heads (`int`, *optional*, defaults to 8):
            Heads of the attention from layer L to the others.
        distance (`str`, *optional*, defaults to `"cosine"`):
            How the loss compares the result with the teacher's features, see `distillation_loss`.

    Raises:
        ValueError: If `teacher_hidden_size` is not a multiple of `num_heads`, or for another `distance`.
    """

    def __init__(
        self,
        text_hidden_size: int,
        teacher_hidden_size: int,
        num_layers: int,
        num_heads: int = 8,
        distance: str = "cosine",
    ):
        super().__init__()
        if teacher_hidden_size % num_heads:
            raise ValueError(f"The teacher's width {teacher_hidden_size} is not a multiple of {num_heads} heads.")
        check_distance(distance)
        self.num_heads, self.distance = num_heads, distance
        self.layers = [*range(num_layers, 0, -LAYERS_APART), 0]
        self.norm_layer = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(text_hidden_size), nn.Linear(text_hidden_size, teacher_hidden_size, bias=False))
            for _ in self.layers
        )
        self.input_layer = nn.Linear(text_hidden_size, teacher_hidden_size)
        self.output_layer = nn.Linear(teacher_hidden_size, teacher_hidden_size)

    def forward(self, hidden_states: list[torch.Tensor]) -> torch.Tensor:
        """
        Args:
            hidden_states (`list[torch.Tensor]`):
                Hidden states of each layer in `self.layers`, of shape `(patches, text_hidden_size)`.

        Returns:
            `torch.Tensor` of shape `(patches, teacher_hidden_size)`.
        """
        hidden_states = [hidden.to(self.input_layer.weight.dtype) for hidden in hidden_states]
        query, *keys = (
            norm(hidden).unflatten(-1, (self.num_heads, -1))  # (patches, heads, d)
            for norm, hidden in zip(self.norm_layer, hidden_states, strict=True)
        )
        keys = torch.stack(keys, 2)  # (patches, heads, layers - 1, d)
        # The reference scales by the whole width, not by that of a head.
        scores = (keys @ query[..., None]).squeeze(-1) * (self.num_heads * query.shape[-1]) ** -0.5
        attended = (scores.softmax(-1).to(keys.dtype)[..., None, :] @ keys).flatten(1)  # (patches, teacher size)
        return self.input_layer(hidden_states[0]) + self.output_layer(attended)


def check_distance(distance: str) -> None:
    """Raises `ValueError` for a distance that is none of `DISTANCES`."""
    if distance not in DISTANCES:
        raise ValueError(f"`distillation_distance` is one of {', '.join(DISTANCES)}, not {distance!r}.")


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    patches_per_frame: torch.LongTensor,
    num_frames_in_batch: torch.Tensor | int | None = None,
    distance: str = "cosine",
) -> torch.Tensor:
    """
    Computes the mean over frames of the mean distance of student and teacher over the frame's patches [eq. 19].

    Args:
        student (`torch.Tensor` of shape `(patches, teacher_hidden_size)`):
            Output of the distillation head for the patches of all frames.
        teacher (`torch.Tensor` of shape `(patches, teacher_hidden_size)`):
            Features of the teacher for the same patches.
        patches_per_frame (`torch.LongTensor` of shape `(frames,)`):
            Number of patches of each frame.
        num_frames_in_batch (`torch.Tensor` or `int`, *optional*):
            Frames of the whole batch, if this is a micro-batch (gradient accumulation, several processes). The losses
            of the micro-batches then add up to the loss of the batch. Defaults to the number of frames here.
        distance (`str`, *optional*, defaults to `"cosine"`):
            `"cosine"`: 1 - cosine similarity. `"mse"`: mean over the channels of the squared difference, as in table 5
            of the paper, which has no formula for it; features are compared as they are, not normalised.

    Returns:
        `torch.Tensor` of shape `()`, in float32 or a wider dtype.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    distances = DISTANCES[distance](student.to(dtype), teacher.to(dtype))  # (patches,)
    patches_per_frame = patches_per_frame.to(distances.device)
    weight = patches_per_frame.to(dtype).reciprocal().repeat_interleave(patches_per_frame, output_size=len(distances))
    num_frames = len(patches_per_frame) if num_frames_in_batch is None else num_frames_in_batch
    return (distances * weight).sum() / num_frames


class VideoPandaTeacher:
    r"""
    A frozen vision model that computes features of the student's frames.

    It can be any vision model of `transformers` that turns square images into patch features, with or without tokens
    before them (CLIP, SigLIP, DINOv2, …). Each frame is shown at half the student's size, on a square canvas of the
    teacher's mean colour. CLIP ViT-L/14 at 224 px then has one patch for each token of the released student. The
    features are those of the second-to-last layer. The teacher is not a submodule of the trained model: it is neither
    saved nor wrapped with it.

    A model that sees videos is a `torch.nn.Module` with `config.patch_size`, `config.hidden_size` and a method
    `features(frames)`. This gets the frames of one video in their order, of shape `(frames, channels, side, side)` in
    float32, and returns features of shape `(frames, patches, hidden_size)`: patches row by row, without other tokens.
    LanguageBind's video tower is built in (`LanguageBindVideoTower`).

    Args:
        model (`torch.nn.Module`):
            The vision model. It is frozen and put into eval mode.
        vision_config (`VideoPandaVisionConfig`):
            Configuration of the student's STAB.
        image_mean, image_std (`tuple[float, float, float]`):
            The teacher's normalisation of pixels in [0, 1].
        student_mean, student_std (`tuple[float, float, float]`, *optional*):
            The student's normalisation. Defaults to CLIP's.

    Raises:
        ValueError: If the patches of `model` are not square.
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
        # Side of the teacher's canvas, in patches.
        self.side = max(1, round(vision_config.image_size / 2 / self.patch_size))
        self.hidden_size = model.config.hidden_size
        self.options = {}
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self.options["interpolate_pos_encoding"] = self.side * self.patch_size != model.config.image_size

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, vision_config: VideoPandaVisionConfig, dtype=torch.float32, **normalisation
    ) -> "VideoPandaTeacher":
        """
        Loads a vision model, or the vision part of a model such as CLIP, and the normalisation of its image processor;
        or LanguageBind's video tower, which has CLIP's.

        Args:
            name_or_path (`str`):
                Folder or Hub id of the model.
            vision_config (`VideoPandaVisionConfig`):
                Configuration of the student's STAB.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Dtype of the teacher's weights.
            normalisation:
                `student_mean` and `student_std`, see the class.

        Returns:
            `VideoPandaTeacher`.
        """
        if video_settings(name_or_path) is not None:
            tower = LanguageBindVideoTower.from_pretrained(name_or_path, dtype)
            return cls(tower, vision_config, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, **normalisation)
        model = AutoModel.from_pretrained(name_or_path, dtype=dtype)
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        model = getattr(model, "vision_model", model)
        return cls(model, vision_config, processor.image_mean, processor.image_std, **normalisation)

    def to(self, device) -> "VideoPandaTeacher":
        """Moves the vision model to a device."""
        self.model.to(device)
        return self

    def grids(self, video_grid_thw: torch.LongTensor) -> torch.LongTensor:
        """
        Args:
            video_grid_thw (`torch.LongTensor` of shape `(videos, 3)`):
                Frames, rows and columns of each video, in the student's patches.

        Returns:
            `torch.LongTensor` of shape `(videos, 3)`: the same in the teacher's patches.
        """
        side = self.vision_config.image_size // self.vision_config.patch_size
        rows_columns = (video_grid_thw[:, 1:] * self.side / side).round().long().clamp(min=1)
        return torch.cat([video_grid_thw[:, :1], rows_columns], 1)

    @torch.no_grad()
    def __call__(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.LongTensor) -> torch.Tensor:
        """
        Args:
            pixel_values_videos (`torch.Tensor` of shape `(patches, channels · patch_size²)`):
                Packed patches of the student's videos.
            video_grid_thw (`torch.LongTensor` of shape `(videos, 3)`):
                Frames, rows and columns of each video, in the student's patches.

        Returns:
            `torch.Tensor` of shape `(teacher_patches, teacher_hidden_size)`: features of the same frames, packed by
            the grids that `grids` returns.
        """
        grids = frame_grids(self.grids(video_grid_thw.cpu()))
        frames = self.frames(pixel_values_videos, video_grid_thw)
        if callable(getattr(self.model, "features", None)):
            features = self.features_of_videos(frames.split(video_grid_thw[:, 0].tolist()))
        else:
            frames = frames.to(self.model.dtype)
            features = self.model(frames, output_hidden_states=True, **self.options).hidden_states[-2]
            features = features[:, -(self.side**2) :]  # drop class token and registers, which come first
        # Indices of the frames' patches on their canvases.
        frame, position = enumerate_parts(grids.prod(1))
        row, column = position // grids[frame, 1], position % grids[frame, 1]
        top, left = ((self.side - grids[frame]) // 2).unbind(1)
        cells = (frame * self.side + top + row) * self.side + left + column
        return features.flatten(0, 1)[cells.to(features.device)]

    def features_of_videos(self, videos: Iterable[torch.Tensor]) -> torch.Tensor:
        """Features of each video by itself, (frames, side², hidden size). Raises `ValueError` for any other shape."""
        parts = []
        for video in videos:
            parts.append(self.model.features(video))
            expected = (len(video), self.side**2, self.hidden_size)
            if parts[-1].shape != expected:
                raise ValueError(
                    f"`features` of the teacher {type(self.model).__name__} returned the shape "
                    f"{tuple(parts[-1].shape)}, not (frames, patches, hidden_size) = {expected}."
                )
        return torch.cat(parts)

    def frames(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.LongTensor) -> torch.Tensor:
        """
        Args:
            pixel_values_videos (`torch.Tensor` of shape `(patches, channels · patch_size²)`):
                Packed patches of the student's videos.
            video_grid_thw (`torch.LongTensor` of shape `(videos, 3)`):
                Frames, rows and columns of each video, in the student's patches.

        Returns:
            `torch.Tensor` of shape `(frames, channels, height, width)`: the teacher's input, normalised, on square
            canvases.
        """
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
    Adds the loss of the submodules `distillation_head` and, with a teacher of pictures, `picture_distillation_head` to
    the forward. DDP, FSDP and autocast thus treat the heads like the model. `save_pretrained` leaves them out.
    """

    @functools.wraps(VideoPandaForConditionalGeneration.forward)  # `Trainer` and `generate` look at the signature
    def forward(
        self,
        *args,
        teacher_features: torch.Tensor | None = None,
        teacher_grid_thw: torch.LongTensor | None = None,
        picture_teacher_features: torch.Tensor | None = None,
        picture_teacher_grid_thw: torch.LongTensor | None = None,
        num_frames_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ):
        if teacher_features is None:
            return super().forward(*args, **kwargs)
        outputs = super().forward(*args, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        grids, positions = torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        if kwargs.get("pixel_values_videos") is not None:
            grids = kwargs["video_grid_thw"].cpu()
            positions = patch_positions(self.config, kwargs["input_ids"], grids)
            size = self.config.vision_config.spatial_merge_size
            grids = grids // torch.tensor([1, size, size])
        num_frames = grids[:, 0].sum() if num_frames_in_batch is None else num_frames_in_batch
        targets = {"": (teacher_features, teacher_grid_thw)}
        targets[PICTURES] = (picture_teacher_features, picture_teacher_grid_thw)
        loss = 0
        for kind, chosen in videos_by_teacher(grids, picture_teacher_features is not None).items():
            # A head without a video still gets gradients, of zero, so that no process waits for another's.
            head, (features, teacher_grids) = getattr(self, f"{kind}distillation_head"), targets[kind]
            patches = of_videos(positions, grids, chosen)
            hidden_states = [outputs.hidden_states[layer].flatten(0, 1)[patches] for layer in head.layers]
            student, teacher, patches_per_frame = align_grids(
                head(hidden_states), frame_grids(grids[chosen]), features, frame_grids(teacher_grids)
            )
            loss = loss + distillation_loss(student, teacher, patches_per_frame, num_frames, head.distance)
        # The hidden states are large and no longer needed.
        return VideoPandaDistillationOutput(**{**outputs, "hidden_states": None, "distillation_loss": loss})


def attach_distillation_head(
    model: VideoPandaForConditionalGeneration, head: VideoPandaDistillationHead, name: str = "distillation_head"
) -> None:
    """
    Adds a distillation head to a model, as a submodule.

    The model's forward then takes `teacher_features` of shape `(teacher_patches, teacher_hidden_size)`,
    `teacher_grid_thw` of shape `(videos, 3)` on the CPU, and `num_frames_in_batch`. With `teacher_features`, its
    output also has `distillation_loss`.

    A model with a `picture_distillation_head` too may get `picture_teacher_features` and `picture_teacher_grid_thw`
    beside them. These are then of the videos of one frame, and the first ones of all others.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model. It is changed in place.
        head (`VideoPandaDistillationHead`):
            The head.
        name (`str`, *optional*, defaults to `"distillation_head"`):
            Its name in the model: `"distillation_head"` or `"picture_distillation_head"`.
    """
    setattr(model, name, head)
    model._keys_to_ignore_on_save.update(f"{name}.{key}" for key in head.state_dict())
    plain = type(model)
    if not issubclass(plain, VideoPandaDistillationMixin):
        # Keep the class name and module: saved files contain them (`architectures`, PEFT's `auto_mapping`).
        attributes = {"__module__": plain.__module__}
        model.__class__ = type(plain.__name__, (VideoPandaDistillationMixin, plain), attributes)


def videos_by_teacher(video_grid_thw: torch.LongTensor, has_picture_teacher: bool) -> dict[str, torch.BoolTensor]:
    """The prefix of each teacher's names, and which videos it has: one teacher all, of two the second the pictures."""
    is_picture = video_grid_thw[:, 0] == 1
    return {"": ~is_picture, PICTURES: is_picture} if has_picture_teacher else {"": torch.ones_like(is_picture)}


def of_videos(packed: torch.Tensor, video_grid_thw: torch.LongTensor, chosen: torch.BoolTensor) -> torch.Tensor:
    """The chosen videos' part of what is packed by the grids. Grids and `chosen` are on the CPU."""
    return packed if chosen.all() else packed[chosen.repeat_interleave(video_grid_thw.prod(1)).to(packed.device)]


def patch_positions(config, input_ids: torch.LongTensor, video_grid_thw: torch.LongTensor) -> torch.LongTensor:
    """Positions of LSD's tokens (not contexts, not `<row>`) in the flattened batch (batch · sequence,), in the order
    (video, frame, row, column). `video_grid_thw` is on the CPU."""
    vision = config.vision_config
    grids = tuple(map(tuple, video_grid_thw.tolist()))
    layout = lay_out(grids, None, vision.spatial_merge_size, vision.frames_per_clip)
    num_patches, num_frames = len(layout.windows), layout.num_frames
    order = layout.token_order[layout.token_order < num_patches + num_frames]  # what stands at `<video>`: all but ROW
    is_patch = (order < num_patches).nonzero().squeeze(1)
    placeholders = (input_ids == config.video_token_id).flatten().nonzero().squeeze(1)
    return placeholders[is_patch.to(input_ids.device)]


def align_grids(student, student_grids, teacher, teacher_grids):
    """
    Average-pools student and teacher to the smaller of their grids, in rows and in columns.

    Args:
        student, teacher: packed features (patches, D).
        student_grids, teacher_grids: rows and columns of each frame, (frames, 2).

    Returns:
        Both features on the same grids, and the number of patches of each frame (frames,).
    """
    grids = torch.minimum(student_grids, teacher_grids)
    return pool(student, student_grids, grids), pool(teacher, teacher_grids, grids), grids.prod(1)


def pool(features: torch.Tensor, grids: torch.LongTensor, targets: torch.LongTensor) -> torch.Tensor:
    """Average-pools packed features (patches, D) of frames from their grids (frames, 2) to the target grids."""
    if torch.equal(grids, targets):
        return features
    first = targets.prod(1).cumsum(0) - targets.prod(1)
    parts, places = [], []
    for (rows, columns), frames, patches in frames_by_shape(grids):
        # Frames of one shape have one target: both follow from the student's grid.
        target = targets[frames[0]].tolist()
        pictures = features[patches.to(features.device)].view(len(frames), rows, columns, -1).permute(0, 3, 1, 2)
        parts.append(F.adaptive_avg_pool2d(pictures, target).permute(0, 2, 3, 1).flatten(0, 2))
        places.append((first[frames][:, None] + torch.arange(math.prod(target))).flatten())
    return torch.cat(parts)[torch.cat(places).argsort().to(features.device)]


def frame_grids(video_grid_thw: torch.LongTensor) -> torch.LongTensor:
    """Grids of videos (videos, 3) → rows and columns of every frame (frames, 2)."""
    return video_grid_thw[:, 1:].repeat_interleave(video_grid_thw[:, 0], dim=0)


def frames_by_shape(
    grids: torch.LongTensor,
) -> Iterator[tuple[tuple[int, int], torch.LongTensor, torch.LongTensor]]:
    """Yields each distinct shape (rows, columns) of the grids (frames, 2), the indices of its frames (n,), and those
    of their packed patches (n · rows · columns,)."""
    patches = grids.prod(1)
    first = patches.cumsum(0) - patches
    for rows, columns in grids.unique(dim=0).tolist():
        frames = (grids == torch.tensor([rows, columns])).all(1).nonzero().squeeze(1)
        yield (rows, columns), frames, (first[frames][:, None] + torch.arange(rows * columns)).flatten()


def load_head(head: VideoPandaDistillationHead, file_or_folder: str, kind: str = "") -> None:
    """
    Loads a head's weights. `kind` is `PICTURES` for the head of pictures.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the head is for another LLM or teacher.
    """
    path = Path(file_or_folder)
    path = path / f"{kind}{HEAD_FILE}" if path.is_dir() else path
    try:
        head.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is the distillation head of another LLM or teacher: {error}") from error


def save_head(head: VideoPandaDistillationHead, folder: Path | None, kind: str = "") -> None:
    """Saves a head's weights in the folder, `kind` as for `load_head`. Under FSDP2 all processes must call this,
    because gathering the shards is collective; those that pass `None` write nothing."""
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in head.state_dict().items()
    }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / f"{kind}{HEAD_FILE}", {"format": "pt"})
