"""LanguageBind's video tower as a teacher: a CLIP vision transformer whose layers also attend over time."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, CLIPVisionEmbeddings


# What its `vision_config` says of the architecture. The rest is about LanguageBind's own training.
SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"]
SETTINGS = [*SIZES, "num_channels", "hidden_act", "layer_norm_eps"]
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


class TemporalLayer(CLIPEncoderLayer):
    """A layer of CLIP that first attends over the frames of a window, at each patch position by itself."""

    def __init__(self, config: CLIPVisionConfig, num_frames: int):
        super().__init__(config)
        self.temporal_embedding = nn.Parameter(torch.zeros(1, num_frames, config.hidden_size))
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal_attn = CLIPAttention(config)

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        """`hidden_states` is of shape `(windows · num_frames, patches, hidden_size)`."""
        hidden_states = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2)  # (windows, patches, frames, d)
        if num_frames > 1:
            hidden_states = hidden_states + self.temporal_embedding[:, :num_frames]
        attended, _ = self.temporal_attn(self.temporal_layer_norm1(hidden_states).flatten(0, 1))
        hidden_states = hidden_states + attended.view_as(hidden_states)
        return super().forward(hidden_states.transpose(1, 2).flatten(0, 1), attention_mask=None)


class LanguageBindVideoTower(nn.Module):
    r"""
    LanguageBind's video tower up to its second-to-last layer, whose features it gives. The last layer is not loaded.

    It sees windows of `num_frames` consecutive frames. If their number is not a multiple, the last window begins
    earlier, so that it is a whole one too; frames that are in two windows have the features of the first. A video with
    fewer frames is one shorter window. A picture is a window of one frame, without temporal embedding.

    Args:
        config (`CLIPVisionConfig`):
            Sizes of the vision transformer.
        num_frames (`int`):
            Frames of a window.
    """

    def __init__(self, config: CLIPVisionConfig, num_frames: int):
        super().__init__()
        self.config, self.num_frames = config, num_frames
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(TemporalLayer(config, num_frames) for _ in range(config.num_hidden_layers - 1))

    def features(self, frames: torch.Tensor) -> torch.Tensor:
        """
        Args:
            frames (`torch.Tensor` of shape `(frames, channels, height, width)`):
                The frames of one video, normalised, square.

        Returns:
            `torch.Tensor` of shape `(frames, patches, hidden_size)`, without the class token.
        """
        size = min(len(frames), self.num_frames)
        rest = len(frames) % size
        starts = [*range(0, len(frames) - rest, size), *([len(frames) - size] if rest else [])]
        windows = torch.cat([frames[start : start + size] for start in starts])
        interpolates = frames.shape[-1] != self.config.image_size
        hidden_states = self.pre_layrnorm(self.embeddings(windows, interpolate_pos_encoding=interpolates))
        for layer in self.layers:
            hidden_states = layer(hidden_states, size)
        if rest:
            hidden_states = torch.cat([hidden_states[:-size], hidden_states[-rest:]])
        return hidden_states[:, 1:]

    @classmethod
    def from_pretrained(cls, name_or_path: str, dtype: torch.dtype = torch.float32) -> "LanguageBindVideoTower":
        """
        Loads the tower from a repository or folder in LanguageBind's layout: `config.json` with a `vision_config` that
        has `add_time_attn` and `num_frames`, and weights `vision_model.*` among others, in `model*.safetensors` or
        else in `pytorch_model*.bin`. Only the tower's tensors are read, one by one. Nothing in a pickle is run.

        Args:
            name_or_path (`str`):
                Folder or Hub id.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Dtype of the weights.

        Returns:
            `LanguageBindVideoTower`.

        Raises:
            FileNotFoundError: If there are no weights.
            ValueError: If a file is damaged or holds more than tensors, if a tensor is missing or has another shape
                than the configuration says, or if the configuration has no temporal attention.
        """
        settings = video_settings(name_or_path)
        if settings is None:
            raise ValueError(f"{name_or_path} is no video tower of LanguageBind: no `add_time_attn` in config.json.")
        known = {name: settings[name] for name in SETTINGS if name in settings}
        with torch.device("meta"):
            tower = cls(CLIPVisionConfig(**known, attn_implementation="sdpa"), settings.get("num_frames", 1))
        wanted = {name_in_checkpoint(name): (name, value.shape) for name, value in tower.state_dict().items()}
        found = {}
        for file in weight_files(name_or_path):
            for key, tensor in tensors_of(file, wanted):
                name, shape = wanted[key]
                if tensor.shape != shape:
                    raise ValueError(
                        f"{file}: `{key}` has the shape {tuple(tensor.shape)}, not {tuple(shape)} as in config.json."
                    )
                found[name] = tensor.to(dtype, copy=True)
        if missing := [key for key, (name, _) in wanted.items() if name not in found]:
            raise ValueError(
                f"{name_or_path} lacks `{missing[0]}`, {len(missing)} of {len(wanted)} tensors in all. If it has "
                "adapters (LoRA), take the repository where they are merged."
            )
        tower.load_state_dict(found, assign=True)
        positions = torch.arange(tower.embeddings.num_positions)
        tower.embeddings.position_ids = positions[None]  # not in the state, so it is still on "meta"
        return tower


def video_settings(name_or_path: str) -> dict | None:
    """The `vision_config` of a video tower of LanguageBind, or `None` for any other model."""
    settings = CLIPVisionConfig.get_config_dict(name_or_path)[0].get("vision_config")
    return settings if isinstance(settings, dict) and settings.get("add_time_attn") else None


def name_in_checkpoint(name: str) -> str:
    return f"vision_model.encoder.{name}" if name.startswith("layers.") else f"vision_model.{name}"


def weight_files(name_or_path: str) -> list[Path]:
    for pattern in WEIGHTS:
        is_folder = Path(name_or_path).is_dir()
        folder = name_or_path if is_folder else snapshot_download(name_or_path, allow_patterns=pattern)
        if files := sorted(Path(folder).glob(pattern)):
            return files
    raise FileNotFoundError(f"{name_or_path} has no weights: neither {' nor '.join(WEIGHTS)}.")


def tensors_of(file: Path, wanted) -> Iterator[tuple[str, torch.Tensor]]:
    """The wanted tensors of a file, read as they are asked for."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                yield from ((key, opened.get_tensor(key)) for key in opened.keys() if key in wanted)
            return
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, SafetensorError, EOFError) as error:
        # torch's message recommends to load the file without this protection.
        raise ValueError(f"{file} is damaged, or a pickle of more than tensors, of which nothing was run.") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensors.get(key), torch.Tensor | None) for key in wanted):
        raise ValueError(f"{file} should hold tensors by name.")
    yield from ((key, tensors[key]) for key in wanted if tensors.get(key) is not None)
