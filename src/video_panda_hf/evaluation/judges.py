"""The judges: exact comparison, an OpenAI-compatible endpoint, or a language model of `transformers`."""

import email.utils
import os
import random
import threading
import time
from dataclasses import dataclass

from .replies import Item, Prompts, is_same, read_reply


ASKED_AGAIN = 3  # times, after a reply that cannot be read
OPENAI_REQUEST = {"temperature": 0, "seed": 0, "max_tokens": 300}


class JudgeError(Exception):
    """The judge gave no reply. What it was asked is left for the next run."""

    def __init__(self, message: str, is_final: bool = False):
        super().__init__(message)
        self.is_final = is_final  # the next question would not fare better


class OutOfCalls(Exception):
    """No call is left, or the run ends."""


@dataclass
class Reply:
    text: str
    model: str
    tokens: tuple[int, int] = (0, 0)


class Judge:
    """
    Gives verdicts. A subclass has `verdict`.

    Args:
        name (`str`):
            What its file is called.
        settings (`dict`):
            How it is asked, besides the prompt.
        concurrency (`int`):
            Questions that it is asked at a time.
    """

    needs_prompts = False

    def __init__(self, name: str, settings: dict, concurrency: int = 1):
        self.name, self.settings, self.concurrency = name, settings, concurrency
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self.begin(None)

    def begin(self, max_calls: int | None) -> None:
        self.max_calls, self.calls, self.tokens = max_calls, 0, [0, 0]
        self.stopped.clear()

    def count_call(self) -> None:
        with self._lock:
            if self.stopped.is_set() or (self.max_calls is not None and self.calls >= self.max_calls):
                raise OutOfCalls
            self.calls += 1

    def count_tokens(self, tokens: tuple[int, int]) -> None:
        with self._lock:
            self.tokens = [sum(pair) for pair in zip(self.tokens, tokens, strict=True)]


class ExactJudge(Judge):
    """
    Compares words: an answer is right if it is the correct one, or has it in it. Gives no scores.

    Args:
        whole (`bool`, *optional*, defaults to `False`):
            Whether an answer is right only if it has no other words.
    """

    def __init__(self, whole: bool = False):
        super().__init__("match" if whole else "exact", {})

    def verdict(self, item: Item, prompts: None) -> dict:
        is_match, is_right = is_same(item.answer, item.prediction)
        return {"correct": is_match if self.name == "match" else is_right, "match": is_match, "model": self.name}


class ChatJudge(Judge):
    """A judge that is asked in words. A subclass has `reply`."""

    needs_prompts = True

    def verdict(self, item: Item, prompts: Prompts) -> dict:
        """
        Raises:
            JudgeError: if there is no reply.
            OutOfCalls: if there may be no further call.
        """
        replies: list[Reply] = []
        read = None
        while read is None and len(replies) <= ASKED_AGAIN:
            replies.append(self.reply(prompts.messages(item, again=bool(replies))))
            read = read_reply(replies[-1].text, item.aspect)
        told = {"model": replies[-1].model, "replies": [reply.text for reply in replies]}
        tokens = [sum(reply.tokens[place] for reply in replies) for place in (0, 1)]
        return {**(read or {"unparsed": True}), **told, "tokens": tokens}

    def reply(self, messages: list[dict]) -> Reply:
        raise NotImplementedError


class OpenAIJudge(ChatJudge):
    """
    A model behind an OpenAI-compatible endpoint, asked through the package `openai`.

    Args:
        model (`str`):
            The model's name there.
        base_url (`str`, *optional*):
            The endpoint. Defaults to OpenAI's, or the environment's `OPENAI_BASE_URL`. The key is that of
            `OPENAI_API_KEY`.
        concurrency (`int`, *optional*, defaults to 8):
            Requests at a time.
        retries (`int`, *optional*, defaults to 6):
            How often a request is sent again that failed: too many requests, errors of the server or the network.
        first_wait (`float`, *optional*, defaults to 1.0):
            Seconds before the first retry. Each further one waits twice as long, or as `Retry-After` says.
        timeout (`float`, *optional*, defaults to 60.0):
            Seconds until a request has failed.
        options (`dict`, *optional*):
            Fields of the request, besides or instead of temperature 0, seed 0 and `max_tokens`. `None` leaves one out.

    Raises:
        ValueError: without the package `openai`, or without a key for OpenAI's endpoint.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        concurrency: int = 8,
        retries: int = 6,
        first_wait: float = 1.0,
        timeout: float = 60.0,
        options: dict | None = None,
    ):
        try:
            import openai
        except ImportError:
            raise ValueError('this judge needs the package openai: pip install "video-panda-hf[eval]"') from None
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY") or (base_url and "none")
        if not key:
            raise ValueError("set OPENAI_API_KEY in the environment, or give the endpoint by `base_url`")
        request = {**OPENAI_REQUEST, **(options or {})}
        super().__init__(
            f"openai-{model}", {key: value for key, value in request.items() if value is not None}, concurrency
        )
        self.openai, self.model, self.retries, self.first_wait = openai, model, retries, first_wait
        self.client = openai.OpenAI(api_key=key, base_url=base_url, max_retries=0, timeout=timeout)

    def reply(self, messages: list[dict]) -> Reply:
        for attempt in range(self.retries + 1):
            self.count_call()
            wait = self.first_wait * 2**attempt * random.uniform(0.75, 1.25)
            try:
                completion = self.client.chat.completions.create(
                    model=self.model, messages=messages, extra_body=self.settings
                )
                return self.reply_of(completion)
            except self.openai.APIStatusError as error:
                problem = f"{error.status_code}: {error.message}"
                if "content_filter" in (error.code, error.type):  # it refuses this question
                    return Reply(problem, self.model)
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    raise JudgeError(problem, is_final=error.status_code in (401, 403, 404)) from error
                told = seconds_of(error.response.headers.get("retry-after"))
                wait = wait if told is None else told
            except (self.openai.APIError, ValueError) as error:  # the network, or an answer that is no completion
                problem = str(error) or type(error).__name__
            if attempt < self.retries:
                self.stopped.wait(wait)
        raise JudgeError(f"no reply after {self.retries + 1} requests: {problem}")

    def reply_of(self, completion) -> Reply:
        """Raises `ValueError` for what is no completion."""
        choices = getattr(completion, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise ValueError(f"not a chat completion: {str(completion)[:200]}")
        message, usage = choices[0].message, getattr(completion, "usage", None)
        tokens = tuple(getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens"))
        self.count_tokens(tokens)
        text = message.content or getattr(message, "refusal", None) or ""
        return Reply(text if isinstance(text, str) else str(text), completion.model or self.model, tokens)


class LocalJudge(ChatJudge):
    """
    A causal language model of `transformers`, greedy.

    Args:
        model (`PreTrainedModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer. System message and question are one message, as some chat templates know no other.
        name (`str`):
            What the model is called in files and reports.
        max_new_tokens (`int`, *optional*, defaults to 300):
            The longest reply.
    """

    def __init__(self, model, tokenizer, name: str, max_new_tokens: int = 300):
        super().__init__(f"local-{name}", {"max_new_tokens": max_new_tokens})
        self.model, self.tokenizer, self.model_name = model.eval(), tokenizer, name

    def reply(self, messages: list[dict]) -> Reply:
        self.count_call()
        text = "\n\n".join(message["content"] for message in messages)
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            inputs = self.tokenizer.apply_chat_template(chat, **how)
        else:
            inputs = self.tokenizer(text + "\n", return_tensors="pt")
        inputs = {key: inputs[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        length = inputs["input_ids"].shape[1]
        output = self.model.generate(**inputs, do_sample=False, num_beams=1, **self.settings)[0, length:]
        tokens = (length, len(output))
        self.count_tokens(tokens)
        return Reply(self.tokenizer.decode(output, skip_special_tokens=True), self.model_name, tokens)


def seconds_of(retry_after: str | None) -> float | None:
    """The seconds that a header `Retry-After` tells to wait: a number, or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
