"""What may stand in messages: `<video>` as a user's own text, and settings beside a video."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny_tokenizers import CHATML_TEMPLATE, chatml_tokenizer, llama_tokenizer
from video_panda_hf import SHIPPED_CLIPS, VideoPandaProcessor
from video_panda_hf.processing import literals
from video_panda_hf.training import VideoPandaDataCollator


CLIP = np.zeros((4, 28, 56, 3), np.uint8)
LITERAL = "Is <video> or <row> or <image> a tag?"
FILE = str(SHIPPED_CLIPS / "red_circle_left.mp4")  # 22 frames at 8 a second


def processor_of(tokenizer) -> VideoPandaProcessor:
    return VideoPandaProcessor.from_text_pretrained(tokenizer, image_size=56, num_frames=4)


every_tokenizer = pytest.mark.parametrize(
    "processor",
    [
        processor_of(chatml_tokenizer(CHATML_TEMPLATE)),
        processor_of(llama_tokenizer()),
        processor_of(llama_tokenizer(False)),
    ],
    ids=["byte-level", "llama-legacy", "llama"],
)


@pytest.fixture(scope="module")
def chatml() -> VideoPandaProcessor:
    return processor_of(chatml_tokenizer())


def inputs_of(processor, messages, **kwargs):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)


def text_of(processor, ids) -> str:
    special = {*processor.video_token_ids, processor.tokenizer.pad_token_id}
    return processor.tokenizer.decode([i for i in ids if i not in special])


def about(text, *parts) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# `<video>` in a user's text


@every_tokenizer
def test_special_tokens_in_a_text_are_text(processor):
    clip = {"type": "video", "video": CLIP}
    for content in ([clip, {"type": "text", "text": LITERAL}], [{"type": "text", "text": LITERAL}], LITERAL):
        ids = inputs_of(processor, [{"role": "user", "content": content}])["input_ids"][0]
        has_clip = content[0] is clip
        assert [ids.count(i) for i in processor.video_token_ids] == ([12, 4] if has_clip else [0, 0])
        assert LITERAL in text_of(processor, ids)


@every_tokenizer
def test_literal_tokens_have_the_ids_of_their_characters(processor):
    template = "{{ messages[0]['content'] }}"
    ids = inputs_of(processor, [{"role": "user", "content": LITERAL}], chat_template=template)["input_ids"][0]
    assert ids == processor.tokenizer(LITERAL, split_special_tokens=True)["input_ids"]


def test_the_tokens_of_a_prompt_are_copied_once_however_long_it_is(chatml, monkeypatch):
    """With a copy for each token, a request of a server could keep it busy for many minutes."""
    copied, plain = [], literals.plain
    monkeypatch.setattr(literals, "plain", lambda row: copied.append(len(row)) or plain(row))
    ids = inputs_of(chatml, about(LITERAL * 50), return_tensors="pt")["input_ids"]
    assert len(copied) < 10 and sum(copied) < 10 * 4 * ids.numel()


def test_a_rendered_prompt_with_literal_tokens_can_be_tokenized_later(chatml):
    messages = about(LITERAL, {"type": "video", "video": CLIP})
    prompt = chatml.apply_chat_template(messages, add_generation_prompt=True)
    later = chatml(text=prompt, videos=CLIP)
    at_once = inputs_of(chatml, messages, add_generation_prompt=True)
    assert later["input_ids"] == at_once["input_ids"]
    assert set(later) == set(at_once) == {"input_ids", "attention_mask", "pixel_values_videos", "video_grid_thw"}


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_batches_with_literal_tokens_are_padded_as_others(chatml, padding_side, tensors):
    batch = [about(LITERAL), about("Short."), about(f"{LITERAL} And {LITERAL}", {"type": "video", "video": CLIP})]
    alone = [inputs_of(chatml, messages)["input_ids"][0] for messages in batch]
    how = {"padding": True, "padding_side": padding_side, "return_mm_token_type_ids": True}
    inputs = inputs_of(chatml, batch, return_tensors=tensors, processor_kwargs=how)
    for row, expected in zip(range(3), alone, strict=True):
        ids, mask = (list(inputs[key][row]) for key in ("input_ids", "attention_mask"))
        assert len(ids) == len(mask) == len(inputs["mm_token_type_ids"][row]) == max(map(len, alone))
        assert [int(i) for i, m in zip(ids, mask, strict=True) if m] == expected
        padding = len(ids) - len(expected)
        assert [int(m) for m in mask] == (
            [0] * padding + [1] * len(expected) if padding_side == "left" else [1] * len(expected) + [0] * padding
        )
    fixed = inputs_of(
        chatml, batch[:2], return_tensors="pt", processor_kwargs={"padding": "max_length", "max_length": 99}
    )
    assert fixed["input_ids"].shape == fixed["attention_mask"].shape == (2, 99)


def test_literal_tokens_in_answers_are_learnt_as_text(chatml):
    answer = "Write <video> there."
    messages = [*about(LITERAL, {"type": "video", "video": CLIP}), {"role": "assistant", "content": answer}]
    batch = VideoPandaDataCollator(chatml)([{"messages": messages}])
    labels = batch["labels"][0]
    assert chatml.tokenizer.decode(labels[labels != -100]) == f"{answer}<|im_end|>"
    assert not torch.isin(labels, torch.tensor(chatml.video_token_ids)).any()
    assert LITERAL in text_of(chatml, batch["input_ids"][0].tolist())


def test_messages_may_be_objects(chatml):
    @dataclass
    class Part:
        type: str
        text: str | None = None
        image_url: dict | None = None

    @dataclass
    class Message:
        role: str
        content: list

    class Pydantic:
        def model_dump(self):
            return {"role": "assistant", "content": "<row>"}

    picture = np.zeros((28, 56, 3), np.uint8)
    messages = [Message("user", [Part("text", LITERAL), {"type": "image", "image": picture}]), Pydantic()]
    plain = [{"role": "user", "content": [{"type": "text", "text": LITERAL}, {"type": "image", "image": picture}]}]
    plain.append({"role": "assistant", "content": "<row>"})
    assert inputs_of(chatml, messages)["input_ids"] == inputs_of(chatml, plain)["input_ids"]


def test_literal_tokens_in_tools_are_text(chatml):
    template = "{{ tools[0]['description'] }}{{ messages[0]['content'] }}"
    ids = inputs_of(
        chatml, [{"role": "user", "content": "Hi"}], chat_template=template, tools=[{"description": LITERAL}]
    )
    assert text_of(chatml, ids["input_ids"][0]) == f"{LITERAL}Hi"


# Settings beside a video


@pytest.mark.parametrize(
    ("settings", "frames"),
    [
        ({}, 4),
        ({"num_frames": 16}, 16),
        ({"nframes": 8}, 8),
        ({"fps": 4}, 12),
        ({"fps": 8.0, "max_frames": 8}, 8),
        ({"num_frames": 1, "fps": None}, 1),
    ],
)
def test_settings_beside_a_video_are_its_own(chatml, settings, frames):
    other = {"type": "video", "path": FILE}
    messages = about("What?", other, {**other, **settings}, other)
    assert inputs_of(chatml, messages)["video_grid_thw"][:, 0].tolist() == [4, frames, 4]
    of_call = inputs_of(chatml, messages, fps=8)["video_grid_thw"][:, 0].tolist()
    assert of_call == [24, frames if settings else 24, 24]


def test_frames_in_memory_take_settings_too(chatml):
    clip = np.arange(20, dtype=np.uint8)[:, None, None, None] + np.zeros((28, 28, 3), np.uint8)
    expected = chatml(text="<video>", videos=clip, num_frames=8)["pixel_values_videos"]
    for video in (clip, torch.from_numpy(clip), [Image.fromarray(frame) for frame in clip]):
        inputs = inputs_of(chatml, about("What?", {"type": "video", "video": video, "num_frames": 8}))
        assert inputs["pixel_values_videos"].equal(expected)
    inputs = inputs_of(
        chatml,
        about("What?", {"type": "video", "video": clip, "fps": 2}),
        video_metadata=[{"fps": 4, "total_num_frames": 20}],
    )
    assert inputs["video_grid_thw"][0, 0] == 12


def test_a_window_has_two_names(chatml):
    ours = inputs_of(chatml, about("What?", {"type": "video", "path": FILE, "start": 0.5, "end": 1.5}))
    theirs = inputs_of(chatml, about("What?", {"type": "video", "url": FILE, "video_start": 0.5, "video_end": 1.5}))
    assert ours["pixel_values_videos"].equal(theirs["pixel_values_videos"])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"video": FILE, "n_frames": 16},
            r"'n_frames' is no key of video: there are \['video', 'path', 'url', 'start'",
        ),
        ({"video": CLIP, "max_pixels": 9}, "'max_pixels' is no key of video"),
        ({"file": FILE}, r"'file' is no key of video: there are \['video', 'path', 'url', "),
        ({"video": FILE, "path": FILE}, "video has one of the keys"),
        ({"video": FILE, "num_frames": 4, "nframes": 8}, "no setting twice"),
        ({"video": FILE, "num_frames": "16"}, "'num_frames' of video is a number, not '16'"),
        ({"video": FILE, "num_frames": 3}, "multiple of 4"),
        ({"video": FILE, "num_frames": 4, "fps": 2}, "mutually exclusive"),
        ({"video": FILE, "max_frames": 4}, "`max_frames` = 4 limits `fps`"),
        ({"video": FILE, "indices": [0], "num_frames": 4}, "indices"),
        ({"video": CLIP, "start": 1}, "cut by slicing"),
    ],
)
def test_a_key_or_value_that_cannot_be_is_named(chatml, part, message):
    with pytest.raises(ValueError, match=message):
        inputs_of(chatml, about("What?", {"type": "video", **part}))


def test_a_picture_takes_no_settings_of_videos(chatml):
    with pytest.raises(ValueError, match="'num_frames' is no key of image"):
        inputs_of(chatml, about("What?", {"type": "image", "image": Image.new("RGB", (28, 28)), "num_frames": 4}))
