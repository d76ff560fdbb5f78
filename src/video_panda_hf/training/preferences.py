"""Preferences about videos, for `trl.DPOTrainer`: rows of two answers to a prompt, and the batches of them."""

import os

import torch

from .collator import VideoPandaDataCollator
from .data import MALFORMED, RowError, load_conversations, local_files, open_source
from .predictions import IGNORED


ANSWERS = ("chosen", "rejected")


def load_preferences(source, video_folder: str | os.PathLike | None = None, **options):
    """
    Loads pairs of answers and checks every row, as `load_conversations` does.

    Rows have TRL's columns `prompt`, `chosen` and `rejected`, each a list of messages or a string, beside `video`,
    `videos`, `image` or `images`. `prompt` may be missing if both answers are whole conversations.

    Args:
        source (`str`, `os.PathLike`, `list`, `datasets.Dataset` or `Iterable[dict]`):
            As in `load_conversations`.
        video_folder (`str` or `os.PathLike`, *optional*):
            Base folder of relative video paths. Defaults to the folder of the first file, or the current folder.
        options:
            `split` and `check_files` of `load_conversations`.

    Returns:
        `datasets.Dataset` with the columns `id`, `chosen` and `rejected`, two whole conversations, and `images`, which
        is empty: TRL leaves rows with such a column to the collator.

    Raises:
        ConversationError: If rows are bad, or if there is none.
        FileNotFoundError: If a source file does not exist.
    """
    from datasets import Features, Value, concatenate_datasets

    files = local_files(source)
    if video_folder is None and files:
        video_folder = files[0].parent
    rows = list(open_source(source, files, options.pop("split", "train"), streaming=False))
    chosen, rejected = (
        load_conversations([conversation(row, answer) for row in rows], video_folder, **options).rename_column(
            "messages", answer
        )
        for answer in ANSWERS
    )
    dataset = concatenate_datasets([chosen, rejected.remove_columns("id")], axis=1)
    features = Features({**dataset.features, "images": [Value("string")]})
    return dataset.map(lambda _: {"images": []}, features=features)


class VideoPandaPreferenceCollator(VideoPandaDataCollator):
    """
    Turns rows of `load_preferences`, or of TRL's columns, into a batch for `trl.DPOTrainer`.

    Its arguments are those of `VideoPandaDataCollator`. A pair is a bad sample if one of its two conversations is.

    Returns:
        `dict[str, torch.Tensor]`, from a call with a list of rows: that of `VideoPandaDataCollator` for all chosen
        conversations and then all rejected ones. In place of `labels` it has `completion_mask`, int64 `(2 · rows,
        tokens)`: 1 at the tokens of the last answer, end token included.
    """

    def _encode(self, rows: list[dict]) -> list[dict[str, dict]]:
        conversations = [conversation(row, answer) for row in rows for answer in ANSWERS]
        for bad in conversations:
            if isinstance(bad, RowError):
                raise bad
        examples = [
            {**example, "labels": last_answer(example["labels"])} for example in super()._encode(conversations)
        ]
        return [dict(zip(ANSWERS, pair, strict=True)) for pair in zip(examples[::2], examples[1::2], strict=True)]

    def _shortened(self, pair: dict[str, dict]) -> dict[str, dict]:
        return {answer: super(VideoPandaPreferenceCollator, self)._shortened(pair[answer]) for answer in ANSWERS}

    def _pack(self, pairs: list[dict[str, dict]]) -> dict[str, torch.Tensor]:
        batch = super()._pack([pair[answer] for answer in ANSWERS for pair in pairs])
        batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
        return batch


def conversation(row, answer: str) -> dict | RowError:
    """The row of `messages` that ends with one of its answers, or what is wrong with it."""
    if not isinstance(row, dict):
        return row
    for name in ANSWERS:
        if not row.get(name):
            return RowError(MALFORMED, f"no answer under `{name}`")
    others = {name: value for name, value in row.items() if name not in ("prompt", *ANSWERS)}
    return {**others, "messages": [*turns(row.get("prompt"), "user"), *turns(row[answer], "assistant")]}


def turns(given, role: str) -> list[dict]:
    return [{"role": role, "content": given}] if isinstance(given, str) else list(given or [])


def last_answer(labels: torch.Tensor) -> torch.Tensor:
    """Labels (tokens,) of a conversation without those of the answers before the last one."""
    end = int((labels != IGNORED).nonzero().max()) if (labels != IGNORED).any() else 0
    start = int((labels[:end] == IGNORED).nonzero().max()) + 1 if (labels[:end] == IGNORED).any() else 0
    return torch.cat([torch.full_like(labels[:start], IGNORED), labels[start:]])
