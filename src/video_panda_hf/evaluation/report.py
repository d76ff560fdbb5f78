"""Figures of one or several runs of a task, with what is missing, how sure they are, and what they compare with."""

import json
import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .judge import aspects_of, file_of, item_of, run_of
from .lines import read_lines
from .predict import QUESTIONS, read_predictions
from .tasks import SCORES, TASKS


RESAMPLES, SEED, INTERVAL = 1000, 0, (2.5, 97.5)  # of the bootstrap: how many, and the percentiles that are shown
STATES = ("answered", "missing", "broken", "not asked", "not judged", "unparsed")
PAPERS_JUDGE = "gpt-3.5-turbo"


@dataclass
class Run:
    """The questions of a run by their ids, what became of them, and for each quantity the values that there are."""

    name: str
    settings: dict
    questions: dict[str, dict]
    states: Counter = field(default_factory=Counter)
    values: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    judges: set[tuple[str, str]] = field(default_factory=set)  # (model, prompt)
    prompts_are_ours: bool = False
    is_whole: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass
class Measure:
    """The mean of a quantity: over all questions of a group, without a value for 0, or over those with a value. Of
    several groups, the mean of their means."""

    name: str
    quantity: str
    over_all: bool
    groups: list[list[str]]

    def of(self, run: Run, videos: dict[str, int], weights: np.ndarray) -> np.ndarray:
        """The measure for each row of `weights`, which say how often each video counts."""
        means, values = [], run.values[self.quantity]
        for group in self.groups:
            ids = group if self.over_all else [name for name in group if name in values]
            places = [videos[run.questions[name]["video"]] for name in ids]
            sums = np.bincount(places, [values.get(name, 0) for name in ids], len(videos))
            counts = np.bincount(places, minlength=len(videos))
            with np.errstate(invalid="ignore"):
                means.append((weights @ sums) / (weights @ counts))
        return np.mean(means, axis=0)


@dataclass
class Figure:
    """A value over `count` questions and its interval: a share, or a score from 0 to 5. `difference` is that to the
    first run, on the questions of both."""

    name: str
    unit: str
    count: int
    value: list[float] | None
    difference: list[float] | None = None

    def written(self, numbers: list[float] | None) -> str:
        if numbers is None:
            return "–"
        scale, places = (100, 1) if self.unit == "share" else (1, 2)
        value, low, high = (f"{scale * number:.{places}f}" for number in numbers)
        return f"{value} [{low}, {high}]"


@dataclass
class Report:
    """
    The figures of runs. `text()`, `markdown()` and `json()` write them.

    Args:
        task (`str`), judge (`str`, *optional*):
            What was asked, and who judged.
        names (`list[str]`):
            The runs.
        counts (`list[dict[str, int]]`):
            For each run the questions that are `expected`, and how many are in each state.
        figures (`list[list[Figure]]`):
            For each run its figures, with the lower and the upper end of a 95 % interval.
        paper (`dict[str, float]`, *optional*):
            The paper's figures, if they compare.
        notes (`list[str]`):
            What a reader has to know.
    """

    task: str
    judge: str | None
    names: list[str]
    counts: list[dict[str, int]]
    figures: list[list[Figure]]
    paper: dict[str, float] | None
    notes: list[str]

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def rows(self) -> list[list[str]]:
        rows = [[f"{self.task}, judge {self.judge}" if self.judge else self.task, *self.names]]
        rows += [[state, *(str(counts[state]) for counts in self.counts)] for state in ("expected", *STATES)]
        rows = [[*row, *([""] if self.paper else [])] for row in rows]
        by_name = [{figure.name: figure for figure in figures} for figures in self.figures]
        for name in dict.fromkeys(figure.name for figures in self.figures for figure in figures):
            found = [figures.get(name) for figures in by_name]
            counts = {figure.count for figure in found if figure}
            label = f"{name} ({counts.pop():,})" if " of " in name and len(counts) == 1 else name
            paper = [str(self.paper.get(name, ""))] if self.paper else []
            rows.append([label, *(figure.written(figure.value) if figure else "–" for figure in found), *paper])
            if any(figure and figure.difference for figure in found):
                others = [figure.written(figure.difference) if figure else "–" for figure in found[1:]]
                rows.append([f"{name}, minus {self.names[0]}", "", *others, *([""] if paper else [])])
        if self.paper:
            rows[0][-1] = "paper"
        return rows

    def text(self) -> str:
        rows = self.rows()
        first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *cells in rows:
            cells = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
            lines.append("  ".join([name.ljust(first), *cells]).rstrip())
        return "\n".join(lines + self.listed_notes())

    def markdown(self) -> str:
        head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in self.rows()]
        rule = ["---", *["---:"] * (len(head) - 1)]
        return "\n".join(["| " + " | ".join(row) + " |" for row in [head, rule, *rows]] + self.listed_notes())

    def listed_notes(self) -> list[str]:
        return ["", *(f"* {note}" for note in self.notes)] if self.notes else []


def report(outputs: list[str | os.PathLike], judge: str | None = None) -> Report:
    """
    The figures of one or several runs of the same task.

    Args:
        outputs (`list[str]` or `list[os.PathLike]`):
            The folders of the runs. Differences are to the first one.
        judge (`str`, *optional*):
            Whose judgements, where a folder has several: `"exact"`, `"match"`, `"openai-MODEL"` or `"local-MODEL"`.

    Returns:
        `Report`: the figures.

    Raises:
        ValueError: if a folder has no run or no judgements, or the runs are of several tasks.
    """
    folders = [Path(output) for output in outputs]
    settings = [run_of(folder) for folder in folders]
    (task, metric), *others = dict.fromkeys((run["task"], run["metric"]) for run in settings)
    if others:
        raise ValueError(f"the runs are of several tasks: {task}, {', '.join(other for other, _ in others)}")
    judge = None if metric == "choice" else judge or only_judge(folders)
    runs = [read_run(folder, judge) for folder in folders]
    for run, folder in zip(runs, folders, strict=True):
        run.name += f" ({folder.name})" if len({other["model"] for other in settings}) < len(runs) else ""
    notes = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    paper, why_not = paper_of(task, runs)
    same_judge = len({frozenset(run.judges) for run in runs}) == 1
    if not same_judge:
        notes.append("no differences: figures of two judges, or by two prompts, do not compare")
    figures = [figures_of(run, runs[0] if run is not runs[0] and same_judge else None, metric) for run in runs]
    for run in runs[1:]:
        if (shared := len(common(run, runs[0]))) < max(len(run.questions), len(runs[0].questions)):
            notes.append(f"{run.name}: its differences are on the {shared} questions of both")
    counts = [{"expected": len(run.questions), **{state: run.states[state] for state in STATES}} for run in runs]
    return Report(task, judge, [run.name for run in runs], counts, figures, paper, notes + why_not)


# A folder → a run


def only_judge(folders: list[Path]) -> str:
    names = [{file.stem.split("-", 1)[1] for file in folder.glob("judgements-*.jsonl")} for folder in folders]
    common_names = sorted(set.intersection(*names))
    if len(common_names) != 1:
        there = f"several judges ({', '.join(common_names)}): name one" if common_names else "no judge: run `judge`"
        raise ValueError(f"{', '.join(map(str, folders))}: {there}")
    return common_names[0]


def read_run(folder: Path, judge: str | None) -> Run:
    settings = run_of(folder)
    run = Run(settings["model"], settings, {line["id"]: line for line in read_lines(folder / QUESTIONS)})
    predictions, judgements, stale = read_predictions(folder), newest_judgements(folder, judge), 0
    for name, question in run.questions.items():
        line = predictions.get(name, {"error": "not asked"})
        run.states[line.get("error", "answered")] += 1
        if "error" in line:
            continue
        if settings["metric"] == "choice":
            if line["choice"] is None:
                run.states["unparsed"] += 1
            else:
                run.values["accuracy"][name] = question["options"][line["choice"]] == question["answer"]
            continue
        for aspect in aspects_of(question, settings["metric"]):
            found = judgements.get((name, aspect))
            item = item_of(question, aspect, line["answer"], line.get("second_answer"))
            if found is None or found["item"] != item.hash:
                run.states["not judged"] += 1
                stale += found is not None
                continue
            run.judges.add((found["model"], found["prompt"]))
            run.prompts_are_ours |= found.get("prompts") == "ours"
            run.states["unparsed"] += "unparsed" in found
            for key, quantity in (("correct", "accuracy"), ("score", "score" if aspect == "accuracy" else aspect)):
                if key in found:
                    run.values[quantity][name] = found[key]
    if stale:
        run.notes.append(f"{stale} judgements are of answers that are not there any more; they are left out")
    if len(models := sorted({model for model, _ in run.judges})) > 1:
        run.notes.append(f"several models judged under one name: {', '.join(models)}. Figures of two do not compare")
    note_size(run)
    return run


def newest_judgements(folder: Path, judge: str | None) -> dict[tuple[str, str], dict]:
    """The last judgement of each answer and aspect, by the prompt that was the last one for the aspect."""
    if judge is None:
        return {}
    if not (lines := read_lines(file_of(folder, judge))):
        raise ValueError(f"{folder} has no judgements of {judge}: run `judge`")
    last = {line["aspect"]: line["prompt"] for line in lines}
    return {(line["id"], line["aspect"]): line for line in lines if line["prompt"] == last[line["aspect"]]}


def note_size(run: Run) -> None:
    task, videos = run.settings["task"], len({line["video"] for line in run.questions.values()})
    whole = TASKS[task].counts if task in TASKS else None
    there = f"{len(run.questions):,} questions in {videos:,} videos"
    if run.settings["limit"] is not None:
        run.is_whole = False
        run.notes.append(f"a sample: {there}, seed {run.settings['seed']}")
    elif whole and (len(run.questions), videos) != whole:
        run.is_whole = False
        run.notes.append(f"{there}; the whole benchmark has {whole[0]:,} in {whole[1]:,}")


def paper_of(task: str, runs: list[Run]) -> tuple[dict[str, float] | None, list[str]]:
    """The paper's figures, by the names of ours, or why they are not beside ours."""
    paper = TASKS[task].paper if task in TASKS else None
    if paper is None:
        return None, ["no figures of the paper: it has none of this task"]
    judges = sorted({model for run in runs for model, _ in run.judges})
    why = None
    if not judges or not all(name.startswith(PAPERS_JUDGE) for name in judges):
        why = (
            f"its judge was {PAPERS_JUDGE}, this one is {', '.join(judges) or 'nobody'}, and two judges do not compare"
        )
    elif any(run.prompts_are_ours for run in runs):
        why = "its judge had other prompts"
    elif not all(run.is_whole and not run.states["not asked"] and not run.states["not judged"] for run in runs):
        why = "they are of the whole benchmark"
    return (None, [f"no figures of the paper: {why}"]) if why else ({f"{n}, judged": v for n, v in paper.items()}, [])


# A run → figures


def measures(run: Run, ids: list[str], metric: str) -> list[Measure]:
    types: dict[str, list[str]] = defaultdict(list)
    for name in ids:
        types[run.questions[name].get("type")].append(name)
    if metric == "scores":
        asked = {aspect: [n for n in ids if aspect in aspects_of(run.questions[n], metric)] for aspect in SCORES}
        named = [("judged", False), ("all", True)]
        return [
            Measure(f"{aspect}, {what}", aspect, over, [asked[aspect]]) for what, over in named for aspect in SCORES
        ]
    judged = "parsed" if metric == "choice" else "judged"
    found = [
        Measure("accuracy, all", "accuracy", True, [ids]),
        Measure(f"accuracy, {judged}", "accuracy", False, [ids]),
    ]
    if metric == "accuracy":
        found.append(Measure("score, judged", "score", False, [ids]))
    if len(types) > 1:
        if run.settings["task"] in TASKS and TASKS[run.settings["task"]].mean_of_types:
            found.append(Measure("mean of types, all", "accuracy", True, list(types.values())))
        for kind in sorted(types, key=lambda kind: (kind is None, str(kind))):
            found.append(Measure(f"accuracy of {kind or 'no type'}, all", "accuracy", True, [types[kind]]))
    return found


def figures_of(run: Run, first: Run | None, metric: str) -> list[Figure]:
    """The figures of a run, with differences to the first one."""
    shared = [] if first is None else common(run, first)
    to_compare = {measure.name: measure for measure in measures(run, shared, metric)}
    figures = []
    for measure in measures(run, sorted(run.questions), metric):
        unit = "score" if measure.quantity in ("score", *SCORES) else "share"
        figure = Figure(measure.name, unit, sum(map(len, measure.groups)), interval(measure, run))
        if first is not None and measure.name in to_compare:
            figure.difference = interval(to_compare[measure.name], run, first)
        figures.append(figure)
    return figures


def common(run: Run, first: Run) -> list[str]:
    """The questions that both were asked, in the same words."""
    return sorted(name for name in run.questions if run.questions[name] == first.questions.get(name))


def interval(measure: Measure, run: Run, first: Run | None = None) -> list[float] | None:
    """A measure, or its difference to another run, with the ends of its interval: videos are drawn anew, each with all
    of its questions, for questions about one video are not independent."""
    names = sorted({run.questions[name]["video"] for group in measure.groups for name in group})
    videos = {name: number for number, name in enumerate(names)}
    rng = np.random.default_rng(SEED)
    drawn = [np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names)) for _ in range(RESAMPLES)]
    weights = np.stack([np.ones(len(names)), *drawn]) if names else np.zeros((1, 0))
    found = measure.of(run, videos, weights)
    if first is not None:
        found = found - measure.of(first, videos, weights)
    if not np.isfinite(found[0]):
        return None
    return [float(found[0]), *map(float, np.percentile(found[np.isfinite(found)], INTERVAL))]
