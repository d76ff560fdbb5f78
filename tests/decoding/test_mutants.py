"""Some of the mutants of `mutants.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="workers need Linux or macOS")
def test_edited_structures_give_frames_or_the_documented_error():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).with_name("mutants.py")), "--count", "144", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["mutants"] == 144 and set(report["kinds"].values()) == {24}
    assert report["undocumented"] == []
    assert report["outcomes"]["frames"] > 20 and report["outcomes"]["CorruptVideoError"] > 20
    assert report["slowest"] < 20 and report["left"] == 0 and report["growth_megabytes"] < 50
