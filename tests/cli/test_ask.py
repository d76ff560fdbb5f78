"""`video-panda ask`: several clips and pictures, a system message, standard input, JSON."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL, VideoPandaForConditionalGeneration, VideoPandaProcessor
from video_panda_hf.cli import main
from video_panda_hf.decoding import decode_video


RED, BLUE = (str(SHIPPED_CLIPS / name) for name in ("red_circle_left.mp4", "blue_cross_upwards.mp4"))
COLOUR = "What colour is the shape?"


@pytest.fixture
def asked(monkeypatch):
    """What `generate` is given."""
    calls, generate = [], VideoPandaForConditionalGeneration.generate

    def recorded(self, **kwargs):
        calls.append(kwargs)
        return generate(self, **kwargs)

    monkeypatch.setattr(VideoPandaForConditionalGeneration, "generate", recorded)
    return calls


def test_several_clips_and_pictures_are_in_their_order(asked, tmp_path, capsys):
    photo = str(tmp_path / "photo.jpg")
    Image.fromarray(decode_video(BLUE, indices=[0])[0][0]).save(photo, quality=95)
    assert main(["ask", BLUE, photo, RED, COLOUR, "--num-frames", "4"]) == 0
    assert capsys.readouterr().out.startswith("It is ")
    assert asked[0]["video_grid_thw"][:, 0].tolist() == [4, 1, 4]
    patches = asked[0]["pixel_values_videos"]
    alone = VideoPandaProcessor.from_pretrained(SHIPPED_MODEL).video_processor(RED, num_frames=4, return_tensors="pt")
    assert patches[-len(alone["pixel_values_videos"]) :].equal(alone["pixel_values_videos"])
    assert main(["ask", photo, COLOUR]) == 0
    assert capsys.readouterr().out == "It is blue.\n"


def test_a_system_message_is_before_the_question(asked, capsys):
    assert main(["ask", RED, COLOUR, "--system", "Answer in one word."]) == 0
    tokenizer = VideoPandaProcessor.from_pretrained(SHIPPED_MODEL).tokenizer
    prompt = tokenizer.decode(asked[0]["input_ids"][0], skip_special_tokens=True)
    assert 0 <= prompt.index("Answer in one word.") < prompt.index(COLOUR)


def test_standard_input_is_a_clip_and_json_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(RED).read_bytes())))
    assert main(["ask", "-", COLOUR, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {**row, "seconds": 0} == {"question": COLOUR, "answer": "It is red.", "seconds": 0} and row["seconds"] > 0


def test_a_reader_that_is_gone_is_no_error_to_speak_of(monkeypatch, capsys):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        assert main(["ask", RED, COLOUR]) == 1
    assert capsys.readouterr().err == ""


def test_a_checkpoint_of_another_model_on_the_hub_is_named(monkeypatch, capsys):
    from transformers import AutoConfig, LlamaConfig

    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name: LlamaConfig())
    assert main(["ask", RED, COLOUR, "--model", "ann/llama"]) == 2
    assert "ann/llama is no Video-Panda checkpoint: its config.json is of the type 'llama'" in capsys.readouterr().err
