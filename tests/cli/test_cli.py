"""The command line: what a user types first, and what it says when it cannot."""

import os

import pytest
from PIL import Image

from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.cli import main
from video_panda_hf.decoding import decode_video


CLIP = str(sorted(SHIPPED_CLIPS.glob("*.mp4"))[0])  # <colour>_<shape>_<direction>.mp4


def test_it_answers_about_a_shipped_clip(capsys):
    assert main(["ask", CLIP, "What colour is the shape?"]) == 0
    colour = CLIP.rsplit("/", 1)[-1].split("_")[0]
    assert capsys.readouterr().out == f"It is {colour}.\n"


def test_it_answers_about_a_picture(tmp_path, capsys):
    frames, _ = decode_video(CLIP, lambda video: [0])
    Image.fromarray(frames[0]).save(tmp_path / "photo.jpg", quality=95)
    assert main(["ask", str(tmp_path / "photo.jpg"), "What colour is the shape?"]) == 0
    assert capsys.readouterr().out == f"It is {CLIP.rsplit('/', 1)[-1].split('_')[0]}.\n"


def test_special_tokens_in_a_question_are_text(capsys):
    assert main(["ask", CLIP, "<video> <row> <image> Describe the video."]) == 0
    assert CLIP.rsplit("/", 1)[-1].split("_")[0] in capsys.readouterr().out


@pytest.mark.slow
def test_the_installed_command_streams_to_standard_output(forks):
    done = forks.run(["-m", "video_panda_hf.cli", "ask", CLIP, "Describe the video.", "--num-frames", "8"])
    assert done.returncode == 0 and done.stdout.strip().endswith(".") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-clip.mp4", "What?"], "no-such-clip.mp4"),
        ([__file__, "What?"], "test_cli.py"),
        ([CLIP, "What?", "--num-frames", "3"], "3"),
        ([CLIP, "What?", "--max-frames", "4"], "--max-frames limits --fps"),
        ([CLIP, "What?", "--model", "no/such/folder"], "no/such/folder"),
        ([CLIP, "What?", "--device", "abacus"], "--device abacus cannot be used here"),
        ([CLIP, "What?", "--start", "9"], "shows no frame in [9, inf) s"),
    ],
)
def test_what_cannot_be_is_said_in_a_line_and_a_status(arguments, message, capsys):
    assert main(["ask", *arguments]) == 2
    error = capsys.readouterr().err
    assert "video-panda: " in error and message in error and "Traceback" not in error


def test_a_folder_that_is_no_checkpoint_is_not_pushed(tmp_path, capsys):
    assert main(["push", str(tmp_path / "none"), "ann/panda"]) == 2
    assert main(["push", str(tmp_path), "ann/panda"]) == 2
    errors = capsys.readouterr().err
    assert "none is not a folder" in errors and "has no config.json" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_line(bare_forks, tmp_path):
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **unreachable, "HF_TOKEN": "hf_none", "HF_HOME": str(tmp_path)}
    command = ["-m", "video_panda_hf.cli", "push", SHIPPED_MODEL, "ann/panda"]
    done = bare_forks.run(command, env=environment, timeout=200)
    assert done.returncode == 2
    assert done.stderr.startswith("video-panda: the Hugging Face Hub cannot be reached"), done.stderr
    assert "Traceback" not in done.stderr


def test_fps_and_num_frames_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        main(["ask", CLIP, "What?", "--fps", "2", "--num-frames", "8"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("ask", 'video-panda ask clip.mp4 "Which way does it move?"'),
        ("push", "video-panda push runs/mine user/my-video-panda --private"),
    ],
)
def test_help_has_examples(command, example, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert example in capsys.readouterr().out
