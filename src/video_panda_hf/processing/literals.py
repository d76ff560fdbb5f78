"""`<video>`, `<row>` and `<image>` that a user wrote into a message: text, not places of videos.

Before a chat template is rendered, each gets `MARK` after its `<`, so that nothing takes it for a placeholder or a
special token. The prompt is tokenized with the marks, and the tokens of the marks are taken out.
"""

import dataclasses
import re
from collections.abc import Mapping

from transformers import BatchFeature


MARK = "\U0010fffd"  # a private-use character
LITERAL = re.compile("<(?=(?:image|row|video)>)")
MARKED = re.compile(f"(?<=<){MARK}(?=(?:image|row|video)>)")
WITH_OFFSETS = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "offset_mapping")


def marked(messages):
    """Marks the literal tokens in all texts of messages, tools or documents; pictures and videos stay as they are.
    Objects, such as OpenAI's messages, become dictionaries."""
    if dataclasses.is_dataclass(messages) and not isinstance(messages, type):
        messages = {field.name: getattr(messages, field.name) for field in dataclasses.fields(messages)}
    elif callable(getattr(messages, "model_dump", None)):  # of pydantic
        messages = messages.model_dump()
    if isinstance(messages, str):
        return LITERAL.sub(f"<{MARK}", messages)
    if isinstance(messages, Mapping):
        if messages.get("type") in ("image", "video", "image_url", "video_url"):
            return messages
        return {key: marked(value) for key, value in messages.items()}
    return [marked(item) for item in messages] if isinstance(messages, (list, tuple)) else messages


def are_in(text) -> bool:
    texts = [text] if isinstance(text, str) else text
    return any(isinstance(prompt, str) and MARKED.search(prompt) for prompt in texts)


def as_text(inputs: BatchFeature, text: str | list[str], tokenizer, kwargs: dict) -> BatchFeature:
    """
    Takes the tokens of the marks out of what the processor made of prompts with marks.

    Args:
        inputs (`BatchFeature`):
            The processor's inputs, made with `WITH_OFFSETS`.
        text (`str` or `list[str]`):
            The prompts.
        tokenizer (`PreTrainedTokenizerBase`):
            Says how to pad.
        kwargs (`dict`):
            The arguments of the processor's call.

    Returns:
        `BatchFeature`: padded as the arguments ask for, with the offsets only if they ask for them.
    """
    given = {**kwargs.get("common_kwargs", {}), **kwargs.get("text_kwargs", {}), **kwargs}
    keys = [key for key in OF_TOKENS if key in inputs]
    rows = []
    for i, positions in enumerate(positions_of_text(inputs, [text] if isinstance(text, str) else text)):
        whole = {key: plain(inputs[key][i]) for key in keys}
        rows.append({key: [row[position] for position in positions] for key, row in whole.items()})
    if given.get("padding") not in (None, False, "do_not_pad"):
        width = max(len(row["input_ids"]) for row in rows)
        if given["padding"] == "max_length":
            width = len(inputs["input_ids"][0])
        multiple = given.get("pad_to_multiple_of") or 1
        width = -(-width // multiple) * multiple
        is_left = (given.get("padding_side") or tokenizer.padding_side) == "left"
        for row in rows:
            missing = width - len(row["input_ids"])
            for key in keys:
                fill = missing * [{"input_ids": tokenizer.pad_token_id, "offset_mapping": (0, 0)}.get(key, 0)]
                row[key] = fill + row[key] if is_left else row[key] + fill

    data = BatchFeature({key: [row[key] for row in rows] for key in keys}, given.get("return_tensors"))
    inputs.update({key: data[key] for key in keys})
    for wish, name in zip(WITH_OFFSETS, ("offset_mapping", "text_replacement_offsets"), strict=True):
        if not given.get(wish):
            inputs.pop(name)
    return inputs


def plain(row) -> list:
    return row if isinstance(row, list) else row.tolist()


def positions_of_text(inputs: BatchFeature, prompts: list[str]):
    """For each prompt, the positions of its tokens, without padding and without those of marks."""
    for i, prompt in enumerate(prompts):
        offsets, replaced = plain(inputs["offset_mapping"][i]), inputs["text_replacement_offsets"][i]
        marks = {shifted(found.start(), replaced) for found in MARKED.finditer(prompt)}
        mask = plain(inputs["attention_mask"][i]) if "attention_mask" in inputs else [1] * len(offsets)
        dropped = {position for position, (start, end) in enumerate(offsets) if end == start + 1 and start in marks}
        yield [position for position, is_text in enumerate(mask) if is_text and position not in dropped]


def shifted(char: int, replaced: list[dict]) -> int:
    """Where a character of a prompt is when its videos have their tokens. `replaced` is what transformers tells of
    each `<video>` that it replaced."""
    gains = (v["new_span"][1] - v["span"][1] for v in replaced if v["span"][1] <= char)
    return char + max(gains, default=0)
