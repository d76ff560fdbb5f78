"""transformers' own tests for processors and video processors, applied to ours.

Clips have one frame here, so that the numbers of frames that the tests ask for (2, 3, 7) are valid. Tests that look
for the frames in the first dimensions of `pixel_values_videos` are replaced: ours are the packed patches of all
videos.
"""

import os
import unittest
from unittest.mock import patch

import numpy as np
import pytest

from helpers.tiny_tokenizers import chatml_tokenizer
from transformers_suite import import_suite
from video_panda_hf import VideoPandaProcessor, VideoPandaVideoProcessor


os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may depend on the Hub
processing = import_suite("test_processing_common")
video_processing = import_suite("test_video_processing_common")

CANVAS = 56
COUNTS_PACKED_PATCHES = hasattr(processing.ProcessorTesterMixin, "video_sampling_expectations")
stacked_videos_only = pytest.mark.skipif(
    not COUNTS_PACKED_PATCHES, reason="this version expects one row of pixel_values_videos for each video"
)


class VideoPandaProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VideoPandaProcessor
    images_input_name = videos_input_name = "pixel_values_videos"

    def get_subprocessor_name(self, modality, attributes):  # a picture is a video of one frame
        return super().get_subprocessor_name("videos" if modality == "images" else modality, attributes)

    @classmethod
    def _setup_from_components(cls):
        return VideoPandaProcessor.from_text_pretrained(chatml_tokenizer(), image_size=CANVAS, frames_per_clip=1)

    @property
    def video_sampling_expectations(self):
        """Rows of `pixel_values_videos` for 11 frames of 320×240 at 30 fps: each gives 4×4 patches."""
        frames = [
            ({"num_frames": 3, "fps": None}, 3),
            ({"num_frames": None, "fps": 10}, 3),
            ({"do_sample_frames": False, "fps": 10}, 11),
            ({"do_sample_frames": False}, 11),
            ({}, 8),
        ]
        return [{**kwargs, "expected_dim": 0, "output_length": 16 * count} for kwargs, count in frames]

    @stacked_videos_only
    def test_apply_chat_template_video_frame_sampling(self):
        super().test_apply_chat_template_video_frame_sampling()

    # Pictures. The suite looks for an image processor; ours are prepared by the video processor. What stays skipped is
    # `test_args_overlap_kwargs`, which loads an image processor, and all that is about sound.
    def test_apply_chat_template_image_0(self):
        self.check_pictures_in_messages(1)

    def test_apply_chat_template_image_1(self):
        self.check_pictures_in_messages(2)

    def check_pictures_in_messages(self, batch_size):
        """As the suite's, which expects a row of pixels for each picture; a row of ours is one of 4×4 patches."""
        files = processing.MODALITY_INPUT_DATA["images"][:batch_size]
        messages = [[{"role": "user", "content": [{"type": "image", "url": file}]}] for file in files]
        inputs = self.get_processor().apply_chat_template(messages, tokenize=True, return_dict=True, padding=True)
        self.assertEqual(inputs["video_grid_thw"].tolist(), [[1, 4, 4]] * batch_size)
        self.assertEqual(inputs["pixel_values_videos"].shape, (16 * batch_size, 588))
        self.assertEqual(
            [ids.count(self.get_processor().row_token_id) for ids in inputs["input_ids"]], [2] * batch_size
        )

    def test_processor_text_has_no_visual(self):
        with patch.object(VideoPandaProcessor, "image_processor", None, create=True):
            super().test_processor_text_has_no_visual()

    def test_get_num_multimodal_tokens_matches_processor_call(self):
        of_two = VideoPandaProcessor.create_mm_token_type_ids

        def of_one(self, ids):  # a picture's tokens are `<video>`, of type 2; the suite sums up ones
            return [[kind // 2 for kind in row] for row in of_two(self, ids)]

        with patch.object(VideoPandaProcessor, "create_mm_token_type_ids", of_one):
            super().test_get_num_multimodal_tokens_matches_processor_call()

    # The suite runs these where torchcodec is installed. Our videos are decoded without.
    @stacked_videos_only
    def test_apply_chat_template_video_0(self):
        self.check_chat_template_with(processing.MODALITY_INPUT_DATA["videos"], batch_size=1)

    @stacked_videos_only
    def test_apply_chat_template_video_1(self):
        self.check_chat_template_with(processing.MODALITY_INPUT_DATA["videos"], batch_size=2)

    @stacked_videos_only
    def test_apply_chat_template_decoded_video_0(self):
        self.check_chat_template_with([self.prepare_videos_inputs()], batch_size=1)

    def check_chat_template_with(self, videos, batch_size):
        self._test_apply_chat_template("video", batch_size, "pt", "videos_input_name", "video_processor", videos)


class VideoPandaVideoProcessorTester:
    batch_size = 3
    num_frames = 8
    num_channels = 3

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return video_processing.prepare_video_inputs(
            self.batch_size, self.num_frames, self.num_channels, 20, 80, equal_resolution, return_tensors
        )


class VideoPandaVideoProcessorTest(video_processing.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = VideoPandaVideoProcessor
    test_cast_dtype = True
    video_processor_dict = {"size": {"longest_edge": CANVAS}, "frames_per_clip": 1}

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoPandaVideoProcessorTester()

    def test_video_processor_from_dict_with_kwargs(self):  # the suite's has a shortest edge, we have a canvas
        processor = VideoPandaVideoProcessor.from_dict(self.video_processor_dict, size={"longest_edge": 84})
        self.assertEqual(dict(processor.size), {"longest_edge": 84})
        self.assertEqual(processor.frames_per_clip, 1)

    def test_call_pil(self):
        self.check_call("pil")

    def test_call_numpy(self):
        self.check_call("np")

    def test_call_pytorch(self):
        self.check_call("torch")

    def test_call_numpy_4_channels(self):
        self.video_processor_tester.num_channels = 4
        self.check_call("np", input_data_format="channels_last", image_mean=0.0, image_std=1.0)

    def test_nested_input(self):
        self.check_call("np", convert=list)

    def check_call(self, kind, convert=lambda video: video, **kwargs):
        """One video and a batch of several give one packed row of 588 values for every patch."""
        processor = VideoPandaVideoProcessor(**self.video_processor_dict)
        videos = [convert(video) for video in self.video_processor_tester.prepare_video_inputs(return_tensors=kind)]
        for given, count in [(videos[0], 1), (videos, len(videos))]:
            encoded = processor(given, return_tensors="pt", **kwargs)
            grids = encoded["video_grid_thw"]
            self.assertEqual(grids.shape, (count, 3))
            self.assertEqual(encoded["pixel_values_videos"].shape, (int(grids.prod(-1).sum()), 588))
            self.assertTrue((grids[:, 0] == 8).all() and (grids[:, 1:].amax(-1) == CANVAS // 14).all())

    def test_call_sample_frames(self):
        video = np.zeros((8, 28, 28, 3), np.uint8)
        metadata = {"total_num_frames": 8, "fps": 4, "duration": 2.0}
        processor = VideoPandaVideoProcessor(**self.video_processor_dict)

        def num_frames(**kwargs):
            return processor([video, video], return_tensors="pt", **kwargs)["video_grid_thw"][:, 0].tolist()

        self.assertEqual(num_frames(num_frames=3), [3, 3])
        self.assertEqual(num_frames(fps=3, video_metadata=[[metadata]] * 2), [6, 6])
        self.assertEqual(num_frames(fps=3, video_metadata=[video_processing.VideoMetadata(**metadata)] * 2), [6, 6])
        self.assertEqual(
            num_frames(num_frames=10), [10, 10]
        )  # not an error as in the suite: the last frame is repeated
        with self.assertRaisesRegex(ValueError, "needs the video.s own rate"):
            processor.sample_frames(metadata=video_processing.VideoMetadata(total_num_frames=8), fps=3)
        processor.do_sample_frames = False
        self.assertEqual(num_frames(num_frames=3), [8, 8])
