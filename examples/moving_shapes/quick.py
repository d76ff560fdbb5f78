"""Ask a model in training about moving shapes without generating: for comparisons of many small trainings.

A greedy answer is the expected one to the letter exactly if each of its tokens, the end included, is the most likely
one after those before it. One forward pass tells that for all answers of a conversation.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch

from data import Clip
from held_out import row_of
from train import make_example, pack, video_questions


def asked(processor, clips: Iterable[Clip], with_story: bool = False) -> list[dict]:
    """For each clip one question about it, as `make_example` makes it, and `rows`: the row of the table that it
    belongs to; `clip`, what it shows. With `with_story` also `text`: the question about a description in words."""
    examples = []
    for number, clip in enumerate(clips):
        rng = np.random.default_rng(number)
        kinds = video_questions(clip, rng)[:1]
        example = make_example(processor, {"type": "video", "video": clip.frames}, clip, kinds, rng)
        example["rows"] = [row_of(kind, clip) for kind in kinds]
        example["clip"] = replace(clip, frames=None)
        if with_story:
            story = {"type": "text", "text": f"{clip.description}\n"}
            example["text"] = make_example(processor, story, clip, kinds, rng)
        examples.append(example)
    return examples


def tensors(examples: list[dict]) -> dict[str, torch.Tensor]:
    """What the model takes of examples, packed."""
    names = ("input_ids", "labels", "pixel_values_videos", "video_grid_thw")
    return pack([{name: example[name] for name in names if name in example} for example in examples])


@torch.no_grad()
def share_right(
    model, examples: list[dict], prepare: Callable[[dict], dict] = lambda batch: batch, batch_size: int = 50
) -> dict[str, float]:
    """
    Share of right answers in each row of the table.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model. It is put into eval mode.
        examples (`list[dict]`):
            What `asked` made.
        prepare (`Callable[[dict], dict]`, *optional*):
            Changes a batch before the model gets it.
        batch_size (`int`, *optional*, defaults to 50):
            Conversations of a forward pass.

    Returns:
        `dict[str, float]`: row → share.
    """
    model.eval()
    right = defaultdict(list)
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        batch = prepare(tensors(part))
        labels = batch.pop("labels")
        chosen = model(**batch).logits.argmax(-1)
        for example, expected, tokens in zip(part, labels, chosen, strict=True):
            is_right = (expected[1:] == tokens[:-1]) | (expected[1:] == -100)
            begins = ((expected[1:] != -100) & (expected[:-1] == -100)).nonzero()[:, 0].tolist()
            for row, begin, end in zip(example["rows"], begins, [*begins[1:], None], strict=True):
                right[row].append(bool(is_right[begin:end].all()))
    return {row: float(np.mean(answers)) for row, answers in right.items()}
