"""Configuration of Video-Panda: STAB's sizes (`VideoPandaVisionConfig`) and the whole model (`VideoPandaConfig`)."""

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


@strict
class VideoPandaVisionConfig(PreTrainedConfig):
    r"""
    Configuration of STAB, the Spatio-Temporal Alignment Block. The defaults are the released model's.

    Args:
        hidden_size (`int`, *optional*, defaults to 1024):
            Width D of every token inside STAB.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of LSD, FSRA and GSTRA.
        patch_size (`int`, *optional*, defaults to 14):
            Side of a patch, in pixels.
        num_channels (`int`, *optional*, defaults to 3):
            Colour channels of a pixel.
        image_size (`int`, *optional*, defaults to 448):
            Side of the square canvas, in pixels: the longest side of a frame.
        frames_per_clip (`int`, *optional*, defaults to 4):
            Frames that LSTE and GSTRA see together. A video has 1 frame or a multiple of this many.
        spatial_merge_size (`int`, *optional*, defaults to 2):
            Side of LSD's windows, in patches: each window becomes one token.
        pad_to_square (`bool`, *optional*, defaults to `True`):
            Whether LSTE and GSTRA see the picture on the square canvas of background patches, as the released weights
            do. `False` computes on the picture's own grid.
        dropout (`float`, *optional*, defaults to 0.5):
            Dropout in GSTRA's MLP and in the fusion, in training only.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norms and of LSTE's batch norm.
        background (`list[float]`, *optional*):
            A pixel of the canvas' background, normalised: one value per channel. Defaults to the mean colour of CLIP's
            normalisation, rounded down to 8 bits.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised weights.
    """

    model_type = "video_panda_vision"
    base_config_key = "vision_config"
    # For the `auto_map` of a checkpoint that is saved with its code.
    classes_by_auto_class = {
        "AutoConfig": "configuration_video_panda.VideoPandaVisionConfig",
        "AutoModel": "modeling_video_panda_vision.VideoPandaVisionModel",
    }

    hidden_size: int = 1024
    num_attention_heads: int = 8
    patch_size: int = 14
    num_channels: int = 3
    image_size: int = 448
    frames_per_clip: int = 4
    spatial_merge_size: int = 2
    pad_to_square: bool = True
    dropout: float | int = 0.5
    layer_norm_eps: float = 1e-5
    background: list[float] | tuple[float, ...] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        # Switches of earlier checkpoints, whose models without a part are variants now.
        for switch in ("use_lste", "use_gstra", "use_fsra", "use_lsd", "use_row_tokens"):
            if not kwargs.pop(switch, True):
                raise ValueError(f"`{switch}=False`: this model has all parts. One without is in examples/ablations.")
        if self.background is None:
            normalisation = zip(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, strict=True)
            self.background = [(int(255 * mean) / 255 - mean) / std for mean, std in normalisation]
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(f"`hidden_size` {self.hidden_size} must be a multiple of `num_attention_heads` {heads}.")
        if self.image_size % (self.patch_size * self.spatial_merge_size):
            raise ValueError(
                f"`image_size` ({self.image_size}) must be a multiple of `patch_size` x `spatial_merge_size` "
                f"({self.patch_size} x {self.spatial_merge_size}), so that the canvas is made of whole windows."
            )
        if len(self.background) != self.num_channels:
            raise ValueError(f"`background` needs {self.num_channels} values, one a channel, got {self.background}.")


@strict
class VideoPandaConfig(PreTrainedConfig):
    r"""
    Configuration of Video-Panda: STAB, the projector and any causal language model.

    Args:
        vision_config (`dict` or `VideoPandaVisionConfig`, *optional*):
            Configuration of STAB. Defaults to the released model's.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the language model: any causal LM's. Defaults to the released model's, a Llama-7B with two
            more tokens.
        video_token_id (`int`, *optional*, defaults to 32000):
            Id of `<video>`, the placeholder of a context or window token.
        row_token_id (`int`, *optional*, defaults to 32001):
            Id of `<row>`, the placeholder of the token that ends a row.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the projector's two linear maps.
        tie_word_embeddings (`bool`, *optional*):
            Whether the LM head shares the input embeddings. Defaults to what `text_config` says.
    """

    model_type = "video_panda"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "video_hidden_states", "video_outputs"]
    sub_configs = {"text_config": AutoConfig, "vision_config": VideoPandaVisionConfig}
    classes_by_auto_class = {
        "AutoConfig": "configuration_video_panda.VideoPandaConfig",
        "AutoModel": "modeling_video_panda.VideoPandaModel",
        "AutoModelForImageTextToText": "modeling_video_panda.VideoPandaForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_video_panda.VideoPandaForConditionalGeneration",
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    video_token_id: int = 32000
    row_token_id: int = 32001
    projector_hidden_act: str = "gelu"
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = self.sub_configs["vision_config"](**(self.vision_config or {}))
        if self.text_config is None:
            self.text_config = CONFIG_MAPPING["llama"](vocab_size=32002)
        elif isinstance(self.text_config, dict):
            model_type = self.text_config.get("model_type", "llama")
            self.text_config = CONFIG_MAPPING[model_type](**self.text_config)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        super().__post_init__(**kwargs)
        if self.video_token_id == self.row_token_id:
            raise ValueError(f"`video_token_id` and `row_token_id` must be two tokens, both are {self.row_token_id}.")
