"""Runs, tasks and judges for the tests of evaluation."""

import json
from pathlib import Path

from video_panda_hf import SHIPPED_CLIPS
from video_panda_hf.evaluation import load_task


ASKED = ("What colour is the shape?", "Which shape is it?", "Describe the video.", "How many shapes are there?")
CLIPS = {"red_circle_left": "red", "blue_cross_upwards": "blue", "green_square_right": "green"}


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_qa(folder: Path, asked: list[tuple], answers: list[tuple]) -> None:
    """The two files of MSVD-QA and its like: rows of (video, question, id), and of (answer, id) or with a type."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = {"test_q": ("video_name", "question", "question_id"), "test_a": ("answer", "question_id", "type")}
    for name, rows in (("test_q", asked), ("test_a", answers)):
        table = [dict(zip(keys[name], row, strict=False)) for row in rows]
        (folder / f"{name}.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in ("date", "seconds")} for line in lines]


def clips_task(folder: Path, questions=ASKED, extra: tuple[str, ...] = (), **fields):
    """Each of the questions about each shipped clip, and about further videos that may not be there."""
    rows = [
        {"video": video, "question": question, "answer": CLIPS.get(video, "nothing"), **fields}
        for video in (*CLIPS, *extra)
        for question in questions
    ]
    return load_task(write_lines(folder / "clips.jsonl", rows), SHIPPED_CLIPS)


def write_run(folder: Path, rows: list[dict], task: str = "own", metric: str = "accuracy", **settings) -> Path:
    """A run with these questions and answers. A row has what a question has, and `prediction`, `choice` or `error`."""
    run = {"task": task, "metric": metric, "model": folder.name, "limit": None, "seed": 0, **settings}
    of_prediction = ("prediction", "second_prediction", "choice", "error")
    questions, predictions = [], []
    for number, row in enumerate(rows):
        question = {"id": str(number), "video": "v", "question": f"q{number}?", "answer": "yes"}
        question |= {key: value for key, value in row.items() if key not in of_prediction}
        questions.append(question)
        line = {"id": question["id"], "task": task}
        if "error" in row:
            predictions.append({**line, "error": row["error"], "message": "no"})
        elif "prediction" in row or "choice" in row:
            line["answer"] = row.get("prediction", "A")
            line |= {key: row[key] for key in ("choice",) if key in row}
            line |= {"second_answer": row["second_prediction"]} if "second_prediction" in row else {}
            predictions.append(line)
    write_lines(folder / "run.jsonl", [run])
    write_lines(folder / "questions.jsonl", questions)
    write_lines(folder / "predictions.jsonl", predictions)
    return folder
