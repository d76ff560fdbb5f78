"""Video-Panda, the encoder-free video-language model, for Hugging Face `transformers`.

Importing this package registers its classes with the Auto classes, so that `AutoProcessor.from_pretrained` and
`AutoModelForImageTextToText.from_pretrained` load a Video-Panda checkpoint like any other.
"""

from .quiet import quiet_imports


with quiet_imports():
    from transformers import PreTrainedModel  # noqa: F401

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from .assets import SHIPPED_CLIPS, SHIPPED_MODEL
from .hub import register_code
from .modeling import (
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaModel,
    VideoPandaPreTrainedModel,
    VideoPandaVisionConfig,
    VideoPandaVisionModel,
)
from .processing import VideoPandaProcessor, VideoPandaVideoProcessor
from .session import VideoPandaSession
from .version import __version__


AutoConfig.register("video_panda", VideoPandaConfig, exist_ok=True)
AutoConfig.register("video_panda_vision", VideoPandaVisionConfig, exist_ok=True)
AutoModel.register(VideoPandaConfig, VideoPandaModel, exist_ok=True)
AutoModel.register(VideoPandaVisionConfig, VideoPandaVisionModel, exist_ok=True)
AutoModelForImageTextToText.register(VideoPandaConfig, VideoPandaForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(VideoPandaConfig, VideoPandaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VideoPandaConfig, VideoPandaProcessor, exist_ok=True)
AutoVideoProcessor.register(VideoPandaConfig, VideoPandaVideoProcessor, exist_ok=True)
register_code()
# Where pipelines look for what they support; registering adds nothing here.
for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    names["video_panda"] = VideoPandaForConditionalGeneration.__name__

__all__ = [
    "SHIPPED_CLIPS",
    "SHIPPED_MODEL",
    "VideoPandaConfig",
    "VideoPandaForConditionalGeneration",
    "VideoPandaModel",
    "VideoPandaPreTrainedModel",
    "VideoPandaProcessor",
    "VideoPandaSession",
    "VideoPandaVideoProcessor",
    "VideoPandaVisionConfig",
    "VideoPandaVisionModel",
    "__version__",
]
