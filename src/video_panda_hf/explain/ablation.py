"""Answers with a part of the context tokens taken out, at inference."""

from contextlib import contextmanager

import torch

from .answers import generate_ids
from .inputs import inputs_of, sampled_frames
from .vision import encode, parts_of


PARTS = ("fsra", "gstra", "both")


@contextmanager
def without(model, part: str):
    r"""
    Within it, the model's context tokens lack a part: the frame's summary α·f of FSRA, the clip's summary (1-α)·g of
    GSTRA, or both. Nothing else of the model changes.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model.
        part (`str`):
            `"fsra"`, `"gstra"` or `"both"`. A picture has no part of GSTRA.

    Raises:
        ValueError: for another part.
    """
    if part not in PARTS:
        raise ValueError(f"`part` is one of {', '.join(PARTS)}, not {part!r}")

    def take_out(module, args):
        frames, summaries, *rest = args
        if part != "gstra":
            frames = torch.zeros_like(frames)
        if part != "fsra":
            summaries = [torch.zeros_like(summary) for summary in summaries]
        return (frames, summaries, *rest)

    hook = parts_of(model)[1].fusion.register_forward_pre_hook(take_out)
    try:
        yield model
    finally:
        hook.remove()


def answers_without(
    model,
    processor,
    video,
    question: str,
    *,
    system: str | None = None,
    rate: float | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    max_new_tokens: int = 256,
) -> dict[str, str]:
    r"""
    The answer of the whole model, and the answers with each part of the context tokens taken out.

    Args:
        model, processor, video, question, system, rate, num_frames, fps, max_frames, max_new_tokens:
            As in [`explain`].

    Returns:
        `dict[str, str]`: the answers under `"full"`, `"fsra"`, `"gstra"` and `"both"`, the latter three with that
        part taken out.
    """
    sampling = {"num_frames": num_frames, "fps": fps, "max_frames": max_frames}
    frames, metadata = sampled_frames(processor, video, rate, sampling)
    inputs = inputs_of(processor, frames, metadata, question, system)
    was_training = model.training
    model.eval()
    try:
        return answers_of(model, processor, inputs, max_new_tokens)
    finally:
        model.train(was_training)


def answers_of(model, processor, inputs, max_new_tokens: int) -> dict[str, str]:
    answers = {"full": answer_of(model, processor, inputs, max_new_tokens)}
    for part in PARTS:
        with without(model, part):
            answers[part] = answer_of(model, processor, inputs, max_new_tokens)
    return answers


def answer_of(model, processor, inputs, max_new_tokens: int) -> str:
    model = parts_of(model)[0]
    encoded, _ = encode(model, inputs)
    ids = generate_ids(model, inputs, encoded, processor.tokenizer, max_new_tokens)
    return processor.decode(ids, skip_special_tokens=True).strip()
