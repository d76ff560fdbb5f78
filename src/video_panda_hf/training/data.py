"""Loads conversations about videos from files or the Hub as one dataset of checked `messages`.

`load_conversations` describes the accepted rows. It checks every row before training starts; videos stay paths.
`checked_row` normalises one row and validates it.
"""

import base64
import binascii
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

from PIL import Image
from transformers.utils import logging

from video_panda_hf.processing import IMAGE_KEYS, SETTINGS, SOURCE_KEYS, rgb_of, source_of, whole_part


logger = logging.get_logger(__name__)

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
KINDS = {"video": (SOURCE_KEYS, SETTINGS), "image": (IMAGE_KEYS, {})}  # the keys of a part of each kind
ROWS_AT_ONCE = 10_000  # rows converted to Arrow at a time: as Python objects they take ten times the memory
BYTES_AT_ONCE = 1 << 28
ROWS_OF_A_TABLE = 32  # rows of `datasets` that are read at a time; each may have whole videos in it
NAMED_PROBLEMS = 5

MALFORMED = "malformed"
NO_ANSWER = "without an assistant's turn"
WRONG_COUNT = "with more or fewer <video> than videos"
MISSING_FILE = "with a missing file"


class ConversationError(ValueError):
    """Some rows cannot be trained on. The message counts them and names the first few."""


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
    r"""
    Loads conversations and checks every row.

    There are two forms of rows. A source may mix them:

    * `{"id", "video": "clip.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat is shown?"}, {"from":
      "gpt", "value": …}, …]}`, the format of Video-LLaVA, Valley and Video-ChatGPT. `video` may be a list, or missing
      in a row of text only. If a turn ends with `<video>`, the video is moved to its start, as in the prompts of the
      released model.
    * `{"messages": [{"role": "user", "content": …}, …]}`. `content` is a string with one `<video>` for each entry of
      the row's `video` or `videos`, or a list of `{"type": "text", "text"}` and `{"type": "video", "video"}`. The key
      of the video may also be "path" or "url". Settings may stand beside it, as in messages to the processor.

    An image (`image`, `images`, `<image>`, `{"type": "image", "image": …}`) is given like a video.

    A video or an image is a path or URL, the bytes of a file, `{"path", "bytes"}` (as columns of `Video` and `Image`
    of `datasets` have it, which are not decoded here), a PIL image, or anything else of this kind that a message to
    the processor may have, except frames in memory.

    Args:
        source (`str`, `os.PathLike`, `list`, `datasets.Dataset` or `Iterable[dict]`):
            A .json file (a list, or one row per line), .jsonl or .parquet file, several files of one kind, a folder
            or name for `datasets.load_dataset`, a `datasets` object, or any iterable of rows.
        video_folder (`str` or `os.PathLike`, *optional*):
            Base folder of relative video paths. Defaults to the folder of the first file, or the current folder.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return an `IterableDataset`, which reads and checks rows on demand.
        on_error (`str`, *optional*, defaults to `"raise"`):
            `"raise"` raises a `ConversationError` after all rows are checked; a stream raises at the first bad row.
            `"skip"` drops bad rows and logs a warning: one summary, or one per row in a stream.
        skip_log (`str` or `os.PathLike`, *optional*):
            File to which a JSON line is appended for every bad row.
        check_files (`bool`, *optional*, defaults to `True`):
            Whether to check that each video file exists. URLs are not checked. Turn it off on slow file systems.
        report (`ConversationReport`, *optional*):
            Is filled with the counts. In a stream, these are the counts of this process so far.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset` with the columns `id` (from the row, or its number) and
        `messages`. A message's content is a list of parts with the fields `type`, `text`, `video`, `image`, `bytes`
        and the settings of a video; fields that do not apply are `None`.

    Raises:
        ConversationError: If rows are bad, or if no row is left.
        FileNotFoundError: If a source file does not exist.
        ValueError: If `on_error` is neither `"raise"` nor `"skip"`.
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
            return rows.map(partial(checked_batch, check=check), batch_size=ROWS_OF_A_TABLE, **options)
        if isinstance(rows, Rows):  # `datasets` shards a stream by the lists in `gen_kwargs`
            given = {"files": rows.files, "check": check}
            return IterableDataset.from_generator(stream_files, features=features(), gen_kwargs=given)
        return IterableDataset.from_generator(partial(stream, rows, check), features=features())

    kept = check(enumerate(rows), on_error="count")  # check all rows first, so that one error reports all bad ones
    datasets = [Dataset.from_list(chunk, features=features()) for chunk in chunks_of(kept)]
    summary = "\n".join([str(report), *report.first_problems])
    if report.problems and on_error == "raise":
        raise ConversationError(summary)
    if not datasets:
        raise ConversationError(f"no conversation to train on: {summary}")
    (logger.warning if report.problems else logger.info)(summary)
    return concatenate_datasets(datasets)


@dataclass
class ConversationReport:
    """
    What `load_conversations` found.

    Args:
        rows (`int`, *optional*, defaults to 0):
            Rows read.
        kept (`int`, *optional*, defaults to 0):
            Good rows.
        text_only (`int`, *optional*, defaults to 0):
            Good rows without a video.
        videos (`int`, *optional*, defaults to 0):
            Videos in the good rows, images included.
        problems (`Counter`, *optional*):
            Number of bad rows for each kind of problem.
        first_problems (`list[str]`, *optional*):
            Messages of the first five bad rows.
    """

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
    """One row is bad. `problem` is the kind under which the row is counted."""

    def __init__(self, problem: str, message: str):
        super().__init__(message)
        self.problem = problem


def features():
    from datasets import Features, Value

    part = {name: Value("string") for name in ("type", "text", *KINDS)} | {"bytes": Value("large_binary")}
    part |= {name: Value("float64") for name in ("start", "end", "fps")}
    part |= {"indices": [Value("int64")], "num_frames": Value("int64"), "max_frames": Value("int64")}
    return Features({"id": Value("string"), "messages": [{"role": Value("string"), "content": [part]}]})


# Sources → rows


class Rows:
    """The rows of JSON files. Each iteration reads the files again. A line that is not JSON gives a `RowError`."""

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
    """The files of the source, or an empty list if the source is something else."""
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
    from datasets import Dataset, IterableDataset, load_dataset

    if files and any(file.suffix != ".parquet" for file in files):
        return Rows(files)
    if files:
        source = load_dataset("parquet", data_files=list(map(str, files)), split="train", streaming=streaming)
    elif isinstance(source, (str, os.PathLike)):
        source = load_dataset(os.fspath(source), split=split, streaming=streaming)
    elif streaming and isinstance(source, Dataset):
        source = source.to_iterable_dataset()
    # `datasets` would decode videos and pictures, and needs torchcodec for it: a table has them as they are.
    if isinstance(source, IterableDataset):
        return source if source.features is None else source.decode(False)
    return rows_of(source) if isinstance(source, Dataset) else source


def rows_of(dataset) -> Iterator[dict]:
    for table in dataset.with_format("arrow").iter(ROWS_OF_A_TABLE):
        yield from table.to_pylist()


def chunks_of(rows: Iterator[dict]) -> Iterator[list[dict]]:
    """Stretches of the rows, limited in rows and in bytes."""
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += sum(len(part["bytes"] or b"") for part in parts_of(row["messages"]))
        if len(chunk) == ROWS_AT_ONCE or size > BYTES_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


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
    """Yields the good rows. Bad rows are counted; "skip" also warns of each, "raise" raises `ConversationError`."""
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
        videos = sum(part["type"] in KINDS for part in parts_of(good["messages"]))
        report.kept += 1
        report.videos += videos
        report.text_only += not videos
        yield good


def checked_row(row, number: int, video_folder: Path, check_files: bool) -> dict:
    """
    A row of either form as `id` and `messages`: normalised, then validated.

    Raises:
        RowError: for the first problem found.
    """
    messages = whole_messages(row)
    check_texts(messages)
    messages = [{**m, "content": [with_all_fields(part, video_folder) for part in m["content"]]} for m in messages]
    if check_files:
        check_files_exist(messages)
    name = row.get("id")
    return {"id": str(number if name is None else name), "messages": messages}


def whole_messages(row) -> list[dict]:
    """
    The messages of a row of either form. Each part that is no text has its video or picture, whatever it is.

    Raises:
        RowError: for the first problem found.
    """
    turns = turns_of(row)
    given = {kind: listed(row, kind) for kind in KINDS}
    markers = [f"<{kind}>" for kind in KINDS if kind == "video" or given[kind]]
    messages = [read_turn(turn, markers) for turn in turns]
    unused = fill_markers(messages, given)
    check_speakers(messages)
    check_videos(messages, given, unused)
    return messages


def turns_of(row) -> list:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(MALFORMED, f"a row is a dictionary, not {type(row).__name__}")
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowError(MALFORMED, "no list of turns under `messages` or `conversations`")
    return turns


def media_in(row: dict) -> bool:
    """Whether videos or pictures stand in columns of their own."""
    return any(listed(row, kind) for kind in KINDS)


def listed(row: dict, kind: str) -> list:
    """The row's entries under `kind` or its plural, in order."""
    found = next((row[key] for key in (kind, f"{kind}s") if row.get(key) is not None), [])
    return list(found) if isinstance(found, (list, tuple)) else [found]


def read_turn(turn, markers: list[str]) -> dict:
    """A turn of either form → `role` and `content`, a list of parts. Markers become parts without a `video`."""
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
    parts = [found for part in content for found in read_part(part, markers)]
    return {"role": ROLES[name], "content": trailing_videos_first(parts) if is_from_value else parts}


def read_part(part: dict, markers: list[str]) -> list[dict]:
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return split_at_markers(part["text"], markers)
    part = whole_part({key: value for key, value in part.items() if key != "text" or value is not None})
    kind = part.get("type")
    if kind not in KINDS:
        raise RowError(MALFORMED, f"a part of type {kind!r}, or one without its text")
    keys, settings = KINDS[kind]
    given = part.get(kind, {})
    is_marker = given.keys().isdisjoint((*keys, "bytes"))
    source, named = read_source({**given, kind: ""} if is_marker else given, kind, settings)
    return [{"type": kind, **named} if is_marker else {"type": kind, **named, kind: source}]


def read_source(given: dict, kind: str, settings: dict) -> tuple[object, dict]:
    """The video or picture of a part, and the settings beside it, as the processor understands them."""
    try:
        source, named = source_of(given, kind, KINDS[kind][0], settings)
        if isinstance(source, str) and source is given.get("base64") and not source.startswith("data:"):
            source = base64.b64decode(source, validate=True)
    except (ValueError, AttributeError, binascii.Error) as error:
        raise RowError(MALFORMED, str(error)) from error
    return source, named


def split_at_markers(text: str, markers: list[str]) -> list[dict]:
    """Drops the whitespace around a marker: the chat template puts a video on a line of its own."""
    pieces = re.split(rf"\s*({'|'.join(markers)})\s*", text)  # text, marker, text, …
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    return [{"type": p[1:-1]} if i % 2 else {"type": "text", "text": p} for i, p in enumerate(pieces) if p]


def trailing_videos_first(parts: list[dict]) -> list[dict]:
    is_text = [part["type"] == "text" for part in parts]
    if is_text == sorted(is_text, reverse=True):  # texts, then videos
        return sorted(parts, key=lambda part: part["type"] == "text")
    return parts


def fill_markers(messages: list[dict], given: dict[str, list]) -> dict[str, int]:
    """Gives each part without a video the next of its kind. Returns how many of each kind no part took."""
    waiting = {kind: list(videos) for kind, videos in given.items()}
    for part in parts_of(messages):
        if (kind := part["type"]) in KINDS and kind not in part and waiting[kind]:
            part[kind] = read_source({kind: waiting[kind].pop(0)}, kind, {})[0]
    return {kind: len(videos) for kind, videos in waiting.items()}


def parts_of(messages: list[dict]) -> Iterator[dict]:
    return (part for message in messages for part in message["content"])


def check_speakers(messages: list[dict]) -> None:
    if any(part["type"] != "text" for m in messages if m["role"] == "assistant" for part in m["content"]):
        raise RowError(MALFORMED, "a video in an assistant's turn")


def check_videos(messages: list[dict], given: dict[str, list], unused: dict[str, int]) -> None:
    for part in parts_of(messages):
        kind = part["type"]
        if kind in KINDS and kind not in part:
            raise RowError(WRONG_COUNT, f"more <{kind}> than the {len(given[kind])} under `{kind}`")
    for kind, count in unused.items():
        if count:
            total = len(given[kind])
            raise RowError(WRONG_COUNT, f"{total} under `{kind}`, but {total - count} <{kind}>")


def check_texts(messages: list[dict]) -> None:
    if not any(part["text"].strip() for m in messages if m["role"] == "assistant" for part in m["content"]):
        raise RowError(NO_ANSWER, "no turn of the assistant, or only empty ones")


def with_all_fields(part: dict, video_folder: Path) -> dict:
    fields = dict.fromkeys(("type", "text", *KINDS, "bytes", *SETTINGS.values()))
    kind = part["type"]
    if kind == "text":
        return {**fields, **part}
    source = part[kind]
    if isinstance(source, (str, os.PathLike)) and os.fspath(source):
        source = os.fspath(source)
        return {**fields, **part, kind: source if is_url(source) else str(video_folder / source)}
    if kind == "image" and isinstance(source, Image.Image):
        file = io.BytesIO()
        Image.fromarray(rgb_of(source)).save(file, "PNG")
        source = file.getvalue()
    if hasattr(source, "read"):
        source = source.read()
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise RowError(MALFORMED, f"a {kind} is a path, a URL or a file's bytes here, not {type(source).__name__}")
    return {**fields, **part, kind: None, "bytes": bytes(source)}


def is_url(source: str) -> bool:
    return "://" in source or source.startswith("data:")


def check_files_exist(messages: list[dict]) -> None:
    for part in parts_of(messages):
        file = part.get(part["type"]) if part["type"] in KINDS else None
        if file is not None and not is_url(file) and not os.path.exists(file):
            raise RowError(MISSING_FILE, f"{file}: no such file")


def row_name(row, number: int) -> str:
    name = row.get("id") if isinstance(row, dict) else None
    return f"row {number}" if name is None else f"row {number} (id {name})"


def append_json_line(path: str | os.PathLike, record: dict) -> None:
    """Appends in one write, so that lines of several processes do not mix. Creates the folder if needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
