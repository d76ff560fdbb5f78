"""`encode_videos`: what the processor and `get_video_features` give for whole videos, a few clips at a time."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny_models import model_with_processor
from helpers.tiny_tokenizers import chatml_tokenizer
from helpers.video_files import VideoSpec
from video_panda_hf.decoding import OpenedVideo, VideoLimitError
from video_panda_hf.session import encode_videos, encoding


ASK = {"type": "text", "text": "What is shown?"}
AT_ONCE = 8  # frames


@pytest.fixture(scope="module")
def pair():
    return model_with_processor(chatml_tokenizer(), "qwen3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    VideoSpec("clip.mp4", "libx264", frames=60, ticks=25).write(folder)
    VideoSpec("wide.mkv", "libx264", frames=30, ticks=10, width=112, height=56).write(folder)
    (folder / "pictures").mkdir()
    for number in range(12):
        Image.new("RGB", (56, 84), (20 * number, 0, 0)).save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """Few frames at once. How many were read by each call, and encoded."""
    read, seen = OpenedVideo.read, []
    monkeypatch.setattr(encoding, "FRAMES_AT_ONCE", AT_ONCE)
    monkeypatch.setattr(OpenedVideo, "read", lambda self, numbers: seen.append(len(numbers)) or read(self, numbers))
    return seen


def user(*content):
    return {"role": "user", "content": [*content, ASK]}


def video(source, **settings):
    return {"type": "video", "video": source, **settings}


def expected_of(model, processor, conversation, **settings):
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **settings
    )
    with torch.no_grad():
        features = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
    return inputs, features.pooler_output


def assert_same(pair, conversation, **settings):
    model, processor = pair
    inputs, features = expected_of(model, processor, conversation, **settings)
    encoded = encode_videos(model, processor, conversation, **settings)
    assert set(encoded) == {"input_ids", "attention_mask", "mm_encoder_outputs"}
    assert encoded["input_ids"].tolist() == inputs["input_ids"].tolist()
    assert encoded["attention_mask"].tolist() == inputs["attention_mask"].tolist()
    found = encoded["mm_encoder_outputs"]["video"].pooler_output
    assert len(found) == len(features)
    for one, other in zip(found, features, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert model.generate(**encoded, **options).tolist() == model.generate(**inputs, **options).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"fps": 25.0},
        {"num_frames": 20},
        {"fps": 10.0, "max_frames": 12},
        {"fps": 10.0, "timestamps": True},
        {"fps": 25.0, "max_video_tokens": 2000},
        {"fps": 5.0, "size": {"longest_edge": 12}},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_a_file_is_encoded_as_if_at_once(pair, folder, pieces, settings):
    assert_same(pair, [user(video(folder / "clip.mp4"))], **settings)
    assert max(pieces[1:]) <= AT_ONCE  # the first is that of the processor


def test_an_hour_takes_no_more_frames_at_once_than_a_minute(pair, folder, pieces):
    model, processor = pair
    encode_videos(model, processor, [user(video(folder / "clip.mp4"))], fps=25.0)
    assert pieces == [8] * 7 + [4]


def test_many_videos_and_pictures_and_a_batch(pair, folder):
    frames = np.random.default_rng(0).integers(0, 256, (20, 56, 84, 3), dtype=np.uint8)
    picture = {"type": "image", "image": Image.fromarray(frames[0])}
    file = {"type": "image", "path": str(folder / "pictures" / "3.png")}
    conversations = [
        [user(video(folder / "wide.mkv", start=0.5, end=2.5, fps=10), picture, video(frames))],
        [user()],
        [user(file, video(folder / "clip.mp4", indices=[5, 0, 40, 40, 7, 8, 9, 10, 11, 12, 13, 14]))],
        [user(video(str(folder / "pictures" / "3.png")), video(folder / "pictures"))],
        [user(video([str(folder / "pictures" / f"{number}.png") for number in range(12)]))],
    ]
    assert_same(pair, conversations, padding=True, num_frames=12)


def test_a_prompt_without_video_needs_no_features(pair):
    model, processor = pair
    assert set(encode_videos(model, processor, [user()])) == {"input_ids", "attention_mask"}


def test_what_does_not_fit_is_refused_before_it_is_encoded(pair, folder, pieces):
    model, processor = pair
    context = model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"context {context}\. It has 60 frames of video; about \d+ would fit"):
        encode_videos(model, processor, [user(video(folder / "clip.mp4"))], fps=25.0, size={"longest_edge": 448})
    assert pieces == []


def test_limits_and_files_that_are_none_name_the_file(pair, folder):
    model, processor = pair
    with pytest.raises(VideoLimitError, match=r"clip\.mp4.*max_frames"):
        encode_videos(model, processor, [user(video(folder / "clip.mp4"))], fps=25.0, decode_limits={"max_frames": 8})
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        encode_videos(model, processor, [user(video(folder / "none.mp4"))])


def test_the_processor_is_as_before(pair, folder):
    model, processor = pair
    before, settings = type(processor.video_processor), dict(vars(processor.video_processor))
    encode_videos(model, processor, [user(video(folder / "clip.mp4"))])
    assert type(processor.video_processor) is before
    assert vars(processor.video_processor) == settings
