"""Conversations about videos, as they lie on disks and on the Hub → one dataset of checked `messages`.

`load_conversations` reads; every row is checked before the first step of a training, videos stay paths. What a row may
look like stands there, and in `checked_row` what is wrong with one.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TextIO

from transformers.utils import logging

from video_panda_hf.processing import ROW_TOKEN


logger = logging.get_logger(__name__)

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROWS_AT_ONCE = 10_000  # turned into Arrow at a time: Python objects take ten times the memory
NAMED_PROBLEMS = 5

MALFORMED = "malformed"
NO_ANSWER = "without an assistant's turn"
WRONG_COUNT = "with more or fewer <video> than videos"
RESERVED = f"with the reserved {ROW_TOKEN}"
MISSING_FILE = "with a missing file"


class ConversationError(ValueError):
    """Rows that cannot be trained on; the message has their counts and names the first few."""


def load_conversations(
    source,
    video_folder: str | os.PathLike | None = None,
    split: str = "train",
    *,
    streaming: bool = False,
    on_error: str = "raise",
    skip_log: str | os.PathLike | None = None,
    check_files: bool = True,
    report: "ConversationReport | None" = None,
):
    """Reads conversations and checks each.

    A row is of one of two kinds, and kinds may be mixed:

    * `{"id", "video": "clip.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhat is shown?"}, {"from":
      "gpt", "value": …}, …]}`, as Video-LLaVA, Valley and Video-ChatGPT have it. `video` may be a list, or be missing
      where there is only text. A turn that ends with its `<video>` gets it at the start, as in the prompts of the
      released model.
    * `{"messages": [{"role": "user", "content": …}, …]}`. A content is a string, with a `<video>` for each entry of
      the row's `video` or `videos`, or a list of `{"type": "text", "text"}` and `{"type": "video", "video"}` (also
      "path" or "url"; with "start" and "end" in seconds or "indices" if only a part is wanted).

    A picture (`image`, `images`, `<image>`, `{"type": "image", …}`) is a video of one frame.

    Args:
        source: a .json (a list, or one row a line), .jsonl or .parquet file, several of one kind, a folder or name
            that `datasets.load_dataset` takes, a `datasets` object, or any iterable of rows.
        video_folder: what relative paths of videos start from. Default: the folder of the first file, else the
            current one.
        split: which split of a Hub dataset.
        streaming: return an `IterableDataset`, that reads and checks rows when they are needed.
        on_error: "raise" a `ConversationError`, after all rows are checked (in a stream: at the first bad one), or
            "skip" bad rows, warn of them (in a stream: of each) and write them to `skip_log`.
        skip_log: a file that gets a JSON line for every row skipped.
        check_files: look for each video's file (not for URLs). Turn it off for slow file systems.
        report: gets the counts, if they are wanted as numbers (in a stream: of this process, so far).

    Returns:
        A `datasets.Dataset` of `id` (the row's own, or its number) and `messages`, whose contents are lists of parts
        with the fields type, text, video, start, end, indices, `None` where they do not apply.

    Raises:
        ConversationError: for bad rows, or if no row is left.
        FileNotFoundError: if the source is a file that does not exist.
    """
    from datasets import Dataset, IterableDataset, concatenate_datasets

    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}")
    report = ConversationReport() if report is None else report
    files = local_files(source)
    if video_folder is None:
        video_folder = files[0].parent if files else Path()
    check = partial(
        checked_rows, video_folder=Path(video_folder), check_files=check_files, skip_log=skip_log, report=report
    )
    rows = open_source(source, files, split, streaming)

    if streaming:
        check = partial(check, on_error=on_error)
        if isinstance(rows, IterableDataset):
            columns = rows.column_names or list(next(iter(rows), {}))
            options = {"batched": True, "with_indices": True, "remove_columns": columns, "features": features()}
            return rows.map(partial(checked_batch, check=check), **options)
        if isinstance(rows, Rows):  # a list among the arguments is what workers share among them
            given = {"files": rows.files, "check": check}
            return IterableDataset.from_generator(stream_files, features=features(), gen_kwargs=given)
        return IterableDataset.from_generator(partial(stream, rows, check), features=features())

    kept = check(enumerate(rows), on_error="count")  # all of them, to say all that is bad at once
    chunks = iter(lambda: list(islice(kept, ROWS_AT_ONCE)), [])
    datasets = [Dataset.from_list(chunk, features=features()) for chunk in chunks]
    summary = "\n".join([str(report), *report.first_problems])
    if report.problems and on_error == "raise":
        raise ConversationError(summary)
    if not datasets:
        raise ConversationError(f"no conversation to train on: {summary}")
    (logger.warning if report.problems else logger.info)(summary)
    return concatenate_datasets(datasets)


@dataclass
class ConversationReport:
    """What `load_conversations` found. `problems` counts the rows left out, by what is wrong with them."""

    rows: int = 0
    kept: int = 0
    text_only: int = 0
    videos: int = 0
    problems: Counter = field(default_factory=Counter)
    first_problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.rows} rows, {self.kept} good ({self.videos} videos, {self.text_only} rows without any)"
        bad = ", ".join(f"{count} {problem}" for problem, count in self.problems.most_common())
        return f"{text}, {self.rows - self.kept} bad: {bad}" if bad else text


class RowError(ValueError):
    """What is wrong with one row: `problem`, by which rows are counted, and the message."""

    def __init__(self, problem: str, message: str):
        super().__init__(message)
        self.problem = problem


def features():
    from datasets import Features, Value

    part = {"type": Value("string"), "text": Value("string"), "video": Value("string")}
    part |= {"start": Value("float64"), "end": Value("float64"), "indices": [Value("int64")]}
    return Features({"id": Value("string"), "messages": [{"role": Value("string"), "content": [part]}]})


# Sources → rows


class Rows:
    """The rows of JSON files, read anew each time they are gone through. A line that is no JSON is a `RowError`."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __iter__(self) -> Iterator[dict | RowError]:
        for file in self.files:
            with file.open(encoding="utf-8-sig") as lines:
                is_list = lines.read(1000).lstrip().startswith("[")
                lines.seek(0)
                if is_list:
                    yield from read_list(lines, file)
                    continue
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield read_line(line, f"{file.name}, line {number}")


def read_list(file: TextIO, path: Path) -> list:
    try:
        return json.load(file)
    except json.JSONDecodeError as error:
        raise ConversationError(f"{path} begins like a JSON list and is none ({error})") from error


def read_line(line: str, place: str) -> dict | RowError:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return RowError(MALFORMED, f"{place} is not JSON ({error})")


def local_files(source) -> list[Path]:
    """The source as files, none if it is something else."""
    names = source if isinstance(source, (list, tuple)) else [source]
    if not names or not all(isinstance(name, (str, os.PathLike)) for name in names):
        return []
    files = [Path(name) for name in names]
    if not all(file.suffix in (".json", ".jsonl", ".parquet") for file in files) or "://" in str(names[0]):
        return []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file of conversations")
    return files


def open_source(source, files: list[Path], split: str, streaming: bool) -> Iterable:
    from datasets import Dataset, load_dataset

    if files and all(file.suffix == ".parquet" for file in files):
        return load_dataset("parquet", data_files=list(map(str, files)), split="train", streaming=streaming)
    if files:
        return Rows(files)
    if isinstance(source, (str, os.PathLike)):
        return load_dataset(os.fspath(source), split=split, streaming=streaming)
    return source.to_iterable_dataset() if streaming and isinstance(source, Dataset) else source


def stream(rows: Iterable, check) -> Iterator[dict]:
    yield from check(enumerate(rows))


def stream_files(files: list[Path], check) -> Iterator[dict]:
    return stream(Rows(files), check)


def checked_batch(columns: dict[str, list], numbers: list[int], check) -> dict[str, list]:
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    kept = list(check(zip(numbers, rows, strict=True)))
    return {name: [row[name] for row in kept] for name in ("id", "messages")}


# A row → `id` and `messages`, or what is wrong with it


def checked_rows(
    numbered_rows: Iterable[tuple[int, dict | RowError]],
    video_folder: Path,
    check_files: bool,
    on_error: str,
    skip_log,
    report: ConversationReport,
) -> Iterator[dict]:
    """The good rows; the others are counted, or also warned of ("skip"), or raise `ConversationError` ("raise")."""
    for number, row in numbered_rows:
        report.rows += 1
        try:
            good = checked_row(row, number, video_folder, check_files)
        except RowError as error:
            name = row_name(row, number)
            message = f"{name}: {error}"
            if on_error == "raise":
                raise ConversationError(message) from error
            if on_error == "skip":
                logger.warning(f"skipped {message}")
            report.problems[error.problem] += 1
            if len(report.first_problems) < NAMED_PROBLEMS:
                report.first_problems.append(message)
            if skip_log is not None:
                append_json_line(skip_log, {"row": name, "problem": error.problem, "error": str(error)})
            continue
        videos = sum(part["type"] == "video" for message in good["messages"] for part in message["content"])
        report.kept += 1
        report.videos += videos
        report.text_only += not videos
        yield good


def checked_row(row, number: int, video_folder: Path, check_files: bool) -> dict:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(MALFORMED, f"a row is a dictionary, not {type(row).__name__}")
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowError(MALFORMED, "no list of turns under `messages` or `conversations`")

    waiting = {"video": listed(row, "video"), "image": listed(row, "image")}
    markers = [f"<{kind}>" for kind in waiting if kind == "video" or waiting[kind]]
    given = {kind: len(videos) for kind, videos in waiting.items()}
    messages = []
    for turn in turns:
        role, parts = read_turn(turn, markers)
        if role == "assistant" and any(part["type"] != "text" for part in parts):
            raise RowError(MALFORMED, "a video in an assistant's turn")
        content = [complete(part, waiting, given, video_folder) for part in parts]
        messages.append({"role": role, "content": content})
    for kind, left in waiting.items():
        if left:
            raise RowError(WRONG_COUNT, f"{given[kind]} under `{kind}`, but {given[kind] - len(left)} <{kind}>")

    parts = [part for message in messages for part in message["content"]]
    if not any(m["role"] == "assistant" and any(p["text"].strip() for p in m["content"]) for m in messages):
        raise RowError(NO_ANSWER, "no turn of the assistant, or only empty ones")
    if any(ROW_TOKEN in part["text"] for part in parts if part["type"] == "text"):
        raise RowError(RESERVED, f"{ROW_TOKEN} in a text, which is the model's own token: take it out")
    for part in parts if check_files else []:
        if part["type"] == "video" and "://" not in part["video"] and not os.path.isfile(part["video"]):
            raise RowError(MISSING_FILE, f"{part['video']}: no such file")
    name = row.get("id")
    return {"id": str(number if name is None else name), "messages": messages}


def listed(row: dict, kind: str) -> list:
    """What the row has under `kind` or its plural, in order."""
    found = next((row[key] for key in (kind, f"{kind}s") if row.get(key) is not None), [])
    return list(found) if isinstance(found, (list, tuple)) else [found]


def read_turn(turn, markers: list[str]) -> tuple[str, list[dict]]:
    """A turn of either kind → the role, and its parts; those that a marker stands for have no video yet."""
    if not isinstance(turn, dict):
        raise RowError(MALFORMED, f"a turn is a dictionary, not {type(turn).__name__}")
    is_from_value = turn.get("from") is not None
    name, content = (turn["from"], turn.get("value")) if is_from_value else (turn.get("role"), turn.get("content"))
    if name not in ROLES:
        raise RowError(MALFORMED, f"a turn by {name!r}; there are {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise RowError(MALFORMED, f"a content is a string or a list of parts, not {type(content).__name__}")

    parts = []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            parts += split_at_markers(part["text"], markers)
        elif part.get("type") in ("video", "image"):
            parts.append(part)
        else:
            raise RowError(MALFORMED, f"a part of type {part.get('type')!r}, or one without its text")
    if is_from_value:
        kinds = [part["type"] == "text" for part in parts]
        if kinds == sorted(kinds, reverse=True):  # texts, then videos
            parts.sort(key=lambda part: part["type"] == "text")
    return ROLES[name], parts


def split_at_markers(text: str, markers: list[str]) -> list[dict]:
    """The chat template puts a video on a line of its own, hence without the space that stands around it here."""
    pieces = re.split(rf"\s*({'|'.join(markers)})\s*", text)  # text, marker, text, …
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    return [{"type": p[1:-1]} if i % 2 else {"type": "text", "text": p} for i, p in enumerate(pieces) if p]


def complete(part: dict, waiting: dict[str, list], given: dict[str, int], video_folder: Path) -> dict:
    """A part with all its fields; a marker takes the next of the row's videos, or pictures, which are waiting."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"], "video": None, "start": None, "end": None, "indices": None}
    kind = part["type"]
    video = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
    if video is None:
        if not waiting[kind]:
            raise RowError(WRONG_COUNT, f"more <{kind}> than the {given[kind]} under `{kind}`")
        video = waiting[kind].pop(0)
    if not isinstance(video, (str, os.PathLike)) or not os.fspath(video):
        raise RowError(MALFORMED, f"a {kind} is a path or a URL here, not {type(video).__name__}")
    video = os.fspath(video)
    video = video if "://" in video else str(video_folder / video)
    window = {key: part.get(key) for key in ("start", "end", "indices")}
    return {"type": "video", "text": None, "video": video, **window}


def row_name(row, number: int) -> str:
    name = row.get("id") if isinstance(row, dict) else None
    return f"row {number}" if name is None else f"row {number} (id {name})"


def append_json_line(path: str | os.PathLike, record: dict) -> None:
    """In one write, so that lines of several processes do not mix. Makes the file's folder if there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
