"""The demo's functions, as a program calls them; what a browser shows is in `test_browser.py`."""

import itertools
import signal
import subprocess
import sys

import pytest
from PIL import Image

from helpers.demo import noted_connections, served
from helpers.processes import free_port
from video_panda_hf import SHIPPED_CLIPS
from video_panda_hf.cli import main
from video_panda_hf.decoding import DecodeLimits, decode_video


pytest.importorskip("gradio")

from gradio_client import Client, handle_file


RED, GREEN = (str(SHIPPED_CLIPS / name) for name in ("red_circle_left.mp4", "green_square_right.mp4"))


@pytest.fixture(scope="module")
def address():
    with noted_connections() as hosts, served(max_new_tokens=20) as address:
        yield address
    assert hosts and set(hosts) <= {"127.0.0.1", "::1", "localhost"}  # no request left the machine


@pytest.fixture
def client(address):
    return Client(address, verbose=False)


def ask(client, question, history=(), clip=RED, picture=None, frames=8, start=None, end=None):
    """The conversation after a question, as (role, text)."""
    files = [file and handle_file(str(file)) for file in (clip, picture)]
    chat, left = client.predict(question, list(history), *files, frames, start, end, api_name="/ask")
    assert left == ""  # the box is empty again
    return [(message["role"], message["content"][0]["text"]) for message in chat]


def said(chat) -> list[dict]:
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in chat]


def test_answers_stream_and_a_second_question_goes_on(client):
    job = client.submit("Which way does it move?", [], handle_file(RED), None, 8, None, None, api_name="/ask")
    chat, _ = job.result()
    texts = [output[0][-1]["content"][0]["text"] for output in job.outputs()]
    assert texts[-1] == "It moves to the left." and len(set(texts)) > 2
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts[1:]))
    chat = ask(client, "What colour is it?", chat)
    assert [text for _, text in chat] == ["Which way does it move?", texts[-1], "What colour is it?", "It is red."]


def test_another_clip_begins_another_conversation(client):
    chat = ask(client, "What colour is it?")
    chat = ask(client, "What colour is it?", said(chat), clip=GREEN)
    assert chat == [("user", "What colour is it?"), ("assistant", "It is green.")]


def test_two_visitors_at_once_each_get_their_own_answer(client, address):
    other = Client(address, verbose=False)
    files = {client: RED, other: GREEN}
    given = {one: ("What colour is it?", [], handle_file(file), None, 8, None, None) for one, file in files.items()}
    jobs = [one.submit(*arguments, api_name="/ask") for one, arguments in given.items()]
    answers = [job.result()[0][-1]["content"][0]["text"] for job in jobs]
    assert answers == ["It is red.", "It is green."]


def test_visitors_do_not_share_a_conversation(client, address):
    ask(client, "What colour is it?")
    other = Client(address, verbose=False)
    image, text = other.predict("", None, None, 8, None, None, "gradient", False, api_name="/explain")
    assert image is None and "Upload or record a clip" in text


def test_a_picture_is_asked_about(client, tmp_path):
    Image.fromarray(decode_video(GREEN, lambda video: [0])[0][0]).save(tmp_path / "green.png")
    assert "green" in ask(client, "What colour is it?", clip=None, picture=tmp_path / "green.png")[-1][1]


def test_an_explanation_shows_all_frames_and_the_answers(client):
    ask(client, "What colour is it?", frames=4)
    given = ("", handle_file(RED), None, 4, None, None, "attention", True)
    image, text = client.predict(*given, api_name="/explain")
    assert text == "**What colour is it?** It is red."
    with Image.open(image) as picture:
        assert picture.width > 300 and picture.height > 400  # frames and three maps


@pytest.mark.parametrize(
    ("clip", "options", "message"),
    [
        (None, {}, "Upload or record a clip"),
        ("broken.mp4", {}, "'broken.mp4': not a video in a known format"),
        (RED, {"start": 3, "end": 2}, "the time window ends at 2 s, before it begins"),
        (RED, {"start": 60}, "shows no frame in [60, inf) s"),
        (RED, {"frames": 6}, "`num_frames` = 6"),
    ],
)
def test_what_is_wrong_is_a_message_in_the_conversation(client, tmp_path, clip, options, message):
    if clip == "broken.mp4":
        clip = tmp_path / clip
        clip.write_bytes(b"this is no video" * 99)
    (_, warning) = ask(client, "What?", clip=clip, **options)[-1]
    assert warning.startswith("⚠️ ") and message in warning
    assert str(tmp_path) not in warning and "gradio" not in warning  # no path of the server


def test_a_broken_picture_is_a_message_too(client, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"x" * 99)
    assert "'broken.png': not a video" in ask(client, "What?", clip=None, picture=tmp_path / "broken.png")[-1][1]


def test_limits_of_decoding_are_handed_over():
    with served(limits=DecodeLimits(max_side=64)) as address:
        client = Client(address, verbose=False)
        assert "64" in ask(client, "What?")[-1][1].partition("⚠️")[2]


def test_the_command_needs_gradio_and_a_checkpoint(monkeypatch, capsys):
    assert main(["demo", "no/such/folder"]) == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 2
    errors = capsys.readouterr().err
    assert "no such folder: no/such/folder" in errors and 'pip install "video-panda-hf[demo]"' in errors


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c():
    command = [sys.executable, "-m", "video_panda_cli", "demo", "--port", str(free_port()), "--max-new-tokens", "20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr.readline, "")
            line = next(line for line in lines if line.startswith("Video-Panda at "))
            assert ask(Client(line.split()[2], verbose=False), "What colour is it?")[-1][1] == "It is red."
            process.send_signal(signal.SIGINT)
            printed, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and printed == "" and "Traceback" not in errors
