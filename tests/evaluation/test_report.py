"""Reports: what is counted, what is wrong by being missing, how sure it is, and what is compared with what."""

import json

import pytest

from helpers.evaluation import lines_of, write_lines, write_run
from video_panda_hf.evaluation import TASKS, ExactJudge, judge, report
from video_panda_hf.evaluation.judge import answered


def judged(folder, verdicts, name: str = "openai-j", model: str = "j-1", prompts: str = "ours", prompt: str = "p"):
    """Writes judgements of what was answered: (correct, score), or None for one that could not be read."""
    lines = []
    for item, verdict in zip(answered(folder), verdicts, strict=False):
        line = {"id": item.id, "aspect": item.aspect, "item": item.hash, "prompt": prompt, "model": model}
        if verdict is None:
            line["unparsed"] = True
        else:
            line |= {"correct": verdict[0]} if verdict[0] is not None else {}
            line |= {"score": verdict[1]}
        lines.append({**line, "prompts": prompts})
    write_lines(folder / f"judgements-{name}.jsonl", lines)
    return folder


def values(found, run: int = 0) -> dict[str, float | None]:
    return {figure.name: figure.value and round(figure.value[0], 4) for figure in found.figures[run]}


def test_every_question_is_counted_and_what_is_missing_is_wrong(tmp_path):
    rows = [{"prediction": "a"}] * 5 + [{"error": "missing"}, {"error": "broken"}, {"error": "broken"}, {}, {}]
    folder = judged(write_run(tmp_path / "m", rows), [(True, 5), (True, 4), (False, 0), None])
    found = report([folder])
    assert found.counts == [
        {"expected": 10, "answered": 5, "missing": 1, "broken": 2, "not asked": 2, "not judged": 1, "unparsed": 1}
    ]
    assert values(found) == {"accuracy, all": 0.2, "accuracy, judged": 0.6667, "score, judged": 3.0}


def test_intervals_are_those_of_videos_drawn_anew_and_the_same_each_time(tmp_path):
    # One video is all right, the others are all wrong: as if there were four questions, not forty.
    rows = [{"prediction": "yes" if n < 10 else "no", "video": f"v{n // 10}"} for n in range(40)]
    folder = write_run(tmp_path / "m", rows)
    judge(folder, ExactJudge())
    value, low, high = report([folder]).figures[0][0].value
    assert (value, low, high) == (0.25, 0.0, 0.75)
    assert report([folder]).text() == report([folder]).text()
    spread = write_run(tmp_path / "n", [{**row, "video": f"v{n}"} for n, row in enumerate(rows)])
    judge(spread, ExactJudge())
    value, low, high = report([spread]).figures[0][0].value
    assert value == 0.25 and 0.09 < low < 0.16 and 0.35 < high < 0.41  # binomial: 0.25 ± 0.134


def test_types_have_their_own_rows(tmp_path):
    rows = [{"prediction": "yes", "type": "colour"}, {"prediction": "no", "type": "colour"}, {"error": "missing"}]
    folder = write_run(tmp_path / "m", rows)
    judge(folder, ExactJudge())
    assert values(report([folder])) == {
        "accuracy, all": 0.3333,
        "accuracy, judged": 0.5,
        "score, judged": None,
        "accuracy of colour, all": 0.5,
        "accuracy of no type, all": 0.0,
    }
    lines = report([folder]).text().splitlines()
    assert [line.split("  ")[0] for line in lines if " of " in line and "*" not in line] == [
        "accuracy of colour, all (2)",
        "accuracy of no type, all (1)",
    ]
    part = write_run(tmp_path / "n", rows[:2])  # without the second type
    judge(part, ExactJudge())
    table = [line.split("|")[1:-1] for line in report([part, folder]).markdown().splitlines() if line.startswith("|")]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in table}
    assert table["accuracy of no type, all (1)"] == ["–", "0.0 [0.0, 0.0]"]
    assert table["accuracy, all"][0] == "50.0 [50.0, 50.0]"


def test_models_stand_side_by_side_with_paired_differences(tmp_path):
    rows = [{"prediction": "yes", "video": f"v{n}"} for n in range(20)]
    worse = [{**row, "prediction": "no"} if n < 5 else row for n, row in enumerate(rows)]
    first, second = write_run(tmp_path / "first", rows), write_run(tmp_path / "second", worse)
    for folder in (first, second):
        judge(folder, ExactJudge())
    found = report([first, second])
    assert found.names == ["first", "second"] and found.figures[0][0].difference is None
    value, low, high = found.figures[1][0].difference
    assert value == -0.25 and -0.5 < low < -0.3 and -0.15 < high < 0
    assert "accuracy, all, minus first" in found.text() and "-25.0 [" in found.text()
    same = report([first, first])
    assert same.names == ["first (first)", "first (first)"]
    assert same.figures[1][0].difference == [0.0, 0.0, 0.0]

    third = write_run(tmp_path / "third", rows[:12])
    judge(third, ExactJudge())
    found = report([second, third])
    assert found.figures[1][0].difference[0] == pytest.approx(5 / 12)
    assert "third: its differences are on the 12 questions of both" in found.notes


def test_figures_of_two_judges_or_prompts_are_not_compared(tmp_path):
    first = judged(write_run(tmp_path / "a", [{"prediction": "x"}]), [(True, 5)])
    for number, how in enumerate(({"model": "j-2"}, {"prompt": "other"})):
        second = judged(write_run(tmp_path / f"b{number}", [{"prediction": "x"}]), [(True, 5)], **how)
        found = report([first, second])
        assert found.figures[1][0].difference is None and "minus" not in found.text()
        assert "no differences: figures of two judges, or by two prompts, do not compare" in found.notes


def test_the_last_prompt_counts_and_no_mixture(tmp_path):
    folder = judged(write_run(tmp_path / "m", [{"prediction": "x"}] * 3), [(True, 5)] * 3, prompt="old")
    file = folder / "judgements-openai-j.jsonl"
    old = lines_of(file)
    write_lines(file, [*old, {**old[0], "prompt": "new", "correct": False, "score": 0}])
    found = report([folder])
    assert found.counts[0]["not judged"] == 2 and values(found)["accuracy, judged"] == 0.0


def test_multiple_choice_needs_no_judge_and_counts_the_unparsed(tmp_path):
    row = {"options": ["yes", "no"], "type": "a"}
    rows = [{**row, "choice": 0}, {**row, "choice": 1}, {**row, "choice": None}, {**row, "choice": 0, "type": "b"}]
    found = report([write_run(tmp_path / "m", [*rows, {**row, "error": "missing"}], metric="choice")])
    assert values(found) == {
        "accuracy, all": 0.4,
        "accuracy, parsed": 0.6667,
        "accuracy of a, all": 0.25,
        "accuracy of b, all": 1.0,
    }
    assert found.counts[0]["unparsed"] == 1 and found.judge is None
    found = report([write_run(tmp_path / "n", [*rows], "mvbench", "choice")])
    assert values(found)["mean of types, all"] == pytest.approx(2 / 3, abs=1e-4)


def test_five_scores_are_means_over_judged_and_over_all(tmp_path):
    rows = [{"prediction": "x", "type": "generic"}, {"error": "missing", "type": "generic"}]
    rows.append({"prediction": "x", "type": "temporal"})
    folder = write_run(tmp_path / "m", rows, "video-chatgpt", "scores")
    judged(folder, [(None, 4), (None, 3), (None, 2), (None, 1)])
    found = values(report([folder]))
    assert [found[f"{aspect}, judged"] for aspect in ("correctness", "detail", "context", "temporal")] == [4, 3, 2, 1]
    assert (found["correctness, all"], found["temporal, all"], found["consistency, judged"]) == (2, 1, None)


def msvd(folder, model: str, prompts: str, whole: bool = True, **settings):
    questions, videos = TASKS["msvd-qa"].counts if whole else (3, 3)
    rows = [{"prediction": "x", "video": f"v{n % videos}"} for n in range(questions)]
    return judged(
        write_run(folder, rows, "msvd-qa", **settings), [(True, 4)] * questions, model=model, prompts=prompts
    )


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"model": "gpt-4o-mini", "prompts": "ours"}, "its judge was gpt-3.5-turbo, this one is gpt-4o-mini"),
        ({"model": "gpt-3.5-turbo-0613", "prompts": "ours"}, "its judge had other prompts"),
        ({"model": "gpt-3.5-turbo-0613", "prompts": "f", "whole": False}, "they are of the whole benchmark"),
        ({"model": "gpt-3.5-turbo-0613", "prompts": "f", "whole": False, "limit": 3}, "they are of the whole"),
    ],
)
def test_the_papers_figures_stay_away_and_a_line_says_why(how, why, tmp_path):
    found = report([msvd(tmp_path / "m", **{"whole": False, **how})])
    assert found.paper is None and "paper" not in found.text().split("\n")[0]
    assert any(note.startswith(f"no figures of the paper: {why}") for note in found.notes)


def test_the_papers_figures_stand_beside_ours_where_they_compare(tmp_path):
    found = report([msvd(tmp_path / "m", "gpt-3.5-turbo-0613", "theirs.json")])
    assert found.paper == {"accuracy, judged": 64.7, "score, judged": 3.8}
    lines = found.text().splitlines()
    assert lines[0].endswith("  paper") and found.notes == []
    assert [line.split()[-1] for line in lines if "judged  " in line and "not" not in line] == ["64.7", "3.8"]
    (note,) = report([judged(write_run(tmp_path / "own", [{"prediction": "x"}]), [(True, 4)])]).notes
    assert note == "no figures of the paper: it has none of this task"


def test_a_sample_and_a_part_of_a_benchmark_are_said_to_be_so(tmp_path):
    note = report([msvd(tmp_path / "a", "j", "ours", whole=False, limit=3, seed=7)]).notes[0]
    assert note == "a sample: 3 questions in 3 videos, seed 7"
    note = report([msvd(tmp_path / "b", "j", "ours", whole=False)]).notes[0]
    assert note == "3 questions in 3 videos; the whole benchmark has 13,157 in 504"


def test_it_is_written_as_text_markdown_and_json(tmp_path):
    folder = write_run(tmp_path / "a|b", [{"prediction": "yes", "video": f"v{n}"} for n in range(3)])
    judge(folder, ExactJudge())
    found = report([folder])
    assert found.text().splitlines()[:2] == [
        "own, judge exact                   a|b",
        "expected                             3",
    ]
    assert "accuracy, all     100.0 [100.0, 100.0]" in found.text()
    markdown = found.markdown().splitlines()
    assert markdown[:3] == ["| own, judge exact | a\\|b |", "| --- | ---: |", "| expected | 3 |"]
    data = json.loads(found.json())
    assert (data["task"], data["judge"], data["counts"][0]["expected"]) == ("own", "exact", 3)
    assert data["figures"][0][0] == {
        "name": "accuracy, all",
        "unit": "share",
        "count": 3,
        "value": [1.0, 1.0, 1.0],
        "difference": None,
    }


def test_what_cannot_be_reported_is_said(tmp_path):
    with pytest.raises(ValueError, match="has no run"):
        report([tmp_path])
    folder = write_run(tmp_path / "m", [{"prediction": "x"}])
    with pytest.raises(ValueError, match="no judge: run `judge`"):
        report([folder])
    judge(folder, ExactJudge())
    with pytest.raises(ValueError, match="has no judgements of openai-x"):
        report([folder], "openai-x")
    judged(folder, [(True, 4)])
    with pytest.raises(ValueError, match=r"several judges \(exact, openai-j\): name one"):
        report([folder])
    assert report([folder], "exact").judge == "exact"
    with pytest.raises(ValueError, match="the runs are of several tasks: own, other"):
        report([folder, write_run(tmp_path / "n", [{"prediction": "x"}], task="other")])
