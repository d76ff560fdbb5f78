"""Variants of the model, as in the paper's tables: the settings and classes that differ from the model's own.

    python examples/train.py --config examples/recipes/stage1.yaml --variant lsd_first --model … --data …
    python examples/ablations/variants.py eval predict --model runs/stage3 …

The second command is `video-panda`, which then knows the variants. In a script, `import variants` makes the Auto
classes know them. Where the paper leaves something open, the docstring of the part says what is chosen here.
"""

import sys
from dataclasses import replace

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.functional import gelu
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GradientCheckpointingLayer,
)
from transformers import initialization as init

from video_panda_hf import (
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaModel,
    VideoPandaProcessor,
    VideoPandaVisionConfig,
    VideoPandaVisionModel,
)
from video_panda_hf.modeling import lay_out


VARIANTS = {  # settings of `VariantVisionConfig`
    "without_lste": {"use_lste": False},
    "without_gstra": {"use_gstra": False},
    "without_lste_and_gstra": {"use_lste": False, "use_gstra": False},
    "without_fsra": {"use_fsra": False},
    "without_lsd": {"use_lsd": False},
    "without_row": {"use_row_tokens": False},
    "lsd_first": {"lsd_first": True},  # table 8
    "resampler": {"use_resampler": True},  # table 9
    "half_resolution": {"spatial_merge_size": 1, "use_lsd": False},  # table 9; and `image_size`, see `variant_config`
}


@strict
class VariantVisionConfig(VideoPandaVisionConfig):
    r"""
    Configuration of a variant of STAB. It has the settings of `VideoPandaVisionConfig`, and these. What is left out by
    the first four is a learned branch; what the branch is added to stays.

    Args:
        use_lste (`bool`, *optional*, defaults to `True`):
            `False`: no LSTE and no DPE. The patch embeddings stay as they are.
        use_gstra (`bool`, *optional*, defaults to `True`):
            `False`: only the learned query of GSTRA.
        use_fsra (`bool`, *optional*, defaults to `True`):
            `False`: only the learned query of FSRA.
        use_lsd (`bool`, *optional*, defaults to `True`):
            `False`: only the mean of each window.
        use_row_tokens (`bool`, *optional*, defaults to `True`):
            `False`: no `<row>` after a row of tokens. The processor is a `WithoutRowProcessor` then.
        lsd_first (`bool`, *optional*, defaults to `False`):
            LSD before LSTE. LSTE, DPE and GSTRA then see windows in place of patches, a quarter as many. The E of
            `Z = L + E` is what LSD returns, and Z are the tokens.
        use_resampler (`bool`, *optional*, defaults to `False`):
            A `PerceiverResampler` in place of LSD.
        variant (`str`, *optional*):
            The name of the variant in `VARIANTS`.
    """

    model_type = "video_panda_variant_vision"

    use_lste: bool = True
    use_gstra: bool = True
    use_fsra: bool = True
    use_lsd: bool = True
    use_row_tokens: bool = True
    lsd_first: bool = False
    use_resampler: bool = False
    variant: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.lsd_first + self.use_resampler + (not self.use_lsd) > 1:
            raise ValueError("`lsd_first`, `use_resampler` and `use_lsd=False` exclude each other: choose one.")


@strict
class VariantConfig(VideoPandaConfig):
    """Configuration of a model around a variant of STAB."""

    model_type = "video_panda_variant"
    sub_configs = {"text_config": AutoConfig, "vision_config": VariantVisionConfig}
    _auto_class = None


# Parts of STAB


def no_weights(keys: torch.Tensor) -> torch.Tensor:
    """The attention weights of a part that has no attention to keys (B, K, D): none of any head, (B, 0, K)."""
    return keys.new_zeros(len(keys), 0, keys.shape[1])


class QueryOfClips(nn.Module):
    """What is left of GSTRA without its branch."""

    def __init__(self, config: VariantVisionConfig):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, config.hidden_size))

    def forward(self, cells):
        """`cells` (clips, F·H·W, D) → the query for each clip (clips, D)."""
        return self.query.expand(len(cells), -1), no_weights(cells)


class QueryOfFrames(nn.Module):
    """What is left of FSRA without its branch."""

    def __init__(self, config: VariantVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, tokens, mask):
        """`tokens` (frames, tokens, D) → the query for each frame (frames, D)."""
        return self.class_embedding.expand(len(tokens), -1), no_weights(tokens)


class MeanOfWindows(nn.Module):
    """What is left of LSD without its branch."""

    def forward(self, patches, windows):
        """`patches` (patches, D), `windows` (windows, 4) rows of it → means (windows, D)."""
        patches = patches[windows]
        return patches.mean(1), no_weights(patches)


class PerceiverResampler(GradientCheckpointingLayer):
    """
    Learned latents attend to all patches of their frame: `t = x + O·MHA(q = LN1(x), kv = LN2(z))`, then
    `t + MLP(LN3(t))`, with the MLP D → 4D, GELU, 4D → D.

    The paper names the resampler alone. Chosen here: one layer; keys are the patches, without the latents; as many
    latents as the canvas has windows, so that a frame has as many tokens as with LSD. A frame of n windows takes the
    first n latents.
    """

    def __init__(self, config: VariantVisionConfig):
        super().__init__()
        hidden_size, eps = config.hidden_size, config.layer_norm_eps
        side = config.image_size // (config.patch_size * config.spatial_merge_size)
        self.latents = nn.Parameter(torch.empty(side**2, hidden_size))
        self.query_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.key_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.attention = nn.MultiheadAttention(hidden_size, config.num_attention_heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp_in = nn.Linear(hidden_size, 4 * hidden_size)
        self.mlp_out = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, patches, mask):
        """`patches` (frames, windows, 4, D), `mask` (frames, windows) → tokens (frames, windows, D)."""
        frames, windows, cells, _ = patches.shape
        patches = self.key_norm(patches.flatten(1, 2))  # (frames, windows · 4, D)
        latents = self.latents[:windows].expand(frames, -1, -1)
        hidden = None if mask is None else ~mask.repeat_interleave(cells, 1)
        query = self.query_norm(latents)
        attended, _ = self.attention(query, patches, patches, key_padding_mask=hidden, need_weights=False)
        tokens = latents + attended
        return tokens + self.mlp_out(gelu(self.mlp_in(self.mlp_norm(tokens))))


# Models


class VariantVisionModel(VideoPandaVisionModel):
    """
    A variant of STAB. Parameters have the names of the model's own, so a checkpoint of it can be gone on from.

    With `lsd_first`, `last_hidden_state` has a row for each window. A part without attention has weights of no heads;
    LSD's are left out with `lsd_first`. Without `<row>` the embedding of ROW is there, and is used nowhere.
    """

    config: VariantVisionConfig
    _no_split_modules = ["VariantVisionModel", "VideoPandaProjector"]
    _auto_class = None

    def __init__(self, config: VariantVisionConfig):
        super().__init__(config)
        if not config.use_lste:
            self.lste = self.dpe = nn.Identity()
        if not config.use_gstra:
            self.gstra = QueryOfClips(config)
        if not config.use_fsra:
            self.fsra = QueryOfFrames(config)
        if not config.use_lsd:
            self.lsd = MeanOfWindows()
        if config.use_resampler:
            self.lsd, self.resampler = None, PerceiverResampler(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        """As the model's own, for the parts that are here."""
        if module is self and not self.config.use_lste:
            init.normal_(self.row_embedding, std=self.config.hidden_size**-0.5)
            return
        super()._init_weights(module)
        if isinstance(module, QueryOfClips):
            init.zeros_(module.query)
        elif isinstance(module, QueryOfFrames):
            init.normal_(module.class_embedding, std=self.config.hidden_size**-0.5)
        elif isinstance(module, PerceiverResampler):
            init.normal_(module.latents, std=self.config.hidden_size**-0.5)

    def lay_out(self, pixel_values_videos, video_grid_thw):
        layout, config = super().lay_out(pixel_values_videos, video_grid_thw), self.config
        merge, grids = config.spatial_merge_size, torch.as_tensor(video_grid_thw, device="cpu").long()
        times, rows, columns = grids[:, 0], grids[:, 1] // merge, grids[:, 2] // merge  # in windows
        if config.lsd_first:
            side = config.image_size // (config.patch_size * merge) if config.pad_to_square else None
            of_windows = tuple(map(tuple, torch.stack([times, rows, columns], 1).tolist()))
            of_windows = lay_out(of_windows, side, 1, config.frames_per_clip)
            layout = replace(layout, groups=of_windows.groups, clip_of_frame=of_windows.clip_of_frame)
        if not config.use_row_tokens:
            order = layout.token_order
            order = order[order < len(layout.windows) + layout.num_frames]
            layout = replace(layout, token_order=order, tokens_per_video=(times * (1 + rows * columns)).tolist())
        return layout

    def align(self, embeddings, background, layout):
        if self.config.lsd_first:
            embeddings, _ = self.lsd(embeddings, layout.windows)
            if background is not None:  # a window of four patches of background
                window = torch.zeros(1, layout.windows.shape[1], dtype=torch.long, device=background.device)
                background, _ = self.lsd(background, window)
        return super().align(embeddings, background, layout)

    def downsample(self, aligned, layout):
        if self.config.lsd_first:
            return aligned, no_weights(aligned[:, None])
        if not self.config.use_resampler:
            return super().downsample(aligned, layout)
        patches = aligned[layout.tokens_of_frames(layout.windows)]  # (frames, longest, 4, D)
        tokens, mask = self.resampler(patches, layout.token_mask), layout.token_mask
        weights = no_weights(aligned[layout.windows])
        if mask is None:
            return tokens.flatten(0, 1), weights
        packed = tokens.new_zeros(len(layout.windows), tokens.shape[-1])
        return packed.index_add(0, layout.frame_tokens.flatten(), (tokens * mask[..., None]).flatten(0, 1)), weights


class VariantModel(VideoPandaModel):
    """A variant of STAB, projector and language model without its head."""

    config: VariantConfig
    vision_class = VariantVisionModel
    _no_split_modules = VariantVisionModel._no_split_modules
    _auto_class = None


class VariantForConditionalGeneration(VideoPandaForConditionalGeneration):
    """The model around a variant of STAB."""

    config: VariantConfig
    model_class = VariantModel
    _no_split_modules = VariantVisionModel._no_split_modules
    _auto_class = None


class WithoutRowProcessor(VideoPandaProcessor):
    """The processor of a variant without `<row>`."""

    _auto_class = None

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        """Also of checkpoints that have the switch `use_row_tokens`."""
        settings = {name: value for name, value in processor_dict.items() if name != "use_row_tokens"}
        return super().from_args_and_dict(args, settings, **kwargs)

    def placeholders_of_frame(self, rows: int, columns: int) -> list[str]:
        return [self.video_token] * (1 + rows * columns)


AutoConfig.register("video_panda_variant", VariantConfig, exist_ok=True)
AutoModelForImageTextToText.register(VariantConfig, VariantForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(VariantConfig, VariantForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VariantConfig, WithoutRowProcessor, exist_ok=True)  # the others are of a class that it knows


# Models to start from


def variant_config(name: str, vision_config: VideoPandaVisionConfig | None = None) -> VariantVisionConfig:
    """
    The configuration of a variant.

    Args:
        name (`str`):
            One of `VARIANTS`.
        vision_config (`VideoPandaVisionConfig`, *optional*):
            The sizes of the model itself. Defaults to the released model's.

    Returns:
        `VariantVisionConfig`. That of `"half_resolution"` has half the `image_size`: a patch is a token then, and a
        frame has as many tokens as with LSD. This is what the paper's table 9 is taken to compare.

    Raises:
        ValueError: for another name.
    """
    if name not in VARIANTS:
        raise ValueError(f"a variant is one of {', '.join(VARIANTS)}, not {name!r}.")
    own = (vision_config or VideoPandaVisionConfig()).to_dict()
    if name == "half_resolution":
        own["image_size"] //= own["spatial_merge_size"]
    del own["model_type"]
    return VariantVisionConfig(**{**own, **VARIANTS[name], "variant": name})


def processor_class(vision_config: VariantVisionConfig) -> type[VideoPandaProcessor]:
    """The class of a variant's processor."""
    return VideoPandaProcessor if vision_config.use_row_tokens else WithoutRowProcessor


def load_variant(name: str, model: str | None = None, llm: str | None = None, **options):
    """
    A variant to train, and its processor.

    Args:
        name (`str`):
            One of `VARIANTS`.
        model (`str`, *optional*):
            Folder or Hub id of a checkpoint: of this variant, which is loaded as it is, or of the model itself, whose
            weights the variant takes as far as it has them; the others are new.
        llm (`str`, *optional*):
            Instead of `model`: a causal LM to build a new one on.
        options:
            What `from_pretrained` takes: `dtype`, `quantization_config`, …

    Returns:
        `(VariantForConditionalGeneration, VideoPandaProcessor)`.

    Raises:
        ValueError: for another name, or a checkpoint of another variant.
    """
    if llm is not None:
        vision = variant_config(name)
        processor = processor_class(vision).from_text_pretrained(
            llm, vision.image_size, vision.patch_size, merge_size=vision.spatial_merge_size
        )
        return VariantForConditionalGeneration.from_text_pretrained(llm, vision, **options), processor

    own = AutoConfig.from_pretrained(model)
    if isinstance(own, VariantConfig):
        if own.vision_config.variant != name:
            raise ValueError(f"{model} is the variant {own.vision_config.variant!r}, not {name!r}.")
        return VariantForConditionalGeneration.from_pretrained(model, **options), AutoProcessor.from_pretrained(model)

    vision = variant_config(name, own.vision_config)
    names = ("text_config", "video_token_id", "row_token_id", "projector_hidden_act", "tie_word_embeddings")
    config = VariantConfig(vision_config=vision, **{name: getattr(own, name) for name in names})
    processor = processor_class(vision).from_pretrained(model)
    processor.video_processor.size = {"longest_edge": vision.image_size}
    processor.video_processor.merge_size = vision.spatial_merge_size
    return VariantForConditionalGeneration.from_pretrained(model, config=config, **options), processor


if __name__ == "__main__":
    from video_panda_cli import main, options

    options.MODEL_TYPES.append(VariantConfig.model_type)
    sys.exit(main())
