"""`video-panda chat`: a conversation about videos, with its questions on standard input."""

import io
import json
import signal
import sys

import pytest
from PIL import Image

from video_panda_hf import SHIPPED_CLIPS, VideoPandaSession
from video_panda_hf.cli import main
from video_panda_hf.decoding import decode_video


RED, BLUE = (str(SHIPPED_CLIPS / name) for name in ("red_circle_left.mp4", "blue_cross_upwards.mp4"))
DESCRIBE, COLOUR = "Describe the video.", "What colour is the shape?"


@pytest.fixture
def sessions(monkeypatch):
    """The sessions that the command makes."""
    made = []

    class Recorded(VideoPandaSession):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("video_panda_hf.VideoPandaSession", Recorded)
    return made


def chat(monkeypatch, typed: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return main(["chat", *arguments])


def prompt_of(session) -> str:
    (ids,) = session.inputs_for("And then?")["input_ids"]
    tokens = session.processor.tokenizer.decode(
        [token for token in ids if token not in session.processor.video_token_ids]
    )
    return " ".join(tokens.split())


def test_it_answers_as_ask_does_and_remembers(sessions, monkeypatch, capsys):
    assert chat(monkeypatch, f"{DESCRIBE}\n\n{COLOUR}", RED, "--system", "Be brief.") == 0
    printed = capsys.readouterr()
    assert printed.out == "A red circle moves to the left.\nIt is red.\n" and "> " not in printed.err
    (session,) = sessions
    prompt, texts = prompt_of(session), ("Be brief.", DESCRIBE, "to the left.", COLOUR, "It is red.", "And then?")
    assert [prompt.index(text) for text in texts] == sorted(prompt.index(text) for text in texts)
    frames, rate = session.num_clips * 4, session.fps
    assert (frames, rate) == (8, 1.0)  # the model's own number of frames
    main(["ask", RED, DESCRIBE])
    assert capsys.readouterr().out == printed.out.splitlines(keepends=True)[0]


def test_a_second_video_a_picture_and_a_new_start(sessions, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "a photo.png"
    Image.fromarray(decode_video(BLUE, indices=[0])[0][0]).save(picture)
    typed = f"{DESCRIBE}\n/add {BLUE}\n{DESCRIBE}\n/clear\n/add {picture}\n{COLOUR}\n/quit\n{COLOUR}\n"
    assert chat(monkeypatch, typed, RED, "--fps", "4") == 0
    printed = capsys.readouterr()
    first, second, third = printed.out.splitlines()  # the small model has never seen a second video
    assert first == "A red circle moves to the left." and second.startswith("A blue cross ") and third == "It is blue."
    assert f"added {BLUE}\n" in printed.err and "added" not in printed.out
    assert "circle" not in prompt_of(sessions[0]) and sessions[0].num_clips == 0  # all before /clear is forgotten


def test_json_gives_a_line_for_each_answer(monkeypatch, capsys):
    assert chat(monkeypatch, f"{DESCRIBE}\n{COLOUR}\n", RED, "--json", "--num-frames", "4") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == [DESCRIBE, COLOUR] and rows[1]["answer"] == "It is red."
    assert all(set(row) == {"question", "answer", "seconds", "stopped"} for row in rows)
    assert all(row["seconds"] > 0 and row["stopped"] is False for row in rows)


def test_ctrl_c_stops_an_answer_and_not_the_program(sessions, monkeypatch, capsys):
    class Screen(io.StringIO):
        def write(self, text):
            super().write(text)
            if self.getvalue() == text:  # the first piece of the first answer
                signal.raise_signal(signal.SIGINT)

    screen = Screen()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        assert chat(patch, f"{DESCRIBE}\n{COLOUR}\n", RED) == 0
    first, second = screen.getvalue().splitlines()
    assert "A red circle moves to the left.".startswith(first) and len(first) < 20
    assert second == "It is red." and "(stopped)" in capsys.readouterr().err
    assert prompt_of(sessions[0]).count(DESCRIBE) == 1 and COLOUR in prompt_of(sessions[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_the_prompt_ends_it(monkeypatch, capsys):
    class Keyboard(io.StringIO):
        def readline(self):
            signal.raise_signal(signal.SIGINT)

        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Keyboard())
    assert main(["chat", RED]) == 130
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.endswith("> \n") and "Traceback" not in printed.err


def test_what_goes_wrong_is_said_and_the_conversation_goes_on(monkeypatch, capsys):
    typed = f"/add none.mp4\n/add\n/dance\n/add {__file__}\n/help\n{COLOUR}\n"
    assert chat(monkeypatch, typed, RED, "--max-clips", "2", "--max-new-tokens", "3") == 1
    printed = capsys.readouterr()
    messages = ["none.mp4: no such file", "/add FILE: which file?", "/dance is no command", "test_chat.py", "/quit"]
    assert all(message in printed.err for message in messages) and printed.out == "It is red\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.mp4"], "none.mp4: no such file"),
        (["-"], "standard input has the questions"),
        ([RED, "--max-frames", "4"], "--max-frames limits --fps"),
        ([RED, "--num-frames", "3"], "not 3"),
        ([RED, "--model", "./runs/nope"], "no such folder: ./runs/nope"),
    ],
)
def test_bad_input_is_an_error_before_the_first_question(arguments, message, monkeypatch, capsys):
    assert chat(monkeypatch, COLOUR, *arguments) == 2
    assert message in capsys.readouterr().err
