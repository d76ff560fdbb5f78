"""`video-panda watch`: a question about a video while it comes in."""

import io
import json
import re
import signal
import subprocess
import sys
import threading

import pytest

from helpers.live_streams import stream_of
from video_panda_hf import SHIPPED_CLIPS, VideoPandaSession
from video_panda_hf.cli import main
from video_panda_hf.decoding import errors, read_live


CLIP = SHIPPED_CLIPS / "red_circle_left.mp4"  # 2.75 s, 8 frames a second
QUESTION = "Describe the video."
ANSWER = "A red circle moves to the left."
# Writes the beginning of a file to standard output, and then hangs until it is killed.
WRITER = """
import sys, time
data = open(sys.argv[1], "rb").read()
sys.stdout.buffer.write(data[:len(data) * 6 // 10])
sys.stdout.buffer.flush()
time.sleep(100)
"""


class Screen(io.StringIO):
    """A standard output that calls a function after each line, once it is flushed."""

    def __init__(self, call):
        super().__init__()
        self.call, self.new = call, False

    def write(self, text):
        self.new = self.new or "\n" in text
        return super().write(text)

    def flush(self):
        if self.new:
            self.new = False
            self.call()


@pytest.fixture(autouse=True)
def no_decoder_outlives_the_command():
    """A process that is forked later would wait for its threads forever."""
    yield
    assert errors._silent_ffmpeg.inside == 0
    assert "video-panda watch" not in {thread.name for thread in threading.enumerate()}


def standard_input(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_time_and_answer_are_those_of_the_video_so_far(capsys):
    assert main(["watch", str(CLIP), QUESTION, "--fps", "4", "--every", "1", "--wait", "0"]) == 0
    printed = capsys.readouterr()
    answers = dict(line.split(" ", 1) for line in printed.out.splitlines())
    assert list(answers) == ["0:01", "0:02", "0:02.8"] and answers["0:02.8"] == ANSWER
    assert main(["ask", str(CLIP), QUESTION, "--fps", "4", "--end", "1"]) == 0
    assert capsys.readouterr().out.strip() == answers["0:01"] != ANSWER
    assert "video-panda" not in printed.err


def test_standard_input_gives_lines_of_json(monkeypatch, capsys):
    standard_input(monkeypatch, stream_of(CLIP, "matroska"))
    assert main(["watch", "-", QUESTION, "--fps", "4", "--every", "1.4", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["time"] for row in rows] == [1.5, 2.75]  # 1.4 is over with the frame that ends at 1.5
    assert [row["question"] for row in rows] == [QUESTION] * 2 and rows[-1]["answer"] == ANSWER
    assert all(set(row) == {"time", "question", "answer", "seconds"} and row["seconds"] > 0 for row in rows)


def test_a_writer_killed_in_the_middle_gives_answers_up_to_there(tmp_path, monkeypatch, capsys):
    file = tmp_path / "recording.ts"
    file.write_bytes(stream_of(CLIP, repeat=3))
    command = [sys.executable, "-S", "-c", WRITER, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        screen = Screen(writer.kill)  # at the first answer, which comes while the pipe is open
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(writer.stdout))
        monkeypatch.setattr(sys, "stdout", screen)
        assert main(["watch", "-", QUESTION, "--fps", "4", "--every", "2"]) == 0
        monkeypatch.undo()
    assert writer.returncode == -signal.SIGKILL
    answers = dict(line.split(" ", 1) for line in screen.getvalue().splitlines())
    times = list(answers)
    assert times[:2] == ["0:02", "0:04"] and len(times) == 3 and "0:04" < times[2] < "0:06"
    assert all("red circle" in answer for answer in answers.values())


def test_damage_is_an_error_after_the_answer(tmp_path, capsys):
    data = stream_of(CLIP, "mp4", 3, {"movflags": "frag_keyframe+empty_moov"})
    file = tmp_path / "broken.mp4"
    file.write_bytes(data[: len(data) * 6 // 10])
    assert main(["watch", str(file), QUESTION, "--fps", "4", "--every", "60", "--wait", "0"]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"0:0[3-5](\.\d)? .*red circle.*\n", printed.out)
    assert "broken.mp4': broke off or is damaged" in printed.err and "Traceback" not in printed.err


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


def test_max_clips_bounds_the_cache_of_a_stream(sessions, monkeypatch, capsys):
    standard_input(monkeypatch, stream_of(CLIP, repeat=2))
    arguments = ["--fps", "8", "--every", "100", "--max-clips", "3", "--max-new-tokens", "20"]
    assert main(["watch", "-", QUESTION, *arguments]) == 0
    (session,) = sessions
    whole = VideoPandaSession(session.model, session.processor, fps=8, max_clips=3)
    for _, picture in read_live(io.BytesIO(stream_of(CLIP, repeat=2)), 8.0):
        whole.add(picture, rate=8)
    assert session.num_clips == whole.num_clips == 11 and session.num_tokens == whole.num_tokens
    answer = whole.ask(QUESTION, max_new_tokens=20, do_sample=False)
    assert capsys.readouterr().out == f"0:05.5 {answer}\n"


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_long_stream_stays_in_the_context_of_the_model(sessions, monkeypatch, capsys):
    standard_input(monkeypatch, stream_of(CLIP, repeat=10))
    arguments = ["--fps", "8", "--every", "27.5", "--max-clips", "4", "--max-new-tokens", "20"]
    assert main(["watch", "-", QUESTION, *arguments]) == 0
    (session,) = sessions
    assert session.model.config.text_config.max_position_embeddings == 1024  # too few for 55 clips
    assert 4 <= session.num_clips < 55 and session.num_tokens < 500
    recent = VideoPandaSession(session.model, session.processor, fps=8, max_clips=4)
    pictures = [picture for _, picture in read_live(io.BytesIO(stream_of(CLIP, repeat=10)), 8.0)]
    for start in range(220 - 4 * session.num_clips, 220, 4):
        recent.add(pictures[start : start + 4], rate=8)
    logits = [one.logits(QUESTION) for one in (session, recent)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert capsys.readouterr().out.startswith("0:27.5 A red circle ")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["none.ts"], 2, "none.ts: no such file"),
        (["."], 1, "is a directory"),
        ([__file__, "--wait", "0"], 1, "test_watch.py': not a video"),
        (["-"], 1, "not a video"),
        (["gopher://there/clip"], 1, "streams of kind 'gopher' are not read"),
        (["v4l2:/dev/none"], 1, "v4l2:/dev/none"),
        ([str(CLIP), "--model", "./runs/nope"], 2, "no such folder: ./runs/nope"),
        ([str(CLIP), "--device", "abacus"], 2, "--device abacus cannot be used here"),
    ],
)
def test_a_source_that_cannot_be_read_is_a_line_and_a_status(arguments, status, message, monkeypatch, capsys):
    standard_input(monkeypatch, b"no video")
    assert main(["watch", arguments[0], QUESTION, *arguments[1:]]) == status
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err and printed.out == ""


@pytest.mark.parametrize("wrong", [["--every", "0"], ["--fps", "-1"], ["--max-clips", "0"], ["--wait", "-1"]])
def test_numbers_that_cannot_be_are_wrong_use(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["watch", str(CLIP), QUESTION, *wrong])
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_ctrl_c_ends_it_quietly(monkeypatch, capsys):
    standard_input(monkeypatch, stream_of(CLIP, repeat=3))
    screen = Screen(lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["watch", "-", QUESTION, "--fps", "4", "--every", "1"]) == 130
    monkeypatch.undo()
    assert screen.getvalue().count("\n") == 1 and capsys.readouterr().err.strip() == ""
