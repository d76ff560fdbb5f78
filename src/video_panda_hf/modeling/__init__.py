"""The model: configuration, STAB and what surrounds it. Knows nothing of files, text or the Hub."""

from .configuration_video_panda import VideoPandaConfig, VideoPandaVisionConfig
from .layout_video_panda import enumerate_parts, lay_out
from .modeling_video_panda import (
    VideoPandaCausalLMOutputWithPast,
    VideoPandaForConditionalGeneration,
    VideoPandaModel,
    VideoPandaProjector,
    context_length,
    labels_after,
)
from .modeling_video_panda_vision import VideoPandaPreTrainedModel, VideoPandaVisionModel


__all__ = [
    "VideoPandaCausalLMOutputWithPast",
    "VideoPandaConfig",
    "VideoPandaForConditionalGeneration",
    "VideoPandaModel",
    "VideoPandaPreTrainedModel",
    "VideoPandaProjector",
    "VideoPandaVisionConfig",
    "VideoPandaVisionModel",
    "context_length",
    "enumerate_parts",
    "labels_after",
    "lay_out",
]
