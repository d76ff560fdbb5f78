"""The benchmarks that we give to lmms-eval: questions and figures of `video-panda eval`. Runs of it need lmms-eval."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.evaluation import lines_of, write_qa
from helpers.processes import free_port
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.cli import main
from video_panda_hf.evaluation.lmms import open_ended


pytest.importorskip("datasets")

FOLDER = Path(open_ended.__file__).parent / "tasks"
NAMES = {"msvd-qa": "avi", "msrvtt-qa": "mp4", "tgif-qa": "gif"}  # and the videos' extension
needs_lmms_eval = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval")


def benchmark(folder: Path, extension: str = "avi") -> Path:
    """Three right answers, one of them in the model's words, a wrong one, and one about a video that is not there."""
    (folder / "videos").mkdir(parents=True)
    for name, clip in (("vid1", "red_circle_left"), ("vid2", "blue_cross_upwards")):
        (folder / "videos" / f"{name}.{extension}").write_bytes((SHIPPED_CLIPS / f"{clip}.mp4").read_bytes())
    colour, shape = "What colour is the shape?", "Which shape is it?"
    asked = [("vid1", colour, 0), ("vid2", colour, 1), ("vid1", shape, 2), ("vid2", shape, 3), ("vid3", colour, 4)]
    write_qa(folder, asked, [("red", 4), ("circle", 3), ("circle", 2), ("it is blue", 1), ("red", 0)])
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_questions_are_those_of_our_own_loader(name, tmp_path, monkeypatch):
    variable = name.upper().replace("-", "_")
    monkeypatch.setenv(variable, str(benchmark(tmp_path / "QA", NAMES[name])))
    rows = getattr(open_ended, variable.lower())(None)
    assert rows[1] == {
        "id": "1",
        "video": str(tmp_path / "QA" / "videos" / f"vid2.{NAMES[name]}"),
        "question": "What colour is the shape?",
        "answer": "it is blue",
    }
    assert len(rows) == 5 and open_ended.video_of(rows[1]) == [rows[1]["video"]]
    assert rows[4]["video"] == str(tmp_path / "QA" / "vid3")  # which the model reports as missing


def test_figures_are_those_of_the_judges_exact_and_match():
    assert open_ended.compared({"answer": "red"}, ["It is red."]) == {"exact": 1.0, "match": 0.0}
    assert open_ended.compared({"answer": "red"}, ["Red."]) == {"exact": 1.0, "match": 1.0}
    assert open_ended.compared({"answer": "red"}, [""]) == {"exact": 0.0, "match": 0.0}


def test_a_folder_that_is_not_named_or_not_right_ends_it_with_a_line(tmp_path, monkeypatch):
    monkeypatch.delenv("MSVD_QA", raising=False)
    with pytest.raises(SystemExit, match="set MSVD_QA in the environment to the folder of msvd-qa"):
        open_ended.msvd_qa(None)
    monkeypatch.setenv("MSVD_QA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"MSVD_QA: .* has no file test_a\.json"):
        open_ended.msvd_qa(None)


def test_each_task_names_functions_and_files_that_are_there(capsys, monkeypatch):
    tasks = {file.stem: file.read_text() for file in FOLDER.glob("*.yaml")}
    assert tasks.keys() == {name.replace("-", "_") for name in NAMES}
    shared = (FOLDER / "_open_ended").read_text()
    for name, text in tasks.items():
        assert f"\ntask: {name}\n" in text and text.startswith("include: _open_ended\n")
        for function in re.findall(r"!function (\S+)", shared + text):
            module, _, function = function.rpartition(".")
            assert module == open_ended.__name__ and callable(getattr(open_ended, function))
        assert f"open_ended.{name}\n" in text
    assert (FOLDER / re.search(r"test: (\S+)", shared)[1]).is_file()
    monkeypatch.setattr(sys, "argv", ["lmms"])
    runpy.run_module("video_panda_hf.evaluation.lmms", run_name="__main__")
    assert capsys.readouterr().out == f"{FOLDER}\n"


def run_lmms_eval(
    launcher: list[str], task: str, output: Path, cache: Path
) -> tuple[dict[str, float], dict[str, str]]:
    """The figures, and the answer to each question."""
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "video_panda", "--device", "cpu"]
    command += ["--model_args", f"pretrained={SHIPPED_MODEL}", "--tasks", task, "--include_path", str(FOLDER)]
    command += ["--batch_size", "2", "--output_path", str(output), "--log_samples"]
    env = {**os.environ, "HF_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    (results,), (samples,) = (list(output.rglob(f"*_{name}")) for name in ("results.json", f"samples_{task}.jsonl"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(results.read_text())["results"][task]
    answers = {str(line["doc_id"]): line["filtered_resps"] for line in lines_of(samples)}
    return {name: found[f"{name},none"] for name in ("exact", "match")}, answers


@needs_lmms_eval
@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("msvd-qa", 2), ("msrvtt-qa", 1), ("tgif-qa", 1)])
def test_lmms_eval_gives_the_answers_and_figures_of_our_command(name, processes, tmp_path, monkeypatch, capsys):
    folder = benchmark(tmp_path / "QA", NAMES[name])
    task = name.replace("-", "_")
    monkeypatch.setenv(task.upper(), str(folder))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    figures, answers = run_lmms_eval(launcher if processes == 2 else [], task, tmp_path / "lmms", tmp_path / "hf")
    assert figures == {"exact": 0.6, "match": 0.2}

    ours = str(tmp_path / "ours")
    assert main(["eval", "predict", "--task", name, "--videos", str(folder), "--output", ours]) == 0
    predictions = lines_of(tmp_path / "ours" / "predictions.jsonl")
    assert answers == {line["id"]: line.get("answer", "").strip() for line in predictions}
    for judge, share in figures.items():
        assert main(["eval", "judge", ours, "--judge", judge]) == 0
        capsys.readouterr()
        assert main(["eval", "report", ours, "--judge", judge, "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["figures"][0][0]["value"][0] == share
