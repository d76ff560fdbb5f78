"""A checkpoint saved with its code under one release of transformers answers under another, without this package.

`OTHER_PYTHON` names the Python of an environment with another release, where this package is not installed; without it
the tests are skipped. `nox -s exchange` makes such an environment.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.forks import Forks
from video_panda_hf import SHIPPED_CLIPS


OTHER = os.environ.get("OTHER_PYTHON")
SOURCES = Path(__file__).resolve().parents[2] / "src"
CLIP = SHIPPED_CLIPS / "red_circle_left.mp4"
ANSWER = "A red circle moves to the left."

SAVE = """
import sys
sys.path.insert(0, sys.argv[2])
import transformers
from video_panda_hf import SHIPPED_MODEL
from transformers import AutoModelForImageTextToText, AutoProcessor

AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL).save_pretrained(sys.argv[1])
AutoProcessor.from_pretrained(SHIPPED_MODEL).save_pretrained(sys.argv[1])
print(transformers.__version__)
"""
ASK = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "video_panda_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "video", "path": sys.argv[2]}, {"type": "text", "text": "Describe the video."}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
for how in ({}, {"num_beams": 2}):
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False, **how)[0, inputs["input_ids"].shape[1] :]
    print(processor.decode(answer, skip_special_tokens=True).strip())
print(transformers.__version__)
"""


def run(python: str | Forks, program: str, *arguments, cache: Path) -> list[str]:
    options = {"env": {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}, "cwd": cache, "timeout": 300}
    command = ["-c", program, *map(str, arguments)]
    if isinstance(python, Forks):
        done = python.run(command, **options)
    else:
        done = subprocess.run([python, *command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(OTHER is None, reason="needs OTHER_PYTHON, as `nox -s exchange` sets it")
@pytest.mark.parametrize("direction", ["from here to there", "from there to here"])
def test_a_checkpoint_answers_under_another_release_without_the_package(direction, tmp_path):
    here, there = sys.executable, OTHER
    saves, asks = (here, there) if direction == "from here to there" else (there, here)
    saved_by = run(saves, SAVE, tmp_path / "model", SOURCES, cache=tmp_path)[-1]
    *answers, asked_by = run(asks, ASK, tmp_path / "model", CLIP, cache=tmp_path)
    assert answers == [ANSWER, ANSWER]
    assert saved_by != asked_by, "both environments have the same release of transformers"


@pytest.mark.slow
def test_a_checkpoint_answers_without_the_package(bare_forks, tmp_path):
    run(bare_forks, SAVE, tmp_path / "model", SOURCES, cache=tmp_path)
    assert run(bare_forks, ASK, tmp_path / "model", CLIP, cache=tmp_path)[:2] == [ANSWER, ANSWER]
