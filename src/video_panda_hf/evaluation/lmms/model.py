"""The model as lmms-eval runs it: requests of its chat tasks → answers of `generate`."""

import json
import logging
import os

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..predict import check_sampling


logger = logging.getLogger(__name__)


class VideoPanda(lmms):
    r"""
    Video-Panda for lmms-eval. The frames of a video are those that the processor takes of it.

    Args:
        pretrained (`str`):
            A folder or a name on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        device (`str`, *optional*):
            Where it runs. By default the GPU of this process, if there is one. Several processes take a GPU each.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Its precision; by default the checkpoint's.
        batch_size (`int`, *optional*, defaults to 1), max_batch_size (`int`, *optional*):
            Requests that are answered at a time. The second one is not used.
        num_frames (`int`, *optional*), fps (`float`, *optional*), max_frames (`int`, *optional*):
            The frames of a video, as the processor takes them. Defaults to the processor's own, 8 frames.
        max_new_tokens (`int`, *optional*, defaults to 1024):
            The longest answer, where a task does not say it.
        system_prompt (`str`, *optional*):
            A system message, or a file with one.

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
        max_batch_size: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        max_new_tokens: int = 1024,
        system_prompt: str | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` is a number from 1, not {batch_size!r}")
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        self.processor = AutoProcessor.from_pretrained(pretrained, revision=revision)
        sampling = {"num_frames": num_frames, "fps": fps, "max_frames": max_frames}
        check_sampling(self.processor.video_processor, sampling)
        self.sampling = {name: value for name, value in sampling.items() if value is not None}
        self.device = device_of_process(device)
        model = AutoModelForImageTextToText.from_pretrained(pretrained, revision=revision, dtype=dtype)
        self.model = model.to(self.device).eval()

    def generate_until(self, requests) -> list[str]:
        """The answers of `generate`. What cannot be read as a video is answered by nothing, with a warning."""
        answers: dict[int, str] = {}
        groups: dict[str, list] = {}  # of the same settings
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append((number, request.args))
        with tqdm(total=len(requests), desc="requests", disable=self.rank != 0) as progress:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    given = self.answered([self.conversation(*args) for _, args in batch], batch[0][1][2])
                    for (number, (context, _, settings, *_)), answer in zip(batch, given, strict=True):
                        answers[number] = answer
                        self.cache_hook.add_partial("generate_until", (context, settings), answer)
                    progress.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def conversation(self, context, doc_to_messages, settings, doc_id, task, split) -> list[dict]:
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        messages = self._apply_system_prompt(messages, self.system_prompt)
        return ChatMessages(messages=messages).to_hf_messages()

    def answered(self, conversations: list[list[dict]], settings: dict) -> list[str]:
        try:
            inputs = self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                padding=True,
                return_tensors="pt",
                processor_kwargs=self.sampling,
            )
        except (OSError, ValueError) as error:
            if len(conversations) > 1:  # the others are answered
                return [answer for one in conversations for answer in self.answered([one], settings)]
            logger.warning("no answer, which counts as a wrong one: %s", error)
            return [""]
        output = self.model.generate(**inputs.to(self.device), **self.generation(settings))
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [until(text.strip(), settings.get("until")) for text in texts]

    def generation(self, settings: dict) -> dict:
        """The arguments of `generate`. A temperature of 0, or none, is greedy."""
        found = {name: settings.get(name) for name in ("temperature", "top_p", "top_k")}
        is_sampled = (found["temperature"] or 0) > 0 and settings.get("do_sample") is not False
        found = {name: value for name, value in found.items() if is_sampled and value is not None}
        longest = settings.get("max_new_tokens") or self.max_new_tokens
        return {"max_new_tokens": longest, "num_beams": settings.get("num_beams") or 1, "do_sample": is_sampled, **found}

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("Video-Panda answers tasks of one round: output_type generate_until")

    def loglikelihood(self, requests):
        raise NotImplementedError("for choices by likelihood, take `video-panda eval predict --choice likelihood`")


def device_of_process(device: str | None) -> torch.device:
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    several = found.type == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if several else found


def until(text: str, ends: str | list[str] | None) -> str:
    """A text up to the first of the strings that end it."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        text = text.partition(end)[0] if end else text
    return text
