"""The notebook's cells run in their order, at small scale."""

import json
from pathlib import Path

import pytest


NOTEBOOK = Path(__file__).parents[2] / "examples" / "finetune.ipynb"


def test_the_notebook_trains_and_its_model_still_answers(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum("EPOCHS = 40" in code for code in codes) == 1
    variables = {"__name__": "notebook"}
    for code in codes:
        if not code.startswith("%"):
            exec(compile(code.replace("EPOCHS = 40", "EPOCHS = 1"), NOTEBOOK.name, "exec"), variables)
    assert "blue_cross_upwards: " in capsys.readouterr().out
    assert (tmp_path / "runs" / "notebook" / "model" / "model.safetensors").is_file()
