"""`VideoPandaDataCollator`: rows of `messages` → a training batch. Videos are decoded in the DataLoader's workers."""

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain, islice

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from transformers.utils import logging

from video_panda_hf.processing import CAN_ISOLATE, DecodeLimits

from .data import append_json_line, media_in, whole_messages


logger = logging.get_logger(__name__)

COUNTERS = 1024  # one counter for the process itself, the others for its workers
STAND_INS_TRIED = 100


class BadSampleError(ValueError):
    """A sample cannot be trained on, or too many were skipped. The message names the sample and the reason."""


def isolated(processor, limits: DecodeLimits | dict | None) -> DecodeLimits | None:
    """The limits of decoding, in a worker process unless they say no."""
    given = asdict(limits) if isinstance(limits, DecodeLimits) else dict(limits or {})
    own = getattr(getattr(processor, "video_processor", None), "decode_limits", None) or {}
    isolate = given.get("isolate") is not False and CAN_ISOLATE
    return DecodeLimits(**{**(given or own), "isolate": isolate})


class VideoPandaDataCollator:
    """
    Turns rows of `messages`, as `load_conversations` returns them, into a training batch.

    A row may have several videos and pictures or none, in its messages or in columns (`videos`, `images`). Each is
    anything that the processor accepts. What follows the last answer is left out.

    Args:
        processor (`VideoPandaProcessor`):
            The processor. It is not changed.
        max_length (`int`, *optional*):
            Maximum number of tokens of a row. Text after its last video is cut. A row is a bad sample if its videos do
            not fit or if no label is left. Defaults to no maximum.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What to do with a bad sample (an unreadable video, a row that is too long or has no answer). `"raise"`
            raises a `BadSampleError`. `"skip"` makes the batch smaller. If all samples of a batch are bad, the last
            good row replaces them with its labels, because a batch without labels has no mean loss. Videos are then
            decoded in a worker process (`DecodeLimits.isolate`), so that one that crashes the decoder is skipped too;
            `decode_limits={"isolate": False}` turns that off.
        skip_log (`str` or `os.PathLike`, *optional*):
            File to which a JSON line is appended for every skipped or replaced sample: id, videos, error, time. All
            processes may share one file.
        max_skipped_share (`float`, *optional*, defaults to 0.01):
            Raise a `BadSampleError` when more than this share of the samples was skipped.
        min_samples (`int`, *optional*, defaults to 1000):
            The share is computed over at least this many samples. By default, ten of the first 1000 may be skipped.
        stand_ins (`Sequence[dict]`, *optional*, defaults to `()`):
            Rows to replace a bad batch from while no good row was seen, for example the dataset. `VideoPandaTrainer`
            sets it.
        processor_kwargs (`dict`, *optional*):
            Settings that override the video processor's: `num_frames`, or `fps` and `max_frames`.

    Returns:
        `dict[str, torch.Tensor]`, from a call with a list of rows: `input_ids`, `attention_mask`, `labels`, int64
        `(rows, tokens)`, always padded on the right. Labels are -100 except at the tokens of the assistant's turns,
        end tokens included. If any row has a video or picture also `pixel_values_videos` and `video_grid_thw`, packed
        in the order of the rows.

    Raises:
        BadSampleError: If a sample is bad (`on_error="raise"`), if too many were skipped, or if no good row is known
            to replace a batch of bad ones.
        ValueError: If `on_error` is neither `"raise"` nor `"skip"`.
    """

    def __init__(
        self,
        processor,
        max_length: int | None = None,
        on_error: str = "raise",
        skip_log: str | os.PathLike | None = None,
        max_skipped_share: float = 0.01,
        min_samples: int = 1000,
        stand_ins: Sequence[dict] = (),
        **processor_kwargs,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}")
        self.processor = processor
        self.max_length = max_length
        self.on_error = on_error
        self.skip_log = skip_log
        self.max_skipped_share = max_skipped_share
        self.min_samples = min_samples
        if on_error == "skip":
            processor_kwargs["decode_limits"] = isolated(processor, processor_kwargs.get("decode_limits"))
        self.processor_kwargs = processor_kwargs
        self.stand_ins = stand_ins
        self._last_good, self._marks_kept = None, False
        self._counts = torch.zeros(COUNTERS, 2, dtype=torch.int64).share_memory_()  # seen, skipped

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._counts.share_memory_()  # a copy has its own counters and shares them with its workers

    @property
    def seen(self) -> int:
        """Samples given to this process and to all workers of its DataLoaders, in all epochs."""
        return int(self._counts[:, 0].sum())

    @property
    def skipped(self) -> int:
        """How many of the `seen` samples were skipped."""
        return int(self._counts[:, 1].sum())

    def count(self, seen: int = 0, skipped: int = 0) -> None:
        """Adds to the counts of this process or worker."""
        worker = get_worker_info()  # each writes to its own counter
        self._counts[0 if worker is None else 1 + worker.id % (COUNTERS - 1)] += torch.tensor([seen, skipped])

    def with_stand_ins(self, rows: Sequence[dict], marks_kept: bool = False) -> "VideoPandaDataCollator":
        """
        A copy of this collator with other `stand_ins`. Both share their counts.

        Args:
            rows (`Sequence[dict]`):
                The rows.
            marks_kept (`bool`, *optional*, defaults to `False`):
                Whether a batch gets `kept`, bool `(rows that were given,)`: which of them were not skipped.

        Returns:
            `VideoPandaDataCollator`: the copy.
        """
        other = copy.copy(self)
        other.stand_ins, other._last_good, other._marks_kept = rows, None, marks_kept
        return other

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        try:
            found = self._encode(rows)  # the usual case: one call for all rows
        except Exception as error:
            found = [error] if len(rows) == 1 else [self._encode_alone(row) for row in rows]

        examples = []
        for row, example in zip(rows, found, strict=True):
            self.count(seen=1)
            try:
                if isinstance(example, Exception):
                    raise example
                examples.append(self._shortened(example))
                self._last_good = row
            except Exception as error:
                examples.append(None)
                self._skip(row, error)
        kept = [example is not None for example in examples]
        batch = self._pack([example for example in examples if example is not None] or [self._stand_in(rows)])
        return {**batch, "kept": torch.tensor(kept)} if self._marks_kept else batch

    def _encode(self, rows: list[dict]) -> list[dict[str, torch.Tensor]]:
        """One example per row: `input_ids` and `labels` (tokens,), `pixels` and `grids` of its videos."""
        conversations = [up_to_the_last_answer(without_nones(messages_of(row))) for row in rows]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={**self.processor_kwargs, "padding": False},
        )
        videos = [len(list(videos_of(conversation))) for conversation in conversations]
        pixels, grids = [None] * len(rows), [None] * len(rows)
        if any(videos):
            grids = inputs["video_grid_thw"].split(videos)
            pixels = inputs["pixel_values_videos"].split([int(grid.prod(-1).sum()) for grid in grids])
        examples = []
        for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)):
            ids = torch.tensor(ids)
            labels = ids.masked_fill(torch.tensor(mask) == 0, -100)
            examples.append({"input_ids": ids, "labels": labels, "pixels": pixels[i], "grids": grids[i]})
        return examples

    def _encode_alone(self, row: dict) -> dict[str, torch.Tensor] | Exception:
        try:
            return self._encode([row])[0]
        except Exception as error:
            return error

    def _shortened(self, example: dict) -> dict:
        """Cuts an example to `max_length`. Raises `BadSampleError` if that cuts a video or leaves no label."""
        ids, labels = example["input_ids"], example["labels"]
        if self.max_length is not None and len(ids) > self.max_length:
            is_video = torch.isin(ids, torch.tensor(self.processor.video_token_ids))
            end = int(is_video.nonzero().max()) + 1 if is_video.any() else 0
            if end > self.max_length:
                raise BadSampleError(
                    f"its last video ends at token {end}, over max_length = {self.max_length}: raise that, or take "
                    "fewer frames (num_frames, or fps and max_frames)"
                )
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        if (labels == -100).all():
            cut = f" within max_length = {self.max_length}" if len(ids) < len(example["labels"]) else ""
            raise BadSampleError(f"no token of an assistant's turn{cut}")
        return {**example, "input_ids": ids, "labels": labels}

    def _skip(self, row: dict, error: Exception) -> None:
        if self.on_error == "raise":
            raise BadSampleError(f"sample {row_name(row)}: {error}") from error
        self.count(skipped=1)
        self._log(row, error=f"{type(error).__name__}: {error}")
        logger.warning(f"skipped sample {row_name(row)}, the {self.skipped}. of {self.seen} seen here: {error}")
        if self.skipped > self.max_skipped_share * max(self.seen, self.min_samples):
            raise BadSampleError(
                f"{self.skipped} of {self.seen} samples were skipped, over max_skipped_share = "
                f"{self.max_skipped_share:g}; the last one, {row_name(row)}: {error}"
            ) from error

    def _stand_in(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        known = [] if self._last_good is None else [self._last_good]
        for row in chain(known, islice(self.stand_ins, STAND_INS_TRIED)):
            try:
                example = self._shortened(self._encode([row])[0])
            except Exception:
                continue  # bad as well
            self._last_good = row
            self._log(row, error=None, stands_in_for=[row_name(row) for row in rows])
            return example
        raise BadSampleError(
            f"all {len(rows)} samples of a batch are bad, and no good one is known to stand in for them; the last one "
            f"is {row_name(rows[-1])}: see skip_log, or the warnings"
        )

    def _log(self, row: dict, **what) -> None:
        if self.skip_log is None:
            return
        worker = get_worker_info()
        record = {
            "id": row.get("id") if isinstance(row, dict) else None,
            "videos": [describe(video) for video in row_videos(row)],
            **what,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "worker": None if worker is None else worker.id,
            "skipped": self.skipped,
            "seen": self.seen,
        }
        append_json_line(self.skip_log, record)

    def _pack(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        ids = [example["input_ids"] for example in examples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([e["labels"] for e in examples], batch_first=True, padding_value=-100),
        }
        with_video = [example for example in examples if example["pixels"] is not None and len(example["pixels"])]
        if with_video:
            batch["pixel_values_videos"] = torch.cat([example["pixels"] for example in with_video])
            batch["video_grid_thw"] = torch.cat([example["grids"] for example in with_video])
        return batch


def messages_of(row: dict) -> list[dict]:
    """The messages, with what stands in columns of its own at its place."""
    return whole_messages(row) if media_in(row) else row["messages"]


def without_nones(messages: list[dict]) -> list[dict]:
    """Drops fields that are `None`: Arrow gives every part the fields of all parts."""

    def cleaned(content):
        if not isinstance(content, list):
            return content
        return [{key: value for key, value in part.items() if value is not None} for part in content]

    return [{**message, "content": cleaned(message["content"])} for message in messages]


def up_to_the_last_answer(messages: list[dict]) -> list[dict]:
    """Nothing is learnt from what follows the last answer."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1] + 1] if answers else messages


def videos_of(messages: list[dict]):
    """The videos and pictures of a conversation, in order."""
    keys = ("video", "image", "bytes", "path", "url", "base64", "image_url", "video_url")
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part.get("type") in ("video", "image", "image_url", "video_url"):
                yield next((part[key] for key in keys if part.get(key) is not None), None)


def row_videos(row) -> list:
    """Like `videos_of`, for a row that may be malformed."""
    try:
        return list(videos_of(messages_of(row)))
    except Exception:
        return []


def row_name(row) -> str:
    name = row.get("id") if isinstance(row, dict) else None
    videos = ", ".join(describe(video) for video in row_videos(row))
    return f"{name} ({videos})" if videos else str(name)


def describe(video) -> str:
    return os.fspath(video) if isinstance(video, (str, os.PathLike)) else f"a {type(video).__name__}"
