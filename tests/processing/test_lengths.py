"""Long videos in prompts: the warning, the budget of tokens, and the time before each clip."""

import warnings

import av
import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from helpers.tiny_tokenizers import chatml_tokenizer
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL, VideoPandaProcessor
from video_panda_hf.training import VideoPandaDataCollator


CLIP = str(SHIPPED_CLIPS / "red_circle_left.mp4")  # 12 frames of 56 × 56 at 8 fps
QUESTION = {"type": "text", "text": "Describe the video."}


@pytest.fixture(scope="module")
def shipped():
    return AutoProcessor.from_pretrained(SHIPPED_MODEL)


def ask(processor, video, **settings):
    message = {"role": "user", "content": [{"type": "video", "video": video}, QUESTION]}
    return processor.apply_chat_template(
        [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **settings
    )


def tokens_of_frame(processor, inputs, video=0):
    _, h, w = (inputs["video_grid_thw"][video] // processor.video_processor.merge_size).tolist()
    return 1 + h * (w + 1)


def prompt_of(processor, inputs, row=0):
    """The prompt with `F` for a frame's tokens."""
    frame = processor.replace_video_token({"video_grid_thw": [[1, *inputs["video_grid_thw"][0][1:]]]}, 0)
    return processor.decode(inputs["input_ids"][row]).replace(frame.removesuffix(processor.after_video), "F")


# The warning


def test_a_prompt_above_the_tokenizers_length_names_the_frames_that_fit(shipped):
    longest = shipped.tokenizer.model_max_length
    with pytest.warns(
        UserWarning, match=rf"`model_max_length` is {longest}.*It has 96 frames of video; about (\d+)"
    ) as told:
        inputs = ask(shipped, CLIP, num_frames=96)
    assert f"prompt 0 has {inputs['input_ids'].shape[1]} tokens" in str(told[0].message)
    fitting = int(str(told[0].message).split("about ")[1].split()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(shipped, CLIP, num_frames=fitting)["input_ids"].shape[1] <= longest
    with pytest.warns(UserWarning, match="model_max_length"):
        ask(shipped, CLIP, num_frames=fitting + 4)


def test_the_long_prompt_of_a_batch_is_named_and_padding_does_not_count(shipped):
    clip = np.zeros((4, 28, 28, 3), np.uint8)
    texts = ["<video>" + "word " * 20, "word " * 1100, "word"]
    with pytest.warns(UserWarning) as told:
        shipped(text=texts, videos=[clip], padding=True)
    about_length = [str(warning.message) for warning in told if "model_max_length" in str(warning.message)]
    assert len(about_length) == 1
    assert about_length[0].startswith("prompt 1 has 4400 tokens") and about_length[0].endswith("Shorten it.")


# The budget


@pytest.mark.parametrize("settings", [{"num_frames": 40}, {"fps": 50.0}, {"fps": 50.0, "max_frames": 60}], ids=str)
def test_a_budget_takes_as_many_whole_clips_as_fit(shipped, settings):
    frame = tokens_of_frame(shipped, ask(shipped, CLIP))
    for budget, expected in [(20 * frame + frame - 1, 20), (20 * frame - 1, 16), (4 * frame, 4)]:
        inputs = ask(shipped, CLIP, max_video_tokens=budget, **settings)
        assert inputs["video_grid_thw"][0, 0] == expected
        ids = inputs["input_ids"][0]
        assert sum((ids == token).sum() for token in shipped.video_token_ids) == expected * frame <= budget


def test_a_budget_that_is_enough_changes_nothing(shipped):
    for settings in ({}, {"fps": 3.0}, {"num_frames": 4}):
        expected, inputs = ask(shipped, CLIP, **settings), ask(shipped, CLIP, max_video_tokens=10_000, **settings)
        assert (inputs["pixel_values_videos"] == expected["pixel_values_videos"]).all()


def test_a_budget_counts_for_frames_in_memory_and_is_saved(shipped, tmp_path):
    processor = VideoPandaProcessor.from_text_pretrained(chatml_tokenizer(), image_size=56, max_video_tokens=40)
    processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    wide = np.zeros((30, 28, 56, 3), np.uint8)  # 4 tokens a frame
    assert ask(processor, wide)["video_grid_thw"].tolist() == [[8, 2, 4]]
    assert ask(processor, wide, max_video_tokens=31)["video_grid_thw"].tolist() == [[4, 2, 4]]
    assert ask(processor, wide, num_frames=20, max_video_tokens=1000)["video_grid_thw"].tolist() == [[20, 2, 4]]
    with pytest.raises(
        ValueError, match="`max_video_tokens` = 15, but one clip of this video of 56×28 pixels takes 16"
    ):
        ask(processor, wide, max_video_tokens=15)


# The time before each clip


def test_each_clip_comes_after_the_time_of_its_first_frame(shipped, tmp_path):
    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 32
        for level in range(200):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8))))
        container.mux(stream.encode())
    plain, timed = ask(shipped, str(path)), ask(shipped, str(path), timestamps=True)
    (metadata,) = ask(shipped, str(path), return_metadata=True)["video_metadata"]
    first, second = metadata.frames_indices[::4]
    assert prompt_of(shipped, plain).count("F" * 8) == 1
    times = [f"{index // 60:02}:{index % 60:02}" for index in (first, second)]
    assert f"{times[0]}FFFF{times[1]}FFFF" in prompt_of(shipped, timed) and times[1] > "01:00"
    assert prompt_of(shipped, timed).replace(times[0] + "F", "F").replace(times[1], "") == prompt_of(shipped, plain)
    assert "video_metadata" not in timed
    assert (timed["pixel_values_videos"] == plain["pixel_values_videos"]).all()


def test_frames_in_memory_need_their_rate_for_a_time(shipped):
    frames = np.zeros((16, 28, 28, 3), np.uint8)
    given = {"do_sample_frames": False, "timestamps": True}
    inputs = ask(shipped, frames, video_metadata=[{"total_num_frames": 16, "fps": 2.0}], **given)
    assert "00:00FFFF00:02FFFF00:04FFFF00:06FFFF" in prompt_of(shipped, inputs)
    with pytest.raises(ValueError, match=r"`timestamps` need the rate of video 0.*`video_metadata`"):
        ask(shipped, frames, **given)


def test_a_picture_has_no_time(shipped):
    message = {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (56, 56))}, QUESTION]}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompts = [shipped.apply_chat_template([message], **options, timestamps=timed) for timed in (False, True)]
    assert prompts[0]["input_ids"].tolist() == prompts[1]["input_ids"].tolist()


def test_times_are_context_in_training(shipped, tmp_path):
    processor = VideoPandaProcessor.from_text_pretrained(chatml_tokenizer(), image_size=56, timestamps=True)
    processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": [{"type": "video", "video": CLIP}, QUESTION]},
        {"role": "assistant", "content": [{"type": "text", "text": "A circle"}]},
    ]
    batch = VideoPandaDataCollator(processor)([{"messages": messages}])
    learned = processor.decode(batch["input_ids"][batch["labels"] != -100])
    assert ":" in prompt_of(processor, batch) and "A" in learned and ":" not in learned and "0" not in learned
