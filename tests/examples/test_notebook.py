"""`examples/finetune.ipynb` runs from top to bottom and ends with the answer that it promises, without Jupyter."""

import json
import re
from pathlib import Path

import pytest


pytest.importorskip("datasets")
NOTEBOOK = json.loads((Path(__file__).parents[2] / "examples" / "finetune.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TEXT = "\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")


def test_the_notebook_is_committed_without_outputs():
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_ends_with_the_answer_it_promises(forks, tmp_path):
    promised = re.search(r"It should say `(.*?)`", TEXT)[1]
    fewer = [re.sub(r"^EPOCHS = \d+$", "EPOCHS = 30", cell, flags=re.MULTILINE) for cell in CODE]
    assert fewer != CODE
    (tmp_path / "cells.json").write_text(json.dumps(fewer), encoding="utf-8")
    program = f"""
import json
names = {{}}
for cell in json.load(open("cells.json", encoding="utf-8")):
    exec(compile(cell, "cell", "exec"), names)
assert names["answer"] == {promised!r}, names["answer"]
"""
    run = forks.run(["-c", program], cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "runs" / "notebook" / "model.safetensors").is_file()
