"""transformers' own model tests, on our classes."""

import math
import unittest

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from transformers_suite import import_suite
from video_panda_hf import (
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaModel,
    VideoPandaVisionConfig,
)


modeling_common = import_suite("test_modeling_common")
ModelTesterMixin, GenerationTesterMixin = modeling_common.ModelTesterMixin, modeling_common.GenerationTesterMixin
ConfigTester = import_suite("test_configuration_common").ConfigTester


# The mixins tell base models and their tasks by these lists of names, where the library's own models stand.
MODEL_MAPPING_NAMES["video_panda"] = "VideoPandaModel"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["video_panda"] = "VideoPandaForConditionalGeneration"


# The suite's tests that do not run here, by the beginning of their names. The generation tests skip some themselves:
# those of flash attention, quanto and several accelerators where these are missing, slow ones (RUN_SLOW=1 runs them),
# and those of layers that the tester's language model, a Llama, does not have (recurrent, MTP).
NO_EXPORT = "The grids of videos are checked and laid out in Python, which an export cannot trace."
SKIPPED = {
    "test_torch_export": NO_EXPORT,
    "test_onnx_export": NO_EXPORT,
    "test_executorch_export": NO_EXPORT,
}


class PatchesOfVideos(torch.Tensor):
    """
    Packed patches that a slice cuts by video: `patches[:2, ...]` are those of two videos.

    The suite cuts a batch by taking so many rows of every input. A prompt of the tester has one video.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # whatever else is computed with it is a plain tensor
    patches_per_video = 1

    @classmethod
    def of(cls, patches: torch.Tensor, patches_per_video: int) -> "PatchesOfVideos":
        patches = patches.as_subclass(cls)
        patches.patches_per_video = patches_per_video
        return patches

    def __getitem__(self, index):
        rows = index[0] if isinstance(index, tuple) else index
        start, stop, _ = rows.indices(len(self) // self.patches_per_video)
        videos = slice(start * self.patches_per_video, stop * self.patches_per_video)
        return self.of(super().__getitem__(videos), self.patches_per_video)

    def __deepcopy__(self, memo):
        return self.of(self.clone(), self.patches_per_video)


class VideoPandaModelTester:
    """A tiny model, and a batch of two prompts with a video each (8 frames of 4 × 6 patches on a canvas of 8 × 8)."""

    is_training = True
    batch_size = 2
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = 99
    video_token_id = 3
    row_token_id = 4
    grid = (8, 4, 6)

    def __init__(self, parent):
        self.parent = parent
        frames, rows, columns = self.grid
        self.placeholders = ([self.video_token_id] * (columns // 2) + [self.row_token_id]) * (rows // 2)
        self.placeholders = ([self.video_token_id, *self.placeholders]) * frames
        self.seq_length = len(self.placeholders) + 7

    def get_config(self):
        return VideoPandaConfig(
            vision_config={"hidden_size": 24, "num_attention_heads": 4, "patch_size": 2, "image_size": 16},
            text_config={
                "model_type": "llama",
                "hidden_size": self.hidden_size,
                "intermediate_size": 64,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": 2,
                "vocab_size": self.vocab_size,
                "max_position_embeddings": 1024,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 2,
            },
            video_token_id=self.video_token_id,
            row_token_id=self.row_token_id,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(5, self.vocab_size, (self.batch_size, self.seq_length), generator=generator)
        words[:, 3 : 3 + len(self.placeholders)] = torch.tensor(self.placeholders)
        mask = torch.ones_like(words)
        words[0, 0], mask[0, 0] = config.text_config.pad_token_id, 0  # the first prompt is the shorter one
        frames, rows, columns = self.grid
        pixels = torch.randn(self.batch_size * frames * rows * columns, 12, generator=generator)
        return config, {
            "input_ids": words.to(torch_device),
            "attention_mask": mask.to(torch_device),
            "pixel_values_videos": pixels.to(torch_device),
            "video_grid_thw": torch.tensor([self.grid] * self.batch_size, device=torch_device),
        }

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class VideoPandaModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (VideoPandaModel, VideoPandaForConditionalGeneration)
    all_generative_model_classes = (VideoPandaForConditionalGeneration,)
    _is_composite = True

    def setUp(self):
        for beginning, reason in SKIPPED.items():
            if self._testMethodName.startswith(beginning):
                self.skipTest(reason)
        self.model_tester = VideoPandaModelTester(self)
        self.config_tester = ConfigTester(
            self,
            config_class=VideoPandaConfig,
            has_text_modality=False,
            common_properties=["video_token_id", "row_token_id"],
        )

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        config, inputs = super().prepare_config_and_inputs_for_generate(batch_size)
        _, whole_batch = self.model_tester.prepare_config_and_inputs_for_common()
        patches = PatchesOfVideos.of(whole_batch["pixel_values_videos"], math.prod(self.model_tester.grid))
        inputs["pixel_values_videos"] = patches[:batch_size]
        config.use_cache = config.text_config.use_cache  # where one of the tests looks for it
        return config, inputs

    def _video_features_get_expected_num_hidden_states(self, model_tester=None):
        return 2  # the patch embeddings and Z: STAB is one block, not a stack of layers

    def _video_features_get_expected_num_attentions(self, model_tester=None):
        return 3  # GSTRA, LSD, FSRA

    def test_config(self):
        self.config_tester.run_common_tests()


class VideoPandaVisionConfigTest(unittest.TestCase):
    def test_config(self):
        ConfigTester(
            self,
            config_class=VideoPandaVisionConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_attention_heads", "patch_size", "image_size"],
            hidden_size=24,
            num_attention_heads=4,
        ).run_common_tests()
