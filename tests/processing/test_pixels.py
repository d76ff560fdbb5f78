"""Files become the pixels, grids and tokens that the released weights saw: stored pixels, BT.601 if none is named."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoVideoProcessor

from helpers.tiny_tokenizers import llama_tokenizer
from helpers.video_files import VideoSpec, paint
from video_panda_hf import SHIPPED_CLIPS, VideoPandaProcessor, VideoPandaVideoProcessor
from video_panda_hf.processing import decode_video


MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
FAST = {"preset": "ultrafast", "qp": "12"}
STRETCHED = VideoSpec(
    "stretched.mp4", "libx264", options=FAST, width=176, height=144, frames=8, aspect=Fraction(11, 10), draw=paint
)
UNTAGGED = VideoSpec("untagged.mp4", "libx264", options=FAST, width=1280, height=720, frames=8, draw=paint)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {spec.name: spec.write(folder) for spec in (STRETCHED, UNTAGGED)}


@pytest.fixture
def stretched(clips):
    return clips["stretched.mp4"]


def frames_by(path, matrix: str) -> np.ndarray:
    """All frames by a colour matrix in limited range, whatever the file says; pixels as they are stored."""
    with av.open(str(path)) as container:
        return np.stack(
            [
                frame.reformat(
                    format="rgb24", src_colorspace=matrix, src_color_range="MPEG", dst_color_range="JPEG"
                ).to_ndarray()
                for frame in container.decode(video=0)
            ]
        )


def patches_of(frames: np.ndarray, rows: int, columns: int, patch_size: int = 14) -> np.ndarray:
    """What the model gets of these frames, by Pillow and numpy."""
    size = columns * patch_size, rows * patch_size
    resized = np.stack([Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames])
    cut = ((resized / 255 - MEAN) / STD).reshape(len(frames), rows, patch_size, columns, patch_size, 3)
    return cut.transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3 * patch_size**2)


@pytest.mark.parametrize(("name", "rows", "columns"), [("stretched.mp4", 28, 32), ("untagged.mp4", 18, 32)])
def test_grid_and_pixels_are_those_of_the_stored_frames(name, rows, columns, clips):
    inputs = VideoPandaVideoProcessor()(clips[name], return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[8, rows, columns]]
    found = inputs["pixel_values_videos"].numpy()
    step = 1.01 / 255 / STD.min()  # one level
    assert (np.abs(found - patches_of(frames_by(clips[name], "ITU601"), rows, columns)) < step).mean() > 0.99
    assert (np.abs(found - patches_of(frames_by(clips[name], "ITU709"), rows, columns)) < step).mean() < 0.6


def test_without_resizing_pixels_are_the_stored_ones_exactly(stretched):
    inputs = VideoPandaVideoProcessor(do_resize=False, patch_size=4)(stretched, return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[8, 36, 44]]
    expected = patches_of(frames_by(stretched, "ITU601"), 36, 44, patch_size=4)
    np.testing.assert_allclose(inputs["pixel_values_videos"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("pixels", "rows"), [("stored", 14), ("displayed", 12)])
def test_the_prompt_has_the_tokens_of_the_stored_size(pixels, rows, stretched):
    """176 × 144 pixels are 14 rows of 16 tokens. Stretched to 194 × 144 they are 12."""
    processor = VideoPandaProcessor.from_text_pretrained(llama_tokenizer())
    settings = {} if pixels == "stored" else {"pixels": pixels}
    ids = processor(text="<video>", videos=stretched, return_tensors="pt", **settings)["input_ids"][0].tolist()
    video, row = processor.video_token_ids
    expected = ([video] + ([video] * 16 + [row]) * rows) * 8
    assert [token for token in ids if token in (video, row)] == expected


def test_the_setting_is_saved_and_can_be_given_with_a_call(stretched, tmp_path):
    assert VideoPandaVideoProcessor().pixels == "stored"
    VideoPandaVideoProcessor(pixels="displayed").save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.json")
    saved = json.loads(file.read_text())
    assert saved["pixels"] == "displayed"
    loaded = AutoVideoProcessor.from_pretrained(tmp_path)
    displayed = [[8, 24, 32]]
    assert loaded(stretched, return_tensors="pt")["video_grid_thw"].tolist() == displayed
    assert loaded(stretched, pixels="stored", return_tensors="pt")["video_grid_thw"].tolist() == [[8, 28, 32]]
    assert VideoPandaVideoProcessor()(stretched, pixels="displayed")["video_grid_thw"].tolist() == displayed

    del saved["pixels"]  # a checkpoint of before
    file.write_text(json.dumps(saved))
    assert AutoVideoProcessor.from_pretrained(tmp_path).pixels == "stored"


def test_frames_are_fetched_with_the_processors_settings(clips, stretched):
    displayed = VideoPandaVideoProcessor(pixels="displayed")
    assert displayed.fetch_videos(stretched)[0].shape == (8, 144, 194, 3)
    frames, _ = VideoPandaVideoProcessor().fetch_videos([stretched, clips["untagged.mp4"]])
    np.testing.assert_array_equal(frames[0], frames_by(stretched, "ITU601"))
    np.testing.assert_array_equal(frames[1], frames_by(clips["untagged.mp4"], "ITU601"))
    with pytest.raises(ValueError, match="above the limit of 100"):
        VideoPandaVideoProcessor(decode_limits={"max_side": 100}).fetch_videos(stretched)


@pytest.mark.parametrize("wrong", ["square", "", 1])
def test_another_value_is_an_error_at_once(wrong):
    with pytest.raises(ValueError, match='`pixels` is "stored" or "displayed", not'):
        VideoPandaVideoProcessor(pixels=wrong)
    with pytest.raises(ValueError, match='`pixels` is "stored" or "displayed", not'):
        VideoPandaVideoProcessor()(torch.zeros(8, 3, 28, 28, dtype=torch.uint8), pixels=wrong)


def test_the_shipped_clips_look_the_same_either_way():
    for clip in SHIPPED_CLIPS.glob("*.mp4"):
        stored, displayed = (decode_video(clip, pixels=pixels)[0] for pixels in ("stored", "displayed"))
        np.testing.assert_array_equal(stored, displayed)
