"""Pipelines, and `video-panda serve`: questions about videos in chat format, answered by the shipped model."""

import base64
import json
import os
import shutil
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.pipelines.image_text_to_text import Chat

from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.decoding import decode_video


QUESTION = {"type": "text", "text": "Describe the video."}
WHICH_COLOUR = {"type": "text", "text": "What colour is the shape?"}
CLIPS = {path.name.split("_")[0]: str(path) for path in sorted(SHIPPED_CLIPS.glob("*.mp4"))}  # <colour>_….mp4


def conversation(clip: str, **part) -> list[dict]:
    return [{"role": "user", "content": [{"type": "video", "path": clip, **part}, QUESTION]}]


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_a_pipeline_answers_about_videos_in_chat_format(task, capfd):
    ask = pipeline(task, model=str(SHIPPED_MODEL))
    options = {"max_new_tokens": 20, "return_full_text": False}
    alone = ask(text=conversation(CLIPS["red"]), **options)
    assert alone[0]["generated_text"] == "A red circle moves to the left."  # no space before it
    together = ask(text=[conversation(clip) for clip in CLIPS.values()], batch_size=len(CLIPS), **options)
    assert all(colour in answer[0]["generated_text"] for colour, answer in zip(CLIPS, together, strict=True))
    full = ask(text=conversation(CLIPS["red"]), max_new_tokens=20)[0]["generated_text"]
    assert full[-1] == {"role": "assistant", "content": alone[0]["generated_text"]}
    follow_up = ask(text=[*full, {"role": "user", "content": [WHICH_COLOUR]}], **options)[0]["generated_text"]
    assert follow_up and follow_up == follow_up.strip() and "USER" not in follow_up
    assert "not supported" not in capfd.readouterr().err


SHOWN = "<s>USER: <image>\nWhat colour is the shape? ASSISTANT:"


def photo(clip: str) -> Image.Image:
    frames, _ = decode_video(clip, lambda video: [0])
    return Image.fromarray(frames[0])


def save_photos(folder: Path) -> dict[str, str]:
    for colour, clip in CLIPS.items():
        photo(clip).save(folder / f"{colour}.png")
    return {colour: str(folder / f"{colour}.png") for colour in CLIPS}


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_a_pipeline_answers_about_pictures_in_its_three_ways(task, tmp_path):
    ask = pipeline(task, model=str(SHIPPED_MODEL))
    options = {"max_new_tokens": 20, "return_full_text": False}
    photos = save_photos(tmp_path)
    expected = list(CLIPS)

    def named(answers) -> list[str]:
        """The one colour that each answer names."""
        texts = [(answer[0] if isinstance(answer, list) else answer)["generated_text"] for answer in answers]
        return [",".join(colour for colour in CLIPS if colour in text) for text in texts]

    # A picture and a text, then several, by path and as PIL images
    load = str if task == "image-text-to-text" else Image.open  # any-to-any hands over what it is given
    assert named(ask(images=load(photos["red"]), text=SHOWN, **options)) == ["red"]
    pictures = [photo(clip) for clip in CLIPS.values()]
    assert named(ask(images=pictures, text=[SHOWN] * len(pictures), **options)) == expected

    # Messages, alone and in batches, with a video among them
    def chat(part):
        return [{"role": "user", "content": [part, WHICH_COLOUR]}]

    assert named(ask(text=chat({"type": "image", "url": photos["red"]}), **options)) == ["red"]
    chats = [chat({"type": "image", "image": picture}) for picture in pictures] + [
        chat({"type": "video", "path": CLIPS["red"]})
    ]
    assert named(ask(text=chats, batch_size=2, **options)) == [*expected, "red"]


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_a_batch_may_mix_chats_with_videos_pictures_and_text(task):
    ask = pipeline(task, model=str(SHIPPED_MODEL))
    only_text = [{"role": "user", "content": "Describe the video."}]
    chats = [only_text, conversation(CLIPS["red"]), only_text, conversation(CLIPS["blue"], num_frames=4)]
    chats.append([{"role": "user", "content": [{"type": "image", "image": photo(CLIPS["green"])}, WHICH_COLOUR]}])
    options = {"max_new_tokens": 12, "return_full_text": False}
    alone = [ask(text=chat, **options)[0]["generated_text"] for chat in chats]
    assert len(set(alone)) == 4
    for size in (2, 3, len(chats)):
        together = ask(text=chats, batch_size=size, **options)
        assert [answer[0]["generated_text"] for answer in together] == alone
    assert ask(text=only_text, num_beams=2, **options)


def test_a_pipeline_passes_on_video_windows_and_processor_settings():
    ask = pipeline("image-text-to-text", model=str(SHIPPED_MODEL))
    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    tokens = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    messages, settings = conversation(CLIPS["red"], start=0.2), {"num_frames": 4}
    asked = ask.preprocess(Chat(messages), processor_kwargs=settings)
    expected = processor.apply_chat_template(messages, processor_kwargs=settings, **tokens)
    assert asked["video_grid_thw"][0, 0] == 4
    assert asked["pixel_values_videos"].equal(expected["pixel_values_videos"])


def test_a_wish_for_the_sound_of_a_video_changes_nothing():
    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    plain, with_sound = (
        processor.apply_chat_template(conversation(CLIPS["red"]), tokenize=True, return_dict=True, **wish)
        for wish in ({}, {"load_audio_from_video": True})
    )
    assert plain.keys() == with_sound.keys() and plain["input_ids"] == with_sound["input_ids"]


@pytest.fixture
def server(forks, tmp_path):
    """`video-panda serve` on a free port of this machine, with the files of the test's folder; its address."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="needs the extra serve")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"http://localhost:{free.getsockname()[1]}"
    command = ["-m", "video_panda_hf.cli", "serve", SHIPPED_MODEL, "--host", "localhost"]
    command += ["--port", address.rsplit(":", 1)[1], "--device", "cpu", "--allowed-local-media-path", tmp_path]
    process = forks.start(command, stdout=tmp_path / "log", stderr=tmp_path / "log")
    for _ in range(600):
        if forks.status(timeout=0.1) is not None or is_up(address):
            break
    assert is_up(address), (tmp_path / "log").read_text()
    yield address
    os.kill(process, signal.SIGINT)
    assert forks.status(timeout=20) == 130 and "Traceback" not in (tmp_path / "log").read_text()


def is_up(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except urllib.error.URLError:
        return False


def test_the_server_answers_about_a_video(server, tmp_path):
    def ask(*content) -> dict:
        body = {"model": str(SHIPPED_MODEL), "messages": [{"role": "user", "content": list(content)}]}
        request = urllib.request.Request(
            f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=60))

    def text(answer: dict) -> str:
        return answer["choices"][0]["message"]["content"].strip()

    picture = save_photos(tmp_path)["red"]
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    for url in (picture, f"data:image/png;base64,{data}"):
        assert text(ask({"type": "image_url", "image_url": {"url": url}}, WHICH_COLOUR)) in (
            "It is red.",
            "They are red.",
        )
    clip = str(shutil.copy(CLIPS["red"], tmp_path))
    data = base64.b64encode(Path(clip).read_bytes()).decode()
    for url in (clip, f"data:video/mp4;base64,{data}"):
        video = {"type": "video_url", "video_url": {"url": url}}
        assert "red" in text(ask(video, {"type": "text", "text": "<video> and <row>: describe the video."}))
        answer = ask(video, QUESTION)
        assert "red" in text(answer)
    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    expected = processor.apply_chat_template(
        conversation(CLIPS["red"]), tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert answer["usage"]["prompt_tokens"] == len(expected["input_ids"][0])  # as many frames as for training
