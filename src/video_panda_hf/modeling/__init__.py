"""The model: configuration, STAB, language-model wrapper. Knows nothing of files or text."""

from .configuration_video_panda import VideoPandaConfig, VideoPandaVisionConfig
from .modeling_video_panda import VideoPandaForConditionalGeneration, VideoPandaModel
from .modeling_video_panda_vision import VideoPandaPreTrainedModel, VideoPandaVisionModel


__all__ = [
    "VideoPandaConfig",
    "VideoPandaForConditionalGeneration",
    "VideoPandaModel",
    "VideoPandaPreTrainedModel",
    "VideoPandaVisionConfig",
    "VideoPandaVisionModel",
]
