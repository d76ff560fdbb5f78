"""Nothing but the answer is printed, whatever optional packages are installed."""

import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version

from helpers.readme import block
from video_panda_hf import SHIPPED_CLIPS


SAVE_AND_LOAD = """
import tempfile
from video_panda_hf import SHIPPED_MODEL
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL)
processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    AutoModelForImageTextToText.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)
"""
ASK = ["-m", "video_panda_hf.cli", "ask", str(SHIPPED_CLIPS / "red_circle_left.mp4"), "Describe the video."]
ANSWER = "A red circle moves to the left.\n"


@pytest.mark.slow
def test_a_question_prints_the_answer_alone():
    """In a process of its own: what torch says when it is imported would also be seen."""
    done = subprocess.run([sys.executable, *ASK], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == (ANSWER, "")


@pytest.fixture
def run(bare_forks):
    """Standard output and errors of a program, which imports everything but torch anew."""

    def run(code: str) -> tuple[str, str]:
        done = bare_forks.run(["-c", code])
        return done.stdout, done.stderr

    return run


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.23"),
    reason="older pipelines warn of their own settings",
)
@pytest.mark.slow
def test_the_python_of_the_readme_prints_the_answer_alone(run):
    assert run(block("python")) == (ANSWER, "")


@pytest.mark.slow
def test_saving_and_loading_print_nothing(run):
    assert run(SAVE_AND_LOAD) == ("", "")


@pytest.mark.slow
def test_warnings_of_the_users_own_imports_stay(run):
    code = (
        "import logging; log = logging.getLogger('torch.utils._pytree'); import video_panda_hf; log.warning('stays')"
    )
    assert "stays" in run(code)[1]
