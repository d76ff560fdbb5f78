"""A command in a fork ends as it does in a process of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.forks import Forks


TELL = """
import json, os, sys
print(json.dumps([sys.argv, __name__, os.getcwd(), dict(os.environ), sys.stdin.read()]))
print("to standard error", file=sys.stderr)
sys.exit(int(os.environ["STATUS"]))
"""


@pytest.fixture(scope="module")
def small():
    with Forks("json") as forks:
        yield forks


@pytest.mark.parametrize("kind", ["script", "-m", "-c"])
def test_a_fork_does_what_python_does(small, tmp_path, kind):
    (tmp_path / "other").mkdir()
    (tmp_path / "tell.py").write_text("import beside\n" + TELL)
    (tmp_path / ("beside.py" if kind != "-c" else "other/beside.py")).touch()
    command = {"script": [tmp_path / "tell.py"], "-m": ["-m", "tell"], "-c": ["-c", "import beside\n" + TELL]}[kind]
    folder = {"script": tmp_path / "other", "-m": tmp_path, "-c": tmp_path}[kind]
    for status in ("0", "3"):
        environment = {**os.environ, "STATUS": status, "PYTHONPATH": str(tmp_path / "other")}
        command = [*map(str, command), "an argument"]
        options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        expected = subprocess.run([sys.executable, *command], env=environment, cwd=folder, **options)
        assert expected.returncode == int(status), expected.stderr
        done = small.run(command, env=environment, cwd=folder)
        got, wanted = ((run.returncode, run.stdout, run.stderr) for run in (done, expected))
        assert got == wanted


def test_a_fork_knows_nothing_of_the_one_before(small):
    assert small.run(["-c", "import sys, wave; sys.path.append('left'); print('left')"]).stdout == "left\n"
    done = small.run(["-c", "import sys; print('wave' in sys.modules, 'left' in sys.path)"])
    assert done.stdout == "False False\n"


def test_an_error_of_a_fork_is_a_traceback_and_a_status(small):
    done = small.run(["-c", "1 / 0"])
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_a_fork_that_does_not_end_is_ended(small):
    code = "import time; time.sleep(100)"
    begun = time.monotonic()
    with pytest.raises(AssertionError, match=r"not ended after 0\.5 s"):
        small.run(["-c", code], timeout=0.5)
    assert time.monotonic() - begun < 20
    child = small.start(["-c", code])
    assert small.status(timeout=0.1) is None
    os.killpg(child, signal.SIGKILL)
    assert small.status(timeout=20) == -signal.SIGKILL


def test_a_command_that_was_left_running_is_ended_by_the_next(small):
    child = small.start(["-c", "import time; time.sleep(100)"])
    assert small.run(["-c", "print('next')"]).stdout == "next\n"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_end_of_what_forks_is_an_error_and_not_a_hang():
    with Forks("json") as forks:
        assert forks.run(["-c", "print(1)"]).stdout == "1\n"
        forks.server.kill()
        forks.server.wait()
        with pytest.raises((AssertionError, BrokenPipeError)):
            forks.run(["-c", "print(1)"])
