"""
The questions of each benchmark, from its files as they are distributed or from the Hub, and from your own file.

A loader takes a file or folder, or the tables of a data set on the Hub (name → rows), and returns the questions.
"""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from .questions import LETTERS, Question


Tables = dict[str, Iterable[dict]]

ACTIVITYNET_TYPES = ("motion", "spatial", "temporal", "yes/no", "colour", "object", "location", "number", "other")
TEMPCOMPASS_KINDS = ("multi-choice", "yes_no", "caption_matching")
TVBENCH_TASKS = (
    *("action_antonym", "action_count", "action_localization", "action_sequence", "egocentric_sequence"),
    *("moving_direction", "object_count", "object_shuffle", "scene_transition", "unexpected_action"),
)
MVBENCH_FOLDERS = {  # task → the first folder of its videos; some names are in several
    "action_antonym": "ssv2_video",
    "action_count": "perception",
    "action_localization": "sta",
    "action_prediction": "star",
    "action_sequence": "star",
    "character_order": "perception",
    "counterfactual_inference": "clevrer",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa",
    "fine_grained_action": "Moments_in_Time_Raw",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer",
    "moving_count": "clevrer",
    "moving_direction": "clevrer",
    "object_existence": "clevrer",
    "object_interaction": "star",
    "object_shuffle": "perception",
    "scene_transition": "scene_qa",
    "state_change": "perception",
    "unexpected_action": "FunQA_test",
}
LETTERED = re.compile(r"^\s*(?:(?:Caption|Option|Sentence|Choice) )?\(?([A-Z]|\d)[.):] *(.*)$")


# Files → rows


def read_json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from None


def read_json_or_lines(file: Path) -> list:
    if file.read_text(encoding="utf-8-sig").lstrip().startswith("["):
        return read_json(file)
    return read_jsonl(file)


def read_jsonl(file: Path) -> list:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise ValueError(f"{file}, line {number} is not JSON") from None
    return rows


def read_csv(file: Path) -> list[dict]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


def read_parquet(file: Path) -> list[dict]:
    from datasets import Dataset

    return list(Dataset.from_parquet(str(file), keep_in_memory=True))


READERS = {".jsonl": read_jsonl, ".json": read_json_or_lines, ".csv": read_csv, ".parquet": read_parquet}


def tables_of(source: Path | Tables) -> Tables:
    """The files of a folder as tables, by their names; a part (`test-00000-of-00001.parquet`) by its folder's."""
    if isinstance(source, Mapping):
        return source
    files = [source] if source.is_file() else sorted(source.rglob("*"))
    tables: Tables = defaultdict(list)
    for file in files:
        if file.suffix in READERS:
            name = file.parent.name if re.search(r"-\d{5}-of-\d{5}$", file.stem) else file.stem
            rows = read_json(file) if file.suffix == ".json" else READERS[file.suffix](file)
            tables[name] = rows if isinstance(rows, dict) else [*tables[name], *rows]
    return tables


def hub_tables(name: str, configs: tuple[str, ...], split: str) -> Tables:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f'{name} needs the package datasets: pip install "video-panda-hf[eval]"') from None
    return {config or "": load_dataset(name, config, split=split) for config in configs or (None,)}


def rows_of(source: Path | Tables, needed: Iterable[str], names: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """(name of the table, row) of the tables with these keys; only of the `names` if they are there."""
    tables = tables_of(source)
    for name in [name for name in names if name in tables] or tables:
        rows = tables[name]
        if not isinstance(rows, Mapping) and set(needed) <= set(next(iter(rows), {})):
            for row in rows:
                yield name, row


# The paper's benchmarks


def file_in(folder: Path, name: str) -> list[dict]:
    found = [folder] if folder.name == name else sorted(folder.rglob(name))
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found) or 'no'} file{'s' * (len(found) > 1)} {name}")
    rows = read_json(found[0])
    if not isinstance(rows, list):
        raise ValueError(f"{found[0]} is not a list")
    return rows


def open_ended(folder: Path) -> list[Question]:
    """`test_q.json` and `test_a.json`, paired by `question_id`; of an id that is there twice, in order."""
    answers = defaultdict(list)
    for row in file_in(folder, "test_a.json"):
        answers[str(row["question_id"])].append(row)
    questions, unanswered = [], []
    for row in file_in(folder, "test_q.json"):
        name = str(row["question_id"])
        if not answers[name]:
            unanswered.append(name)
            continue
        right = answers[name].pop(0)
        kind = None if right.get("type") is None else str(right["type"])
        questions.append(Question(name, str(row["video_name"]), row["question"], str(right["answer"]), type=kind))
    unasked = [name for name, rows in answers.items() if rows]
    for names, what in ((unanswered, "questions have no answer"), (unasked, "answers have no question")):
        if names:
            raise ValueError(f"{folder}: {len(names)} {what}: {', '.join(names[:5])}")
    return questions


def activitynet(folder: Path) -> list[Question]:
    """As `open_ended`, with the question marks that the file leaves out, and the names of the types."""
    return [
        replace(q, question=q.question.rstrip(" ?") + "?", type=ACTIVITYNET_TYPES[int(q.type)] if q.type else None)
        for q in open_ended(folder)
    ]


def video_chatgpt(folder: Path) -> list[Question]:
    """`generic_qa.json`, `temporal_qa.json` and `consistency_qa.json`. The questions have no ids but their places."""
    questions = []
    for kind in ("generic", "temporal", "consistency"):
        for number, row in enumerate(file_in(folder, f"{kind}_qa.json")):
            first, second = (row["Q1"], row["Q2"]) if kind == "consistency" else (row["Q"], None)
            name = f"{kind}/{number}"
            questions.append(Question(name, str(row["video_name"]), first, str(row["A"]), second=second, type=kind))
    return questions


# Multiple choice


def choice(id, video, question, options, answer, **rest) -> Question:
    """`answer` is the right option's text, its letter, or its number, from 0."""
    is_number = isinstance(answer, int) and answer not in options
    options = tuple(str(option).strip() for option in options)
    numbers = range(len(options))
    letters = LETTERS[: len(options)]
    if str(answer).strip() in options and not is_number:
        answer = str(answer).strip()
    elif str(answer).strip("() .").upper() in letters and str(answer).strip("() ."):
        answer = options[letters.index(str(answer).strip("() .").upper())]
    elif str(answer).strip().isdecimal() and int(answer) in numbers:
        answer = options[int(answer)]
    else:
        raise ValueError(f"question {id}: the answer {answer!r} is none of the options {list(options)}")
    if len(options) < 2 or len(options) > len(LETTERS) or len(set(options)) < len(options):
        raise ValueError(f"question {id}: options are 2 to {len(LETTERS)} different texts, not {list(options)}")
    return Question(str(id), str(video), str(question).strip(), answer, options, **rest)


def without_letters(options: Iterable[str]) -> list[str]:
    """`["A. red", "B. blue"]` → `["red", "blue"]`, if all of them have their letter."""
    found = [LETTERED.match(option) for option in options]
    letters = [match[1] for match in found if match]
    return [match[2] for match in found] if letters == list(LETTERS[: len(found)]) else list(options)


def mvbench(source: Path | Tables, folders: Mapping[str, str] = MVBENCH_FOLDERS) -> list[Question]:
    """A file or configuration for each task, which is the type."""
    questions = []
    for number, (task, row) in enumerate(rows_of(source, ("video", "question", "candidates", "answer"))):
        if task not in folders:
            raise ValueError(f"{task!r} is none of the tasks: {', '.join(folders)}")
        video = f"{folders[task]}/{row['video']}"
        part = {key: None if row.get(key) is None else float(row[key]) for key in ("start", "end")}
        name = f"{task}/{number}"
        questions.append(choice(name, video, row["question"], row["candidates"], row["answer"], type=task, **part))
    return numbered_by_type(questions)


def numbered_by_type(questions: list[Question]) -> list[Question]:
    """Ids that stay the same when a type is left out."""
    counts: dict[str | None, int] = defaultdict(int)
    numbered = []
    for question in questions:
        numbered.append(replace(question, id=f"{question.type}/{counts[question.type]}"))
        counts[question.type] += 1
    return numbered


def tvbench(source: Path | Tables) -> list[Question]:
    return mvbench(source, {task: task for task in TVBENCH_TASKS})


def video_mme(source: Path | Tables) -> list[Question]:
    return [
        choice(row["question_id"], row["videoID"], row["question"], without_letters(row["options"]), row["answer"],
               type=row.get("duration"))
        for _, row in rows_of(source, ("videoID", "question_id", "options"))
    ]  # fmt: skip


def next_qa(source: Path | Tables) -> list[Question]:
    options = [f"a{number}" for number in range(5)]
    return [
        choice(f"{row['video']}_{row['qid']}", row["video"], row["question"], [row[key] for key in options],
               int(row["answer"]), type=row.get("type"))
        for _, row in rows_of(source, ("video", "qid", *options), ("MC", "test"))
    ]  # fmt: skip


def tempcompass(source: Path | Tables) -> list[Question]:
    """Options are in the text of the question. In the authors' files a dictionary of videos has one of aspects."""
    questions = []
    for kind, rows in tables_of(source).items():
        if kind not in TEMPCOMPASS_KINDS:
            continue
        if isinstance(rows, Mapping):
            rows = [
                {"video_id": video, "dim": aspect, **row}
                for video, aspects in rows.items()
                for aspect, of_aspect in aspects.items()
                for row in of_aspect
            ]
        for number, row in enumerate(rows):
            name, aspect = f"{kind}/{number}", row.get("dim")
            if kind == "yes_no":
                text, options, answer = row["question"], ["yes", "no"], row["answer"].strip(" .").lower()
            else:
                lines = [(line, LETTERED.match(line)) for line in row["question"].strip().split("\n")]
                text = "\n".join(line for line, match in lines if not match)
                options = [match[2] for _, match in lines if match]
                right = LETTERED.match(row["answer"])
                answer = right[2] if right else row["answer"]
            questions.append(choice(name, row["video_id"], text, options, answer, type=aspect))
    return questions


def egoschema(source: Path | Tables) -> list[Question]:
    """The Hub's subset of 500, or the authors' `questions.json` with `subset_answers.json`."""
    tables = tables_of(source)
    answers = tables.get("subset_answers")
    if isinstance(answers, Mapping):
        return [
            choice(row["q_uid"], row["q_uid"], row["question"], [row[f"option {i}"] for i in range(5)],
                   int(answers[row["q_uid"]]))
            for row in tables["questions"]
            if row["q_uid"] in answers
        ]  # fmt: skip
    return [
        choice(row.get("question_idx", row["video_idx"]), row["video_idx"], row["question"],
               without_letters(row["option"]), int(row["answer"]))
        for _, row in rows_of(tables, ("video_idx", "option", "answer"), ("Subset",))
    ]  # fmt: skip


def perception_test(source: Path | Tables) -> list[Question]:
    """The Hub's rows, or the authors' file: a dictionary of videos, each with its `mc_question`."""
    keys = ("video_name", "question_id", "options", "answer_id")
    rows = [row for _, row in rows_of(source, keys, ("mc_question_val",))]
    for table in tables_of(source).values():
        if isinstance(table, Mapping):
            for video, entry in table.items():
                rows += [{"video_name": video, "question_id": row["id"], **row} for row in entry["mc_question"]]
    return [
        choice(f"{row['video_name']}_{row['question_id']}", row["video_name"], row["question"], row["options"],
               int(row["answer_id"]), type=row.get("area"))
        for row in rows
    ]  # fmt: skip


# Your own


def own(file: Path) -> list[Question]:
    """
    Rows of `{"video", "question", "answer"}`, which may also have `"options"`, `"id"`, `"type"`, `"start"` and
    `"end"`, or conversations as in training: each question of one is asked on its own.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of questions")
    questions = []
    for number, row in enumerate(READERS[file.suffix](file)):
        try:
            if not isinstance(row, dict):
                raise ValueError("a row is a dictionary")
            questions += own_questions(row, number)
        except (KeyError, ValueError, TypeError) as error:
            problem = f"there is no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{file}, row {number + 1}: {problem}") from None
    return questions


def own_questions(row: dict, number: int) -> list[Question]:
    name = str(number if row.get("id") is None else row["id"])
    turns = row.get("messages") or row.get("conversations")
    if turns:
        pairs = list(pairs_of(turns, row))
        names = [name] if len(pairs) == 1 else [f"{name}/{turn}" for turn in range(len(pairs))]
        return [Question(name, *pair) for name, pair in zip(names, pairs, strict=True)]
    rest = {key: float(row[key]) for key in ("start", "end") if row.get(key) not in (None, "")}
    rest["type"] = None if row.get("type") in (None, "") else str(row["type"])
    video, question, answer = (row[key] for key in ("video", "question", "answer"))
    if answer is None or not isinstance(video, str) or not isinstance(question, str):
        raise ValueError("video and question are texts, and there is an answer")
    options = row.get("options")
    if options in (None, ""):
        return [Question(name, video, question, str(answer), **rest)]
    options = json.loads(options) if isinstance(options, str) else options  # in a CSV file
    return [choice(name, video, question, options, answer, **rest)]


def pairs_of(turns: list[dict], row: dict) -> Iterator[tuple[str, str, str]]:
    """(video, question, answer) of each question in a conversation."""
    videos, asked = listed(row.get("video")) + listed(row.get("videos")), None
    for turn in turns:
        role = turn.get("from") or turn.get("role")
        content = turn["value"] if turn.get("from") else turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        videos += [part[key] for part in parts for key in ("video", "path", "url") if part.get(key)]
        if role in ("human", "user"):
            asked = re.sub(r"\s*<video>\s*", "\n", text).strip()
        elif role in ("gpt", "assistant") and asked is not None:
            if len(videos) != 1:
                raise ValueError(f"a conversation is about one video here, not {len(videos)}")
            yield videos[0], asked, text
            asked = None
        else:
            raise ValueError(f"a turn by {role!r} where a question or its answer should be")


def listed(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
