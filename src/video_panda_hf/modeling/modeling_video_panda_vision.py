"""STAB, the Spatio-Temporal Alignment Block: patches of any number of videos in, language-model tokens out.

`VideoPandaVisionModel` reads top-down: patch embedding, LSTE with DPE, GSTRA, LSD, FSRA, fusion, sequence. Section
and equation numbers are those of the paper (arXiv 2412.18609). Everything works on packed tensors: the patches of all
videos of a batch in one row, whatever their shapes and lengths; which patch is where is worked out on the host, in
`layout_video_panda.py`, so nothing here waits for the device.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GradientCheckpointingLayer, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_video_panda import VideoPandaConfig, VideoPandaVisionConfig
from .layout_video_panda import VideoLayout


try:
    from video_panda_hf.quiet import progress_bars_on_terminals
except ImportError:  # this file came with a checkpoint, and the package is not installed
    progress_bars_on_terminals = nullcontext  # type: ignore[assignment]


@dataclass
class VideoPandaVisionModelOutput(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(patches, hidden_size)`):
        The patches after LSTE, DPE and the skip connection (Z), packed as they came in.
    pooler_output (`tuple[torch.FloatTensor]`, one of shape `(tokens, hidden_size)` per video):
        The sequence of each video: per frame the context token, then its rows of tokens, each ended by ROW.
    hidden_states (`tuple[torch.FloatTensor]`, *optional*):
        The patch embeddings and Z, both `(patches, hidden_size)`.
    attentions (`tuple[torch.FloatTensor]`, *optional*):
        The weights of GSTRA `(clips, heads, cells)`, LSD `(windows, heads, cells of a window)` and FSRA
        `(frames, heads, tokens)`. Rows shorter than the longest are filled with zeros.
    tokens (`torch.FloatTensor` of shape `(windows + frames + 1, hidden_size)`):
        Every distinct token once: LSD's windows, the frames' contexts, ROW. What the projector has to compute.
    token_order (`torch.LongTensor` of shape `(sum of tokens,)`):
        Rows of `tokens` that make up the videos' sequences.
    tokens_per_video (`list[int]`):
        Lengths of the sequences.
    """

    tokens: torch.FloatTensor | None = None
    token_order: torch.LongTensor | None = None
    tokens_per_video: list[int] | None = None


class VideoPandaPreTrainedModel(PreTrainedModel):
    config: VideoPandaConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("video", "text")
    supports_gradient_checkpointing = True
    # Keep each of these on one device: STAB's parts share index tensors, and a split projector only adds copies.
    _no_split_modules = ["VideoPandaVisionModel", "VideoPandaProjector"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `PreTrainedModel`'s; progress bars are shown on a terminal only."""
        with progress_bars_on_terminals():
            return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `PreTrainedModel`'s; the `auto_map` names all Auto classes, progress bars need a terminal."""
        if self._auto_class is not None:
            self.config.auto_map = dict(self.config.classes_by_auto_class)
        with progress_bars_on_terminals():
            super().save_pretrained(save_directory, *args, **kwargs)

    def __init_subclass__(cls, **kwargs):
        """
        FSDP2 replaces a model's class by a subclass that is defined in torch. A saved checkpoint names the module of
        the class, so the subclass gets the name and module of the original.
        """
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):
            original = next(base for base in cls.__mro__[1:] if issubclass(base, VideoPandaPreTrainedModel))
            cls.__module__, cls.__name__ = original.__module__, original.__name__

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialises as the reference does: the residual branches in time (LSTE, GSTRA) start as the identity."""
        super()._init_weights(module)
        std = getattr(self.config, "initializer_range", None) or 0.02
        if isinstance(module, FewQueryPooling):
            init.normal_(module.key_weight, std=std)
            init.normal_(module.value_weight, std=std)
        elif isinstance(module, GlobalSpatioTemporalAggregator):
            init.zeros_(module.query)
            init.zeros_(module.attention.output.weight)
            init.zeros_(module.mlp_out.weight)
        elif isinstance(module, FrameSpatialAggregator):
            init.normal_(module.class_embedding, std=module.class_embedding.shape[0] ** -0.5)
        elif isinstance(module, ContextFusion):
            init.zeros_(module.balance)
        elif isinstance(module, VideoPandaVisionModel):
            init.normal_(module.row_embedding, std=module.row_embedding.shape[0] ** -0.5)
            init.zeros_(module.lste.expand.weight)  # here: LSTE itself has no parameter and is not visited


class VideoPandaVisionModel(VideoPandaPreTrainedModel):
    """STAB [3.1]. At the released size it has 24.1 M parameters, and 45.1 M together with the projector."""

    config: VideoPandaVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__(config)
        patch_dim = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_dim, config.hidden_size, bias=False)
        self.lste = LocalSpatioTemporalEncoding(config)
        self.dpe = DynamicPositionEncoding(config)
        self.gstra = GlobalSpatioTemporalAggregator(config)
        self.lsd = LocalSpatialDownsampling(config)
        self.fsra = FrameSpatialAggregator(config)
        self.fusion = ContextFusion(config)
        self.row_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.post_init()

    def get_input_embeddings(self):
        return self.patch_embedding

    def set_input_embeddings(self, value):
        self.patch_embedding = value

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: torch.FloatTensor,
        video_grid_thw: torch.LongTensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> VideoPandaVisionModelOutput:
        r"""
        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(patches, num_channels * patch_size**2)`):
                Normalised pixels of the patches of all videos: video by video, in the order (frame, row, column), each
                flattened (channel, y, x).
            video_grid_thw (`torch.LongTensor` of shape `(videos, 3)`):
                Frames, rows and columns of each video, in patches. Keep it on the CPU: a copy on the device has to be
                fetched back first.

        Raises:
            ValueError: if a grid is impossible (frames, odd sides, larger than the canvas) or does not add up to the
                patches given. The message names the video.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions

        dtype, device = self.fsra.class_embedding.dtype, pixel_values_videos.device
        layout = self.lay_out(pixel_values_videos, video_grid_thw).to(device)

        embeddings = self.patch_embedding(pixel_values_videos.to(dtype))  # (patches, D), eq. 1
        hidden_states = (embeddings,) if output_hidden_states else None
        background = self.background_embedding(device, dtype) if layout.has_background else None  # (1, D)
        aligned, summaries, gstra_weights = self.align(embeddings, background, layout)
        del embeddings

        windows, lsd_weights = self.downsample(aligned, layout)  # (windows, D)
        frames, fsra_weights = self.fsra(layout.tokens_of_frames(windows), layout.token_mask)  # (frames, D)
        contexts = self.fusion(frames, summaries, layout.clip_of_frame, layout.is_image)  # (frames, D)

        tokens = torch.cat([windows, contexts, self.row_embedding[None]])
        if hidden_states is not None:
            hidden_states += (aligned,)
        attentions = (*pad_weights(gstra_weights), lsd_weights, fsra_weights) if output_attentions else None
        return VideoPandaVisionModelOutput(
            last_hidden_state=aligned,
            pooler_output=tokens[layout.token_order].split(layout.tokens_per_video),
            hidden_states=hidden_states,
            attentions=attentions,
            tokens=tokens,
            token_order=layout.token_order,
            tokens_per_video=layout.tokens_per_video,
        )

    def lay_out(self, pixel_values_videos, video_grid_thw) -> VideoLayout:
        """Where everything is in the batch, on the CPU."""
        return VideoLayout.of(pixel_values_videos, video_grid_thw, self.config)

    def align(self, embeddings, background, layout: VideoLayout):
        """Patches (patches, D) → Z = L + E, the clips' summaries of each group and GSTRA's weights of each."""
        aligned, summaries, weights = embeddings, [], []
        for group in layout.groups:  # one, or one per grid shape where there is no shared canvas
            cells = self.dpe(self.lste(group.place(embeddings, background)))  # (clips, F, H, W, D)
            summary, weights_of_group = self.gstra(cells.flatten(1, 3))  # (clips, D)
            aligned = group.add(aligned, cells)
            summaries.append(summary)
            weights.append(weights_of_group)
            del cells
        return aligned, summaries, weights

    def downsample(self, aligned, layout: VideoLayout):
        """Z (patches, D) → tokens (windows, D), and attention weights."""
        return self.lsd(aligned, layout.windows)

    def background_embedding(self, device, dtype) -> torch.Tensor:
        """The embedding of a patch of the canvas' background, (1, D)."""
        patch = torch.tensor(self.config.background).repeat_interleave(self.config.patch_size**2)[None]
        return self.patch_embedding(patch.to(device, dtype, non_blocking=True))


class LocalSpatioTemporalEncoding(nn.Module):
    """LSTE [eq. 2]: `E + C3(C2(C1(BN(E))))`, mixing each cell with the same cell of the frames beside it."""

    # Not a `GradientCheckpointingLayer` like the others: it would run twice, and batch norm must see a batch once.

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        hidden_size = config.hidden_size
        reduced_size = int(hidden_size / 1.5)
        self.norm = nn.BatchNorm1d(hidden_size, eps=config.layer_norm_eps)
        self.reduce = nn.Linear(hidden_size, reduced_size)
        self.mix = nn.Conv2d(reduced_size, reduced_size, kernel_size=(3, 1), padding=(1, 0), groups=reduced_size)
        self.expand = nn.Linear(reduced_size, hidden_size)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """`cells` (clips, F, H, W, D) → same shape."""
        hidden = self.reduce(self.norm(cells.flatten(0, 3)).view_as(cells))
        # Time and space as the two axes of a channels-last picture: a view, not a copy.
        hidden = self.mix(hidden.flatten(2, 3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return cells + self.expand(hidden).view_as(cells)


class DynamicPositionEncoding(GradientCheckpointingLayer, nn.Conv3d):
    """DPE [eq. 3]: `L' + DW(L')`, DW a depthwise 3×3×3 convolution that pads with zeros."""

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__(config.hidden_size, config.hidden_size, kernel_size=3, padding=1, groups=config.hidden_size)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """`cells` (clips, F, H, W, D) → same shape."""
        if cells.is_cuda:  # a 3D convolution is fast here on channels-first data, even with the copies
            encoded = super().forward(cells.permute(0, 4, 1, 2, 3).contiguous())
            return cells + encoded.permute(0, 2, 3, 4, 1)
        # On the CPU, three depthwise 2D convolutions, one for each tap in time, are several times faster than a 3D
        # one: they read channels-last data without a copy.
        past, present, future = self.weight.unbind(2)  # each (D, 1, 3, 3)
        encoded = cells + self._convolve(cells, present, self.bias)
        encoded[:, 1:] += self._convolve(cells[:, :-1], past)
        encoded[:, :-1] += self._convolve(cells[:, 1:], future)
        return encoded

    def _convolve(self, cells, weight, bias=None):
        pictures = cells.flatten(0, 1).permute(0, 3, 1, 2)  # (clips · F, D, H, W)
        pictures = F.conv2d(pictures, weight, bias, padding=1, groups=self.groups)
        return pictures.permute(0, 2, 3, 1).reshape(cells.shape)


class FewQueryPooling(nn.Module):
    """Multi-head attention with few queries and many keys, which never projects the keys and values.

    Each head's query is moved to the space of the keys instead: `(W_k x)·q = x·(W_kᵀ q)`. The values are projected
    after they are summed: `Σ a·(W_v x) = W_v (Σ a·x)`. The result is that of the textbook form, at a fraction of its
    cost. A bias of the keys shifts all scores of a query alike and has no effect; that of the values is added once.
    The two weights are plain parameters because no linear layer is called with them.
    """

    def __init__(self, hidden_size: int, num_heads: int, scale: float, bias: bool):
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.query = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.key_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.value_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.value_bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries, keys, mask=None):
        """
        Args:
            queries (`torch.Tensor` of shape `(B, D)`):
                The queries; `(1, D)` for one that all share.
            keys (`torch.Tensor` of shape `(B, K, D)`):
                The keys, which are the values as well.
            mask (`torch.BoolTensor` of shape `(B, K)`, *optional*):
                `True` where there is a key. Defaults to everywhere.

        Returns:
            `(attended, weights)`: `(B, D)` and `(B, heads, K)`.
        """
        per_head = self.key_weight.unflatten(0, (self.num_heads, -1))  # (heads, d, D)
        queries = self.query(queries).unflatten(-1, (self.num_heads, -1)) * self.scale  # (B, heads, d)
        queries = (queries.transpose(0, 1) @ per_head).transpose(0, 1)  # (B, heads, D), in the space of the keys
        scores = torch.matmul(queries, keys.transpose(1, 2))  # (B, heads, K)
        del queries
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(keys.dtype)
        attended = torch.matmul(weights, keys)  # (B, heads, D)
        per_head = self.value_weight.unflatten(0, (self.num_heads, -1))
        attended = (attended.transpose(0, 1) @ per_head.transpose(1, 2)).transpose(0, 1).flatten(1)  # (B, D)
        if self.value_bias is not None:
            attended = attended + self.value_bias
        return self.output(attended), weights


class GlobalSpatioTemporalAggregator(GradientCheckpointingLayer):
    """GSTRA [eq. 11-13]: one learned query sums up all cells of a clip."""

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        hidden_size, eps = config.hidden_size, config.layer_norm_eps
        head_dim = hidden_size // config.num_attention_heads
        self.query = nn.Parameter(torch.zeros(1, hidden_size))
        self.query_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.key_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.attention = FewQueryPooling(hidden_size, config.num_attention_heads, head_dim**-0.5, bias=True)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp_in = nn.Linear(hidden_size, 4 * hidden_size)
        self.mlp_out = nn.Linear(4 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`cells` (clips, F·H·W, D) → the clips' summaries g (clips, D) and the attention weights."""
        attended, weights = self.attention(self.query_norm(self.query), self.key_norm(cells))
        summary = self.query + attended
        hidden = self.mlp_in(self.mlp_norm(summary))
        hidden = self.dropout(hidden * torch.sigmoid(1.702 * hidden))
        return summary + self.mlp_out(hidden), weights


class LocalSpatialDownsampling(GradientCheckpointingLayer):
    """LSD [eq. 5-7]: each window of 2×2 patches becomes one token, its mean plus what the mean attends to in it."""

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        hidden_size, eps = config.hidden_size, config.layer_norm_eps
        self.query_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.key_norm = nn.LayerNorm(hidden_size, eps=eps)
        # The reference scales by the whole width, not by a head's.
        self.attention = FewQueryPooling(hidden_size, config.num_attention_heads, hidden_size**-0.5, bias=False)

    def forward(self, patches: torch.Tensor, windows: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`patches` (patches, D), `windows` (windows, 4) rows of it → tokens (windows, D), attention weights."""
        patches = patches[windows]  # (windows, 4, D)
        mean = patches.mean(1)
        patches = self.key_norm(patches)
        attended, weights = self.attention(self.query_norm(mean), patches)
        return mean + attended, weights


class FrameSpatialAggregator(GradientCheckpointingLayer):
    """FSRA [eq. 8-10]: the learned class embedding sums up the tokens of one frame."""

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        hidden_size, eps = config.hidden_size, config.layer_norm_eps
        self.class_embedding = nn.Parameter(torch.empty(hidden_size))
        self.query_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.key_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.attention = FewQueryPooling(hidden_size, config.num_attention_heads, hidden_size**-0.5, bias=False)

    def forward(self, tokens: torch.Tensor, mask: torch.BoolTensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`tokens` (frames, tokens, D), `mask` (frames, tokens) → f (frames, D) and the attention weights."""
        query = self.query_norm(self.class_embedding)[None]
        attended, weights = self.attention(query, self.key_norm(tokens), mask)
        return self.class_embedding + attended, weights


class ContextFusion(nn.Module):
    """Fusion [eq. 14] of a frame's summary f with the summary g of the clip that holds it: the context token."""

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        self.balance = nn.Parameter(torch.zeros(config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, frames, summaries, clip_of_frame, is_image):
        """
        Args:
            frames (`torch.Tensor` of shape `(frames, D)`):
                f of all frames.
            summaries (`list[torch.Tensor]`, each of shape `(clips, D)`):
                g of all clips; empty if there are only images.
            clip_of_frame (`torch.LongTensor` of shape `(frames,)`):
                The frame's row of the concatenated summaries; any row if the frame is an image.
            is_image (`torch.BoolTensor` of shape `(frames,)`, *optional*):
                Which frames are images, whose context is f itself. `None` if there are none.
        """
        if not summaries:
            return frames
        clips = torch.cat(summaries)[clip_of_frame]
        alpha = torch.sigmoid(self.balance)
        fused = self.output(self.dropout(self.norm((1 - alpha) * clips + alpha * frames)))
        return fused if is_image is None else torch.where(is_image[:, None], frames, fused)


def pad_weights(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Attention weights (clips, heads, cells) of groups with different numbers of cells, as one tensor in a list."""
    longest = max((w.shape[-1] for w in weights), default=0)
    return [torch.cat([F.pad(w, (0, longest - w.shape[-1])) for w in weights])] if weights else []
