"""The paper's open-ended benchmarks that lmms-eval lacks, as the files in `tasks` name them: questions and figures."""

import os
import sys
from functools import partial

from datasets import Dataset

from ..replies import is_same
from ..tasks import load_task


def questions_of(benchmark: str, _rows=None) -> Dataset:
    """
    The questions of the folder that an environment variable names: `MSVD_QA` for `msvd-qa`.

    Raises:
        SystemExit: if the variable is not set, or the folder does not have the benchmark's files. lmms-eval would try
            five times after any other exception, and not print it last.
    """
    variable = benchmark.upper().replace("-", "_")
    folder = os.environ.get(variable)
    if not folder:
        sys.exit(f"set {variable} in the environment to the folder of {benchmark}, its questions and videos")
    try:
        task = load_task(benchmark, folder)
    except (OSError, ValueError) as error:
        sys.exit(f"{variable}: {error}")
    rows = [
        {"id": question.id, "video": path_of(task.videos, question.video), "question": question.question}
        | {"answer": question.answer}
        for question in task.questions
    ]
    return Dataset.from_list(rows)


def path_of(videos, name: str) -> str:
    """The path of a video. A missing one has the path it should have: the model says so, and its answer is wrong."""
    try:
        return videos.find(name)
    except (FileNotFoundError, ValueError):
        return str(videos.folder / name)


msvd_qa, msrvtt_qa, tgif_qa = (partial(questions_of, name) for name in ("msvd-qa", "msrvtt-qa", "tgif-qa"))


def video_of(row: dict) -> list[str]:
    return [row["video"]]


def compared(row: dict, answers: list[str]) -> dict[str, float]:
    """What the judges `exact` and `match` say of an answer."""
    match, has = is_same(row["answer"], answers[0])
    return {"exact": float(has), "match": float(match)}
