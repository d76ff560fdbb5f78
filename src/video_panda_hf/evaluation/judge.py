"""Judgements of a run's answers: one line of a file for each, whatever the judge does."""

import os
import random
import re
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from tqdm import tqdm

from .judges import ExactJudge, JudgeError, OutOfCalls
from .lines import LineWriter, read_lines
from .predict import QUESTIONS, RUN, read_predictions
from .replies import LONGEST_ANSWER, Item, Prompts, normalised


ASPECTS = {"generic": ("correctness", "detail", "context"), "temporal": ("temporal",), "consistency": ("consistency",)}
FAILURES_IN_A_ROW = 3  # of the judge, after which a run ends
TOKENS_OF_A_REPLY = 20


@dataclass
class Judged:
    """
    What a run of a judge did.

    Args:
        done (`int`):
            Answers that have a judgement, those of earlier runs included.
        unparsed (`int`):
            Those among them of which no reply could be read.
        left (`int`):
            Answers that have none yet.
        problem (`str`, *optional*):
            What was wrong with the judge, if something was.
        calls (`int`), tokens (`list[int]`):
            Requests of this run, and their tokens in and out as the judge counted them.
    """

    done: int
    unparsed: int
    left: int
    problem: str | None
    calls: int
    tokens: list[int]


def judge(
    output: str | os.PathLike,
    by,
    *,
    prompts: str | os.PathLike | None = None,
    max_calls: int | None = None,
    check: bool = False,
    limit: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Judged:
    """
    Has the answers of a run judged, and writes each judgement to a file as soon as it is there. What is in the file
    already, for the same answer, prompt and settings, is not asked again.

    Args:
        output (`str` or `os.PathLike`):
            The folder of the run.
        by (`ExactJudge`, `OpenAIJudge` or `LocalJudge`):
            The judge.
        prompts (`str` or `os.PathLike`, *optional*):
            A file of prompts, see `Prompts`.
        max_calls (`int`, *optional*):
            The most requests of this run, repeated ones included.
        check (`bool`, *optional*, defaults to `False`):
            Whether to judge the judge: the right answers, and right answers to other questions, in place of the
            model's.
        limit (`int`, *optional*), seed (`int`, *optional*, defaults to 0):
            With `check`: take only so many of the questions, drawn by this seed.
        progress (`bool`, *optional*):
            Whether to show a progress bar. By default on a terminal.

    Returns:
        `Judged`: what was done and what is left.

    Raises:
        ValueError: if the folder has no run, or one that this judge cannot judge.
    """
    folder, texts = Path(output), Prompts(prompts) if by.needs_prompts else None
    items = checks(folder, limit, seed) if check else answered(folder)
    waiting = still_to_judge(folder, by, texts, items, check)
    by.begin(max_calls)
    problem, in_a_row = None, 0
    hidden = None if progress is None else not progress
    with LineWriter(file_of(folder, by.name, check)) as writer, ThreadPoolExecutor(by.concurrency) as pool:
        futures = {pool.submit(by.verdict, item, texts): item for item in waiting}
        try:
            for future in tqdm(as_completed(futures), "judgements", len(futures), disable=hidden):
                try:
                    verdict = future.result()
                except OutOfCalls:
                    continue
                except JudgeError as error:
                    problem, in_a_row = str(error), in_a_row + 1
                    if error.is_final or in_a_row >= FAILURES_IN_A_ROW:
                        by.stopped.set()
                    continue
                in_a_row = 0
                writer.write(line_of(futures[future], verdict, by, texts))
        finally:
            by.stopped.set()  # for what waits to be sent again
            pool.shutdown(cancel_futures=True)
    found = read_judgements(folder, by.name, check)
    now = [line for item in items if (line := judgement_of(item, found, by, texts)) is not None]
    unparsed = sum("unparsed" in line for line in now)
    return Judged(len(now), unparsed, len(items) - len(now), problem, by.calls, by.tokens)


def estimate(output, by, prompts=None, check: bool = False, limit: int | None = None, seed: int = 0) -> dict[str, int]:
    """
    What `judge` would need, if each reply can be read. A token is taken for four characters.

    Args:
        output, by, prompts, check, limit, seed:
            As in `judge`.

    Returns:
        `dict[str, int]`: the number of `calls`, and about how many tokens `in` and `out`.
    """
    folder, texts = Path(output), Prompts(prompts)
    items = checks(folder, limit, seed) if check else answered(folder)
    waiting = still_to_judge(folder, by, texts, items, check)
    characters = sum(len(message["content"]) for item in waiting for message in texts.messages(item))
    return {"calls": len(waiting), "in": characters // 4, "out": TOKENS_OF_A_REPLY * len(waiting)}


# What is judged


def run_of(folder: Path) -> dict:
    """
    The settings of a run.

    Raises:
        ValueError: if the folder has none.
    """
    lines = read_lines(folder / RUN)
    if not lines:
        raise ValueError(f"{folder} has no run: `predict` makes one")
    return lines[0]


def aspects_of(question: dict, metric: str) -> tuple[str, ...]:
    return ASPECTS[question["type"]] if metric == "scores" else ("accuracy",)


def answered(folder: Path) -> list[Item]:
    """The answers of a run, for each aspect in which they are judged."""
    metric = run_of(folder)["metric"]
    if metric == "choice":
        raise ValueError(f"{folder} is a multiple choice, which needs no judge: see the report")
    predictions, items = read_predictions(folder), []
    for question in read_lines(folder / QUESTIONS):
        line = predictions.get(question["id"], {"error": "not asked"})
        if "error" not in line:
            for aspect in aspects_of(question, metric):
                items.append(item_of(question, aspect, line["answer"], line.get("second_answer")))
    return items


def checks(folder: Path, limit: int | None, seed: int) -> list[Item]:
    """Right answers, and those of other questions, as if a model had given them."""
    metric, questions = run_of(folder)["metric"], read_lines(folder / QUESTIONS)
    if metric == "choice":
        raise ValueError(f"{folder} is a multiple choice, which needs no judge")
    draw = random.Random(seed)
    chosen = questions if limit is None or limit >= len(questions) else draw.sample(questions, limit)
    items = []
    for question in chosen:
        others = [other["answer"] for other in questions if other["answer"] != question["answer"]]
        others = [answer for answer in others if normalised(answer) != normalised(question["answer"])]
        for kind, answers in (("right", [question["answer"]]), ("shuffled", others)):
            if answers:
                given = draw.choice(answers)
                for aspect in aspects_of(question, metric):
                    items.append(replace(item_of(question, aspect, given, given), kind=kind))
    return items


def item_of(question: dict, aspect: str, answer: str, second: str | None) -> Item:
    two = {"question2": question["second"], "prediction2": second} if "second" in question else {}
    return Item(question["id"], aspect, question["question"], question["answer"], answer, **two)


# The file


def file_of(folder: Path, name: str, check: bool = False) -> Path:
    name = re.sub(r"[^\w.]+", "-", name)
    return folder / f"{'check' if check else 'judgements'}-{name}.jsonl"


def read_judgements(folder: Path, name: str, check: bool = False) -> dict[tuple, dict]:
    """The last line for each answer, aspect, kind and prompt."""
    lines = read_lines(file_of(folder, name, check))
    return {(line["id"], line["aspect"], line.get("kind"), line["prompt"]): line for line in lines}


def still_to_judge(folder: Path, by, prompts: Prompts | None, items: list[Item], check: bool) -> list[Item]:
    if isinstance(by, ExactJudge) and any(item.aspect != "accuracy" for item in items):
        raise ValueError("the exact judge says right or wrong and gives no scores: take another one for this task")
    if prompts is not None:
        prompts.check(item.aspect for item in items)
    found = read_judgements(folder, by.name, check)
    return [item for item in items if judgement_of(item, found, by, prompts) is None]


def judgement_of(item: Item, found: dict[tuple, dict], by, prompts: Prompts | None) -> dict | None:
    """The judgement of just this answer, by this prompt."""
    line = found.get((*item.key, prompt_hash(item, by, prompts)))
    return line if line is not None and line["item"] == item.hash else None


def prompt_hash(item: Item, by, prompts: Prompts | None) -> str | None:
    return None if prompts is None else prompts.hash(item.aspect, by.settings)


def line_of(item: Item, verdict: dict, by, prompts: Prompts | None) -> dict:
    line = {"id": item.id, "aspect": item.aspect, **({"kind": item.kind} if item.kind else {}), **verdict}
    if max(len(item.prediction), len(item.prediction2 or "")) > LONGEST_ANSWER and prompts is not None:
        line["cut"] = True
    line |= {"prompt": prompt_hash(item, by, prompts), "item": item.hash}
    if prompts is not None:
        line["prompts"] = "ours" if prompts.are_ours else prompts.file.name
    return {**line, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def check_table(output: str | os.PathLike, by, prompts=None, limit: int | None = None, seed: int = 0) -> list[dict]:
    """
    What a judge made of right and of shuffled answers, once `judge` has run with `check=True`.

    Args:
        output, by, prompts, limit, seed:
            As in `judge`.

    Returns:
        `list[dict]`: for each aspect and kind of answers, how many were `judged`, how many replies were `unparsed`,
        the share of yes (`correct`) and the mean `score`.
    """
    folder, rows = Path(output), []
    texts = Prompts(prompts) if by.needs_prompts else None
    found, items = read_judgements(folder, by.name, check=True), checks(folder, limit, seed)
    for aspect, kind in dict.fromkeys((item.aspect, item.kind) for item in items):
        of_kind = [item for item in items if (item.aspect, item.kind) == (aspect, kind)]
        lines = [line for item in of_kind if (line := judgement_of(item, found, by, texts)) is not None]
        row = {"aspect": aspect, "answers": kind, "judged": len(lines)}
        row["unparsed"] = sum("unparsed" in line for line in lines)
        for name in ("correct", "score"):
            values = [line[name] for line in lines if name in line]
            row[name] = sum(values) / len(values) if values else None
        rows.append(row)
    return rows
