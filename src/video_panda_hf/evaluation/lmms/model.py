"""The model as lmms-eval runs it: requests of its chat tasks → answers of `generate`."""

import logging
import os
from itertools import groupby

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..predict import check_sampling


LONGEST_ANSWER = 1024  # tokens, where a task does not say it
TO_TENSORS = dict.fromkeys(("add_generation_prompt", "tokenize", "return_dict", "padding"), True)
TO_TENSORS |= {"return_tensors": "pt"}
logger = logging.getLogger(__name__)


class VideoPanda(lmms):
    r"""
    Video-Panda for lmms-eval. The frames of a video are those that the processor takes of it.

    Args:
        pretrained (`str`), revision (`str`, *optional*):
            A folder, or a name on the Hub and its branch, tag or commit.
        device (`str`, *optional*):
            Where it runs. By default the GPU of this process, if there is one. Several processes take a GPU each.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Its precision; by default the checkpoint's.
        batch_size (`int`, *optional*, defaults to 1):
            Requests that are answered at a time.
        num_frames (`int`, *optional*), fps (`float`, *optional*), max_frames (`int`, *optional*):
            The frames of a video, as the processor takes them. Defaults to the processor's own, 8 frames.
        system_prompt (`str`, *optional*):
            A system message, in place of the task's.

    Raises:
        ValueError: for frames that no video can have, or a batch size that is not a number.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        system_prompt: str | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` is a number from 1, not {batch_size!r}")
        self.batch_size, self.system_prompt = int(batch_size), system_prompt
        self.processor = AutoProcessor.from_pretrained(pretrained, revision=revision)
        sampling = {"num_frames": num_frames, "fps": fps, "max_frames": max_frames}
        check_sampling(self.processor.video_processor, sampling)
        self.sampling = {name: value for name, value in sampling.items() if value is not None}
        self.device = device_of_process(device)
        model = AutoModelForImageTextToText.from_pretrained(pretrained, revision=revision, dtype=dtype)
        self.model = model.to(self.device).eval()

    def generate_until(self, requests) -> list[str]:
        """The answers of `generate`. What cannot be read as a video is answered by nothing, with a warning."""
        answers: list[str] = []
        with tqdm(total=len(requests), desc="requests", disable=self.rank != 0) as progress:
            for settings, same in groupby(requests, lambda request: request.args[2]):
                waiting = list(same)
                while waiting:
                    batch, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
                    given = self.answered([self.conversation(*request.args) for request in batch], settings)
                    for request, answer in zip(batch, given, strict=True):
                        self.cache_hook.add_partial("generate_until", (request.args[0], settings), answer)
                    answers += given
                    progress.update(len(batch))
        return answers

    def conversation(self, context, doc_to_messages, settings, doc_id, task, split) -> list[dict]:
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()
        messages = [{**message, "content": [as_ours(part) for part in message["content"]]} for message in messages]
        if self.system_prompt is None:
            return messages
        system = {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}
        return [system, *(message for message in messages if message["role"] != "system")]

    def answered(self, conversations: list[list[dict]], settings: dict) -> list[str]:
        try:
            inputs = self.processor.apply_chat_template(conversations, processor_kwargs=self.sampling, **TO_TENSORS)
        except (OSError, ValueError) as error:
            if len(conversations) > 1:  # the others are answered
                return [answer for one in conversations for answer in self.answered([one], settings)]
            logger.warning("no answer, which counts as a wrong one: %s", error)
            return [""]
        output = self.model.generate(**inputs.to(self.device), **self.generation(settings))
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [until(text.strip(), settings.get("until") or ()) for text in texts]

    def generation(self, settings: dict) -> dict:
        """The arguments of `generate`. A temperature of 0, or none, is greedy."""
        found = {name: settings.get(name) for name in ("temperature", "top_p", "top_k")}
        is_sampled = (found["temperature"] or 0) > 0 and settings.get("do_sample") is not False
        found = {name: value for name, value in found.items() if is_sampled and value is not None}
        found |= {"max_new_tokens": settings.get("max_new_tokens") or LONGEST_ANSWER}
        return {**found, "num_beams": settings.get("num_beams") or 1, "do_sample": is_sampled}

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("Video-Panda answers tasks of one round: output_type generate_until")

    def loglikelihood(self, requests):
        raise NotImplementedError("for choices by likelihood, take `video-panda eval predict --choice likelihood`")


def device_of_process(device: str | None) -> torch.device:
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    several = found.type == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if several else found


def as_ours(part: dict) -> dict:
    """A part of a message as the processor takes it: to lmms-eval, every .gif is a picture and every .webm a sound."""
    source = part.get(part["type"])
    if isinstance(source, str) and source.lower().endswith((".gif", ".webm")):
        return {"type": "video", "video": source}
    if part["type"] == "video" and isinstance(source, dict):
        times = {name: source[name] for name in ("video_start", "video_end") if source.get(name) is not None}
        video = next((source[name] for name in ("video", "url", "path") if name in source), source)
        return {"type": "video", "video": video, **times}
    return part


def until(text: str, ends: str | list[str]) -> str:
    """A text up to the first of the strings that end it."""
    for end in filter(None, [ends] if isinstance(ends, str) else ends):
        text = text.partition(end)[0]
    return text
