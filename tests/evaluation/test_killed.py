"""A run that is killed at any moment and gone on with ends in the report of a run that was not."""

import json
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "helpers" / "killed_runs.py"


@pytest.fixture(scope="module")
def killed(forks, tmp_path_factory):
    done = forks.run([SCRIPT, tmp_path_factory.mktemp("killed"), "20"])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["predict", "judge"])
def test_killed_at_20_random_moments_it_ends_in_the_same_report(step, killed):
    lines, reports = killed[step]["lines"], killed[step]["reports"]
    whole = 108 if step == "predict" else 100
    assert len(lines) == 20 and len([count for count in lines if 0 < count < whole]) > 10  # really in the middle
    assert len(reports) == 21 and set(reports) == {reports[0]}
    assert '"expected": 108' in reports[0] and '"missing": 4' in reports[0] and '"broken": 4' in reports[0]
