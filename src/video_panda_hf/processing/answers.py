"""Which tokens of a conversation are its answers: what a model is trained on."""

import re

from transformers.utils.chat_template_utils import render_jinja_template


GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
ANSWER_MARK = "\ue000"  # a private-use character that stands for an answer in `spans_by_marks`


def assistant_masks(tokenizer, conversations, template: str, variables: dict, offsets, replaced) -> list[list[int]]:
    """
    For each conversation, 1 for the tokens of its answers and 0 for all others.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The language model's tokenizer.
        conversations (`list[list[dict]]`):
            The conversations, whose prompts are tokenized already.
        template (`str`):
            The chat template.
        variables (`dict`):
            Further variables of the template.
        offsets (`list[list[tuple[int, int]]]`):
            (start, end) of every token of each prompt, in characters of the prompt with the videos' tokens.
        replaced (`list[list[dict]]`):
            What transformers tells of each `<video>` that it replaced.

    Raises:
        ValueError: if the template has no `{% generation %}` and alters the answers.
    """
    spans = answer_spans(tokenizer, conversations, template, variables)
    return [mask_of(*found) for found in zip(offsets, replaced, spans, strict=True)]


def answer_spans(tokenizer, conversations, template: str, variables: dict) -> list[list[tuple[int, int]]]:
    """For each conversation, the (start, end) characters of its answers in the rendered prompt."""
    special_token = "(?:" + "|".join(map(re.escape, tokenizer.all_special_tokens)) + ")"
    given = {name: value for name, value in variables.items() if name != "return_tensors"}
    given = {**tokenizer.special_tokens_map, **given}

    def render(conversations, **options):
        return render_jinja_template(conversations=conversations, chat_template=template, **given, **options)

    if GENERATION_TAG.search(template):
        prompts, spans = render(conversations, return_assistant_tokens_mask=True)
        return [
            [(start, end_of_answer(prompt, start, end, special_token)) for start, end in of_prompt]
            for prompt, of_prompt in zip(prompts, spans, strict=True)
        ]
    return [spans_by_marks(conversation, lambda c: render([c])[0][0], special_token) for conversation in conversations]


def end_of_answer(prompt: str, start: int, end: int, special_token: str) -> int:
    """The answer's end with the special token by which a model learns to stop, if that is what follows."""
    if re.search(rf"{special_token}\s*$", prompt[start:end]):
        return end
    found = re.compile(rf"\s*{special_token}").match(prompt, end)
    return found.end() if found else end


def spans_by_marks(conversation, render, special_token: str) -> list[tuple[int, int]]:
    """
    Renders the conversation with a mark in place of every answer: the text between marks comes from the template. A
    span includes the special token after the answer, from which a model learns to stop.
    """
    answers = [content_text(message) for message in conversation if message["role"] == "assistant"]
    marked = [{**m, "content": ANSWER_MARK} if m["role"] == "assistant" else m for m in conversation]
    between = render(marked).split(ANSWER_MARK)
    end_token = re.compile(rf"\s*{special_token}")
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


def mask_of(offsets, replaced: list[dict], spans: list[tuple[int, int]]) -> list[int]:
    """1 for every token that overlaps one of the spans, given in characters before videos were `replaced`."""
    gains = [(video["span"][1], video["new_span"][1] - video["span"][1]) for video in replaced]

    def shifted(char: int) -> int:
        return char + max((gain for end, gain in gains if end <= char), default=0)

    spans = [(shifted(start), shifted(end)) for start, end in spans]
    return [int(any(start < s_end and end > s_start for s_start, s_end in spans)) for start, end in offsets]
