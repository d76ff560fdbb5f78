"""Which tokens of a prompt are answers, with whatever chat template, for training."""

import re

from transformers import BatchFeature
from transformers.utils.chat_template_utils import render_jinja_template

from .literals import WITH_OFFSETS, shifted


GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
ANSWER_MARK = "\ue000"  # a private-use character that stands for an answer in `spans_by_marks`


def with_mask(make, conversation, template: str, tokenizer, processor_kwargs: dict, kwargs: dict) -> BatchFeature:
    """
    The inputs of conversations with `assistant_masks`.

    transformers finds answers by their position in the prompt. Version 5.16 ignores that the tokens of videos shift
    it, and later versions need `{% generation %}`. This works with all of them.

    Args:
        make (`Callable`):
            Makes the inputs, given `processor_kwargs`.
        conversation (`list[dict]` or `list[list[dict]]`):
            The messages, or a list of conversations.
        template (`str`):
            The chat template.
        tokenizer (`PreTrainedTokenizerBase`):
            Names the special tokens.
        processor_kwargs (`dict`):
            Settings of the processor.
        kwargs (`dict`):
            Variables of the template, and `return_tensors`.

    Raises:
        ValueError: for `continue_final_message`, or for a template that has no `{% generation %}` and alters the
            answers.
    """
    if kwargs.get("continue_final_message"):
        raise ValueError("continue_final_message is not compatible with return_assistant_tokens_mask.")
    inputs = make(processor_kwargs={**processor_kwargs, **WITH_OFFSETS})
    is_batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "content")
    found = masks(inputs, conversation if is_batched else [conversation], template, tokenizer, kwargs)
    tensor_type = processor_kwargs.get("return_tensors") or kwargs.get("return_tensors")
    inputs.update(BatchFeature({"assistant_masks": found}, None if tensor_type == "auto" else tensor_type))
    return inputs


def masks(inputs, conversations: list, template: str, tokenizer, kwargs: dict) -> list[list[int]]:
    """For each conversation, 1 for the tokens of its answers and their end, and 0 for all else. Takes the offsets out
    of the inputs."""
    special = "(?:" + "|".join(map(re.escape, tokenizer.all_special_tokens)) + ")"
    names = [name for name in kwargs if name != "return_tensors"]
    given = {**tokenizer.special_tokens_map, **{name: kwargs[name] for name in names}}

    def render(conversations, **options):
        return render_jinja_template(conversations=conversations, chat_template=template, **given, **options)

    if GENERATION_TAG.search(template):
        prompts, found = render(conversations, return_assistant_tokens_mask=True)
        spans = [
            [(start, end_of_answer(prompt, start, end, special)) for start, end in of_prompt]
            for prompt, of_prompt in zip(prompts, found, strict=True)
        ]
    else:
        spans = [spans_by_marks(messages, lambda c: render([c])[0][0], special) for messages in conversations]
    offsets, replaced = inputs.pop("offset_mapping"), inputs.pop("text_replacement_offsets")
    return [answer_mask(*row) for row in zip(offsets, replaced, spans, strict=True)]


def end_of_answer(prompt: str, start: int, end: int, special: str) -> int:
    """The answer's end with the special token by which a model learns to stop, if that is what follows."""
    if re.search(rf"{special}\s*$", prompt[start:end]):
        return end
    found = re.compile(rf"\s*{special}").match(prompt, end)
    return found.end() if found else end


def spans_by_marks(conversation: list, render, special: str) -> list[tuple[int, int]]:
    """
    Renders the conversation with a mark in place of every answer: the text between marks comes from the template.
    A span includes the special token after the answer, from which a model learns to stop.
    """
    answers = [content_text(message) for message in conversation if message["role"] == "assistant"]
    marked = [{**m, "content": ANSWER_MARK} if m["role"] == "assistant" else m for m in conversation]
    between = render(marked).split(ANSWER_MARK)
    end_token = re.compile(rf"\s*{special}")
    prompt = render(conversation)
    ends = [end_token.match(after) for after in between[1:]]
    for texts in (answers, [answer.strip() for answer in answers]):
        if len(ends) != len(texts) or not all(ends):
            break
        starts, rebuilt = [], between[0]
        for text, after in zip(texts, between[1:], strict=True):
            starts.append(len(rebuilt))
            rebuilt += text + after
        if rebuilt == prompt:
            lengths = [len(text) + end.end() for text, end in zip(texts, ends, strict=True) if end]
            return [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    raise ValueError(
        "the chat template has no {% generation %} and alters the answers or has no special token after them, so "
        "that their tokens cannot be told: mark them in the template, or pass `chat_template=CHAT_TEMPLATE`"
    )


def content_text(message: dict) -> str:
    content = message.get("content")
    if content is None:
        raise ValueError("an assistant's message without content has no tokens to mask")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def answer_mask(offsets, replaced: list[dict], spans: list[tuple[int, int]]) -> list[int]:
    """
    1 for every token that overlaps one of the spans.

    Args:
        offsets (`list[tuple[int, int]]`):
            (start, end) of every token, in characters of the prompt with the videos' tokens.
        replaced (`list[dict]`):
            What transformers tells of each `<video>` that it replaced.
        spans (`list[tuple[int, int]]`):
            (start, end) of the answers, in characters of the prompt before that.
    """
    spans = [(shifted(start, replaced), shifted(end, replaced)) for start, end in spans]
    return [int(any(start < s_end and end > s_start for s_start, s_end in spans)) for start, end in offsets]
