"""Rows of `messages` → a batch to train on, decoded where it is called: in the workers of a DataLoader."""

import copy
import os
import time
from collections.abc import Sequence
from itertools import chain, islice

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from transformers.utils import logging

from .data import append_json_line


logger = logging.get_logger(__name__)

COUNTERS = 1024  # places to count in, for the process itself and its workers
STAND_INS_TRIED = 100


class BadSampleError(ValueError):
    """A sample that cannot be trained on, or too many of them; the message names it and says why."""


class VideoPandaDataCollator:
    """`VideoPandaDataCollator(processor)(rows)`, with rows `{"messages": …}` as `load_conversations` gives them.
    Videos may be all that the processor takes, and a row may have several or none.

    Returns: `input_ids`, `attention_mask` and `labels`, int64 (rows, tokens), padded on the right whatever side the
    tokenizer has; labels are -100 but at the tokens of the assistant's turns (all of them, with their end token). If
    any row has a video, `pixel_values_videos` and `video_grid_thw`, packed in the order of the rows.

    Args:
        processor: a `VideoPandaProcessor`. It is not changed.
        max_length: the most tokens a row may have. What stands after its last video is cut. A row whose videos do not
            fit, or that is left without a label, is a bad sample.
        on_error: "raise" a `BadSampleError` at a bad sample (an unreadable video, a row that is too long or without an
            answer), or "skip" it: the batch is that much smaller. In a batch of nothing but bad samples the last good
            row stands in, with its labels, for a batch without a label has no mean loss; `skip_log` has that too.
        skip_log: a file that gets a JSON line for every sample skipped: id, videos, error, time.
        max_skipped_share: raise `BadSampleError` when more than this share of the samples were skipped.
        min_samples: the share is that of so many samples at least: by default, ten may be skipped of the first 1000.
        stand_ins: rows of which one stands in where no good one was seen yet: the dataset, say. `VideoPandaTrainer`
            gives it this.
        processor_kwargs: settings of the video processor in place of its own: `num_frames`, or `fps` and `max_frames`.

    `seen` and `skipped` count what this process and all workers of its DataLoaders were given, in all epochs. The log
    is one file for all processes.
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
        self.processor_kwargs = processor_kwargs
        self.stand_ins = stand_ins
        self._last_good = None
        self._counts = torch.zeros(COUNTERS, 2, dtype=torch.int64).share_memory_()  # seen, skipped

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._counts.share_memory_()  # a copy counts on its own, but with its workers

    @property
    def seen(self) -> int:
        return int(self._counts[:, 0].sum())

    @property
    def skipped(self) -> int:
        return int(self._counts[:, 1].sum())

    def count(self, seen: int = 0, skipped: int = 0) -> None:
        worker = get_worker_info()  # each writes to a place of its own
        self._counts[0 if worker is None else 1 + worker.id % (COUNTERS - 1)] += torch.tensor([seen, skipped])

    def with_stand_ins(self, rows: Sequence[dict]) -> "VideoPandaDataCollator":
        """This collator for other rows. The two count together."""
        other = copy.copy(self)
        other.stand_ins, other._last_good = rows, None
        return other

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        try:
            found = self._encode(rows)  # one call for all: the usual case
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
                self._skip(row, error)
        if not examples:
            examples = [self._stand_in(rows)]
        return self._pack(examples)

    def _encode(self, rows: list[dict]) -> list[dict[str, torch.Tensor]]:
        """One example per row: `input_ids` and `labels` (tokens,), and its videos' pixels and grids."""
        conversations = [without_nones(row["messages"]) for row in rows]
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
        """Within `max_length`, with all of its videos and at least one label."""
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
                continue  # as bad as those it was to stand in for
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


def without_nones(messages: list[dict]) -> list[dict]:
    """Arrow gives every part all the fields that any part has, `None` where they do not apply."""
    return [
        {
            **message,
            "content": [
                {key: value for key, value in part.items() if value is not None} for part in message["content"]
            ],
        }
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def videos_of(messages: list[dict]):
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part.get("type") == "video":
                yield next((part[key] for key in ("video", "path", "url") if part.get(key) is not None), None)


def row_videos(row) -> list:
    """As `videos_of`, of a row that may be bad in any way."""
    try:
        return list(videos_of(row["messages"]))
    except Exception:
        return []


def row_name(row) -> str:
    name = row.get("id") if isinstance(row, dict) else None
    videos = ", ".join(describe(video) for video in row_videos(row))
    return f"{name} ({videos})" if videos else str(name)


def describe(video) -> str:
    return os.fspath(video) if isinstance(video, (str, os.PathLike)) else f"a {type(video).__name__}"
