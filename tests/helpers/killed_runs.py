"""Runs predict and judge again and again, each killed at a random moment, with a model and a judge that are cheap.

`python killed_runs.py FOLDER TIMES`. Imports once, and forks for each run. Prints as JSON for each step how many runs
were killed before their end, how many lines they left, and the reports (unbroken first).
"""

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import video_panda_hf.evaluation.judge
import video_panda_hf.evaluation.predict  # noqa: F401  # the module, whose name is also its function's
from helpers.evaluation import write_lines
from video_panda_hf.evaluation import load_task, report
from video_panda_hf.evaluation.judges import ChatJudge, Reply


predict, judge = (sys.modules[f"video_panda_hf.evaluation.{name}"] for name in ("predict", "judge"))


class Session:
    """Answers at once, by the question alone."""

    fps = 1.0

    def __init__(self, model, processor, system):
        pass

    def reset(self):
        pass

    def add(self, frames, rate):
        if frames.max() == 0:
            raise ValueError("a black video")

    def ask(self, questions, **generation):
        time.sleep(0.001)
        return ["yes" if hash_of(question) % 3 else "no" for question in questions]


class Judge(ChatJudge):
    """Does not answer every question at once, and some not in words that can be read."""

    def reply(self, messages):
        self.count_call()
        time.sleep(0.001)
        number = hash_of(messages[-1]["content"])
        if number % 11 == 0:
            return Reply("I cannot say.", "stub")
        return Reply(json.dumps({"correct": "yes" if number % 2 else "no", "score": number % 6}), "stub")


def hash_of(text: str) -> int:
    return sum(map(ord, text))


def fetch(part, sample):
    name = part["video"]
    frames = np.full((8, 2, 2, 3), 0 if "black" in name else 1, np.uint8)
    return frames, SimpleNamespace(frames_indices=range(8))


def run(step: str, folder: Path, task) -> None:
    if step == "predict":
        model = SimpleNamespace(training=False, dtype=torch.float32, train=lambda mode: None)
        frames = SimpleNamespace(fetch_videos=fetch, sample_frames=lambda *_, **__: range(8), fps=None)
        predict.predict(task, model, SimpleNamespace(video_processor=frames), folder, batch_size=3, progress=False)
    else:
        judge.judge(folder, Judge("stub", {}, concurrency=3), progress=False)


def forked(action, file: Path, lines: int, seconds: float) -> bool:
    """Whether a process with this action was killed before its end: so long after `file` had so many lines."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    deadline = time.monotonic() + 60
    while lines_of(file) < lines and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def main(folder: Path, times: int) -> dict:
    predict.VideoPandaSession = Session
    sys.modules["video_panda_hf.evaluation.report"].RESAMPLES = 50
    gc.freeze()  # so that a fork copies less
    rows = [{"video": f"v{n % 20}", "question": f"question {n}?", "answer": "yes"} for n in range(100)]
    rows += [
        {"video": name, "question": f"{name} {n}?", "answer": "no"} for name in ("gone", "black") for n in range(4)
    ]
    for name in [*(f"v{n}.mp4" for n in range(20)), "black.mp4"]:
        (folder / name).write_bytes(b"")
    task = load_task(write_lines(folder / "own.jsonl", rows))
    return {step: killed(step, folder / step, task, times) for step in ("predict", "judge")}


def killed(step: str, folder: Path, task, times: int) -> dict:
    def prepared(name: str) -> Path:
        if step == "judge":
            run("predict", folder / name, task)
        return folder / name

    def reported(run_folder: Path) -> str:
        by = "judgements-stub" if step == "judge" else "judgements-exact"
        if step == "predict":
            judge.judge(run_folder, judge.ExactJudge(), progress=False)
        found = report([run_folder])
        ids = [json.loads(line)["id"] for line in (run_folder / f"{by}.jsonl").read_text().splitlines()]
        assert len(ids) == len(set(ids)), "judged twice"
        return found.text() + found.json()

    whole, file = prepared("whole"), "predictions.jsonl" if step == "predict" else "judgements-stub.jsonl"
    run(step, whole, task)
    reports, lines, draw, number = [reported(whole)], [], random.Random(0), 0
    most = lines_of(whole / file)
    while len(lines) < times:
        number += 1
        broken = prepared(f"run{number}")
        moment = broken / file, draw.randrange(most), draw.uniform(0, 0.005)
        if not forked(lambda: run(step, broken, task), *moment):  # noqa: B023
            continue  # it had ended
        lines.append(lines_of(broken / file))
        run(step, broken, task)
        reports.append(reported(broken))
    return {"lines": lines, "reports": reports}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
