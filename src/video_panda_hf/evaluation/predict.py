"""Answers of a model to the questions of a task: one line of a file for each, whatever happens to its video."""

import contextlib
import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from math import ceil, isfinite
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.video_utils import VideoMetadata

from video_panda_hf.session import VideoPandaSession, add_chosen_frames

from .lines import LineWriter, read_lines, write_whole
from .questions import Question, chosen_option
from .tasks import Task, as_line


RUN, QUESTIONS, PREDICTIONS = "run.jsonl", "questions.jsonl", "predictions.jsonl"
CHOICES = ("likelihood", "text", "generate")
DECODED_AHEAD = 2  # videos
RATE_OF_FOLDERS = 3.0  # frames a second of a folder of pictures, where a part in seconds is asked for (MVBench)


def predict(
    task: Task,
    model,
    processor,
    output: str | os.PathLike,
    *,
    name: str = "model",
    revision: str | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    choice: str = "likelihood",
    max_new_tokens: int = 1024,
    system: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 0,
    retry: bool = False,
    process: tuple[int, int] | None = None,
    progress: bool | None = None,
) -> Counter:
    r"""
    Answers the questions of a task, greedily, and writes each answer to a file as soon as it is there.

    All questions of a video are answered from one session: it is decoded, encoded and put into the cache once. Each
    answer is that of `generate` for its question alone. What is in the file already is not asked again. A video that
    is missing or broken gives a line with its error for each of its questions.

    Args:
        task (`Task`):
            What `load_task` gave.
        model (`VideoPandaForConditionalGeneration`):
            The model. It is in evaluation mode while this runs.
        processor (`VideoPandaProcessor`):
            Its processor.
        output (`str` or `os.PathLike`):
            The folder of the run, new or with a part of the same run.
        name (`str`, *optional*, defaults to `"model"`), revision (`str`, *optional*):
            What the model is called in files and reports.
        num_frames (`int`, *optional*), fps (`float`, *optional*), max_frames (`int`, *optional*):
            The frames of a video, as the processor takes them. Defaults to the processor's own, 8 frames.
        choice (`str`, *optional*, defaults to `"likelihood"`):
            How an option is chosen: `"likelihood"` of its letter after a prompt that lists all options; `"text"`, the
            mean likelihood of the tokens of its own words after the bare question; or `"generate"`, the letter that
            an answer names.
        max_new_tokens (`int`, *optional*, defaults to 1024):
            The longest answer.
        system (`str`, *optional*):
            A system message.
        batch_size (`int`, *optional*, defaults to 32):
            Questions of a video that are answered at a time; half as many where the GPU's memory is not enough.
        limit (`int`, *optional*), seed (`int`, *optional*, defaults to 0):
            Ask only so many of the questions, drawn by this seed.
        retry (`bool`, *optional*, defaults to `False`):
            Whether to try videos again that were missing or broken.
        process (`tuple[int, int]`, *optional*):
            Number of this process and of all, which split the videos. Defaults to what `accelerate launch` says.
        progress (`bool`, *optional*):
            Whether to show a progress bar. By default on a terminal.

    Returns:
        `Counter`: how many questions of the run are `answered`, `missing` and `broken`, those of other processes
        included.

    Raises:
        ValueError: if the folder has a run with other settings, or for settings that the processor refuses.
        BlockingIOError: if another process writes to the same file.
    """
    if choice not in CHOICES:
        raise ValueError(f"`choice` is one of {', '.join(CHOICES)}, not {choice!r}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is at least 1, not {batch_size}")
    sampling = {"num_frames": num_frames, "fps": fps, "max_frames": max_frames}
    check_sampling(processor.video_processor, sampling)
    folder, questions = Path(output), task.sample(limit, seed)
    rank, count = process or (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    settings = {"task": task.name, "metric": task.metric, "model": name, "revision": revision, **sampling}
    settings |= {"dtype": str(model.dtype).removeprefix("torch."), "system": system, "limit": limit, "seed": seed}
    settings |= {"choice": choice} if task.metric == "choice" else {"max_new_tokens": max_new_tokens}
    keep(folder / RUN, [settings], "settings")
    keep(folder / QUESTIONS, [as_line(question) for question in questions], "questions")

    done = {key for key, line in read_predictions(folder).items() if not (retry and "error" in line)}
    groups = [group for number, group in enumerate(by_video(questions)) if number % count == rank]
    groups = [group for group in groups if not done.issuperset(question.id for question in group)]
    file = PREDICTIONS if count == 1 else f"predictions-{rank}-of-{count}.jsonl"
    told = {"task": task.name, "model": name, "revision": revision}
    was_training, hidden = model.training, None if progress is None else not progress
    try:
        answers = Answers(model, processor, choice, system, max_new_tokens, batch_size)
        with LineWriter(folder / file) as writer, ThreadPoolExecutor(1) as decoder:
            decoded = ahead(decoder, lambda group: frames_of(processor, task.videos, group[0], sampling), groups)
            for group, frames in tqdm(decoded, "videos", len(groups), disable=hidden):
                for question, line in answers.of(group, frames, done):
                    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
                    asked = {"id": question.id, "video": question.video, "question": question.question}
                    writer.write({**told, **asked, **line, "date": date})
    finally:
        model.train(was_training)
    return merge(folder, [question.id for question in questions])


def keep(path: Path, lines: list[dict], what: str) -> None:
    """Writes what is fixed for a run, or checks it if it is there."""
    there = read_lines(path)
    if not there:
        write_whole(path, lines)
    elif len(there) != len(lines):
        raise ValueError(f"{path.parent} has a run of {len(there)} {what}, not {len(lines)}: choose another folder")
    for old, new in zip(there, lines, strict=False):
        for key in {**old, **new}:
            before, now = old.get(key), new.get(key)
            if before != (list(now) if isinstance(now, tuple) else now):
                problem = f"a run with other {what} ({key}: {before!r}, now {now!r})"
                raise ValueError(f"{path.parent} has {problem}: choose another folder")


def check_sampling(video_processor, sampling: dict) -> None:
    """Raises `ValueError` for frames that no video can have, before the first video does."""
    if sampling["max_frames"] is not None and sampling["fps"] is None and video_processor.fps is None:
        raise ValueError("`max_frames` limits `fps`: give both, or `num_frames` for that many frames")
    video_processor.sample_frames(VideoMetadata(total_num_frames=100, fps=25.0), **sampling)


def by_video(questions: Iterable[Question]) -> list[list[Question]]:
    """The questions of each video, or of each part of one, together."""
    groups: dict[tuple, list[Question]] = {}
    for question in questions:
        groups.setdefault((question.video, question.start, question.end), []).append(question)
    return list(groups.values())


def ahead(pool: ThreadPoolExecutor, function, items: list) -> Iterator[tuple[list, Future]]:
    """Each item with its future, some of which are computed before they are asked for."""
    waiting: deque = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > DECODED_AHEAD:
            yield waiting.popleft()
    yield from waiting


def frames_of(processor, videos, question: Question, sampling: dict) -> tuple:
    """The frames that the processor takes of a video, and their numbers."""
    path = videos.find(question.video)
    sample, part = processor.video_processor.sample_frames, {"video": path}
    is_part = question.start is not None or question.end is not None

    def chosen(metadata):
        if not (is_part and os.path.isdir(path)):
            return sample(metadata, **sampling)
        total = metadata.total_num_frames
        first = min(int((question.start or 0) * RATE_OF_FOLDERS), total - 1)
        last = total if question.end is None else min(ceil(question.end * RATE_OF_FOLDERS), total)
        window = replace(metadata, total_num_frames=max(1, last - first), fps=RATE_OF_FOLDERS)
        return first + sample(window, **sampling)

    if is_part and not os.path.isdir(path):
        part |= {"start": question.start, "end": question.end}
    frames, metadata = processor.video_processor.fetch_videos(part, chosen)
    return frames, [int(number) for number in metadata.frames_indices]


class Answers:
    """Answers questions about one video after another."""

    def __init__(self, model, processor, choice: str, system: str | None, max_new_tokens: int, batch_size: int):
        self.session = VideoPandaSession(model, processor, system=system)
        self.choice, self.batch_size = choice, batch_size
        self.generation = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}

    def of(self, group: list[Question], frames: Future, done: set[str]) -> Iterator[tuple[Question, dict]]:
        """The lines of the questions that are not done. A batch is whole also when a part of it is done, so that its
        answers do not depend on where a run was interrupted."""
        problem: Exception | None = frames.exception()
        if problem is None:
            pictures, numbers = frames.result()
            try:
                self.session.reset()
                add_chosen_frames(self.session, pictures)
            except ValueError as error:
                problem = error
        if problem is not None:
            kind = "missing" if isinstance(problem, FileNotFoundError) else "broken"
            line = {"error": kind, "message": str(problem) or type(problem).__name__}
            yield from ((question, line) for question in group if question.id not in done)
            return
        for start in range(0, len(group), self.batch_size):
            batch = group[start : start + self.batch_size]
            if done.issuperset(question.id for question in batch):
                continue
            begun = time.monotonic()
            lines = self.answered(batch)
            seconds = round((time.monotonic() - begun) / len(batch), 3)
            for question, line in zip(batch, lines, strict=True):
                if question.id not in done:
                    yield question, {**line, "frames": numbers, "seconds": seconds}

    def answered(self, batch: list[Question]) -> list[dict]:
        try:
            return self.answered_together(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        half = len(batch) // 2
        return self.answered(batch[:half]) + self.answered(batch[half:])

    def answered_together(self, batch: list[Question]) -> list[dict]:
        if batch[0].options is not None and self.choice != "generate":
            return [self.chosen(question) for question in batch]
        prompts = [question.prompts() for question in batch]
        answers = iter(self.session.ask([prompt for of_one in prompts for prompt in of_one], **self.generation))
        lines = []
        for question in batch:
            line: dict = {"answer": next(answers)}
            if question.second is not None:
                line["second_answer"] = next(answers)
            if question.options is not None:
                line["choice"] = chosen_option(line["answer"], question.options)
            lines.append(line)
        return lines

    def chosen(self, question: Question) -> dict:
        (prompt,) = question.prompts(with_options=self.choice == "likelihood")
        named = question.labels if self.choice == "likelihood" else list(question.options or ())
        found = self.session.log_likelihoods(prompt, named)
        scores = [float(row.sum() if self.choice == "likelihood" else row.mean()) for row in found]
        if not all(map(isfinite, scores)):  # a model that overflows in float16, for example
            return {"answer": "", "choice": None}
        best = scores.index(max(scores))
        return {"answer": named[best], "choice": best, "log_likelihoods": [round(score, 5) for score in scores]}


# The files of a run


def read_predictions(folder: Path) -> dict[str, dict]:
    """The line of each question, by its id, from the files of all processes: an answer rather than an error, else the
    last."""
    found: dict[str, dict] = {}
    for file in sorted(folder.glob("predictions*.jsonl")):
        for line in read_lines(file):
            if "error" not in line or "error" in found.get(line["id"], {"error": ""}):
                found[line["id"]] = line
    return found


def merge(folder: Path, ids: list[str]) -> Counter:
    """Makes one file of those of several processes, in the order of the questions, once all are there and nobody
    writes any more. Each process tries it when it ends."""
    for _ in range(3):
        shards = sorted(folder.glob("predictions-*.jsonl"))
        if not shards or not read_predictions(folder).keys() >= set(ids):
            break
        try:
            with contextlib.ExitStack() as writers:
                for shard in shards:
                    writers.enter_context(LineWriter(shard))
                found = read_predictions(folder)
                write_whole(folder / PREDICTIONS, [found[name] for name in ids])
                for shard in shards:
                    shard.unlink(missing_ok=True)
        except BlockingIOError:  # another process has one of them
            time.sleep(0.2)
    found = read_predictions(folder)
    return Counter(found[name].get("error", "answered") for name in ids if name in found)


def fingerprint(folder: str | os.PathLike) -> str:
    """
    A hash of a checkpoint: of its small files whole, and of parts all over the large ones.

    Args:
        folder (`str` or `os.PathLike`):
            The checkpoint's folder.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    digest, part = hashlib.sha256(), 1 << 16
    for file in sorted(Path(folder).iterdir()):
        if file.suffix in (".json", ".jinja", ".safetensors", ".bin", ".model"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as content:
                for start in range(0, size, max(part, size // 256)):
                    content.seek(start)
                    digest.update(content.read(part))
    return digest.hexdigest()[:16]
