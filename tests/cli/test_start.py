"""The command line starts at once, and says what is wrong before it imports what takes seconds."""

import json
import subprocess
import sys

import pytest

from helpers.reference_checkpoint import write_reference
from video_panda_hf import SHIPPED_CLIPS, __version__
from video_panda_hf.cli import main


CLIP = str(SHIPPED_CLIPS / "red_circle_left.mp4")
SCRIPT = """
import json, sys, time
from video_panda_cli import convert, main

def status(arguments, main=main):
    try:
        return main(arguments)
    except SystemExit as stopped:
        return stopped.code

begun = time.process_time()
statuses = [status(arguments) for arguments in json.loads(sys.argv[1])]
statuses += [status(["--help"], convert.main), status(["--dtype", "int4", "source", "target"], convert.main)]
slow = sorted({"torch", "transformers", "av", "numpy", "video_panda_hf"} & set(sys.modules))
print(json.dumps([statuses, slow, time.process_time() - begun]), file=sys.stderr)
"""
COMMANDS = ("ask", "chat", "watch", "explain", "eval", "demo", "serve", "push", "convert")
STEPS = ("predict", "judge", "report")


def test_help_and_mistakes_are_answered_without_torch(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"model_type": "lla')
    mistakes = {
        "no such folder: ./runs/nope": ["ask", CLIP, "What?", "--model", "./runs/nope"],
        "empty has no config.json": ["ask", CLIP, "What?", "--model", "empty"],
        "llama is no Video-Panda checkpoint: its config.json is of the type 'llama'": ["chat", "--model", "llama"],
        "torn/config.json is not the JSON of a configuration": ["watch", CLIP, "What?", "--model", "torn"],
        "gone.mp4: no such file": ["ask", CLIP, "gone.mp4", "What?"],
        "lost.ts: no such file": ["watch", "lost.ts", "What?"],
        "--max-frames limits --fps": ["ask", CLIP, "What?", "--max-frames", "4"],
        "- is standard input, which can be read only once": ["ask", "-", "-", "What?"],
        "away is not a folder": ["push", "away", "ann/panda"],
        "no such folder: missing": ["convert", "missing", "target"],
        "invalid choice: 'dance'": ["dance"],
        "the following arguments are required: QUESTION": ["ask", CLIP],
        "msvd is no task and no file. Tasks: msvd-qa": ["eval", "predict", "--task", "msvd", "--output", "o"],
        "no such file or folder: vids": ["eval", "predict", "--task", "msvd-qa", "--videos", "vids", "--output", "o"],
        "no such folder: runs/none": ["eval", "judge", "runs/none", "--judge", "exact"],
        "--judge openai needs --model": ["eval", "judge", "empty", "--judge", "openai"],
        "--limit is for --check-judge": ["eval", "judge", "empty", "--judge", "exact", "--limit", "5"],
        "[1] is not a JSON object": ["eval", "judge", "empty", "--judge", "openai", "--request", "[1]"],
        "no such folder: runs/gone": ["eval", "report", "runs/gone"],
        "not allowed with argument --fps": ["ask", CLIP, "What?", "--fps", "2", "--num-frames", "8"],
    }
    helps = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    helps += [["eval", step, "--help"] for step in STEPS]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([*helps, *mistakes.values()])],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    statuses, slow, seconds = json.loads(done.stderr.splitlines()[-1])
    assert statuses == [0] * len(helps) + [2] * len(mistakes) + [0, 2]
    assert slow == [] and seconds < 1
    assert not [message for message in mistakes if message not in done.stderr]
    assert "example:\n  video-panda-convert " in done.stdout and "invalid choice: 'int4'" in done.stderr
    assert done.stdout.count("examples:\n  ") == len(COMMANDS) + len(STEPS) and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example_of_itself(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"video-panda {command} " in capsys.readouterr().out.split("examples:\n")[1]


def test_ctrl_c_while_it_imports_is_quiet(tmp_path):
    package = tmp_path / "video_panda_hf"
    package.mkdir()
    (package / "version.py").write_text("__version__ = '1'\n")
    (package / "__init__.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    while True: pass\n"
        "except KeyboardInterrupt as error:\n    raise ImportError('lost') from error\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from video_panda_cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "ask", CLIP, "What?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"video-panda-hf {__version__}\n"


def test_convert_is_a_command_of_its_own(tmp_path, capsys):
    source, target = write_reference(tmp_path / "source"), tmp_path / "target"
    assert main(["convert", str(source), str(target), "--quiet", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert main(["convert", str(source), str(target)]) == 2
    assert "is there already" in capsys.readouterr().err
