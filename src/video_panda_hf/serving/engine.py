"""Reads the videos of requests and generates answers, in threads, so that no request waits for another's video."""

import asyncio
import copy
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers import StoppingCriteriaList

from video_panda_hf.decoding import VideoDecodeError, VideoLimitError
from video_panda_hf.modeling import context_length
from video_panda_hf.session import StopWhenSet

from .answers import AnswerText
from .errors import RequestError, too_large
from .media import Media, open_media
from .network import Download
from .requests import ChatRequest
from .settings import ServerSettings


logger = logging.getLogger(__name__)
COLDEST = 1e-5  # at lower temperatures the likeliest token is taken: divided by them, scores would be infinite
STOPPED = RequestError(503, "the request was stopped.", code="stopped")


@dataclass
class Answer:
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class Engine:
    """
    The model behind a server.

    Downloads have enough threads that none waits for another. `settings.decoding_threads` decode, each with a copy
    of the processor, because a tokenizer must not be used by two threads. One thread generates.
    """

    def __init__(self, model, processor, settings: ServerSettings):
        self.model, self.processor, self.settings = model.eval(), processor, settings
        self.context = context_length(model.config.get_text_config())
        self.own = threading.local()

        def copy_processor():
            self.own.processor = copy.deepcopy(processor)

        self.fetching = ThreadPoolExecutor(settings.max_requests * max(1, settings.max_media), "fetch")
        self.decoding = ThreadPoolExecutor(settings.decoding_threads, "decode", copy_processor)
        self.generating = ThreadPoolExecutor(1, "generate")
        self.jobs: set[Job] = set()
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True
        for job in list(self.jobs):
            job.stop()
            if job.leaving is not None:
                job.leaving.cancel()  # what is decoded cannot be ended, and is not waited for
        for pool in (self.fetching, self.decoding, self.generating):
            pool.shutdown(wait=False, cancel_futures=True)

    # In a thread of `decoding`

    def prepare(self, asked: ChatRequest, opened: list):
        """The inputs of the model for a request whose videos and pictures are open."""
        frames = frames_of(asked, self.settings, self.own.processor.video_processor)
        parts = iter(zip(opened, frames, strict=True))
        try:
            inputs = self.own.processor.apply_chat_template(
                [message_of(message, parts) for message in asked.messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=self.settings.processor_settings(len(opened)),
            )
        except VideoLimitError as error:
            raise RequestError(413, str(error), "messages", "too_large") from error
        except VideoDecodeError as error:
            raise RequestError(400, str(error), "messages", "unreadable_media") from error
        except (ValueError, TemplateError) as error:
            raise RequestError(400, str(error), "messages") from error
        except MemoryError as error:
            raise RequestError(413, "the videos need more memory than there is.", "messages", "too_large") from error
        except Exception as error:  # a fault of a decoder of ours or others; the request is what brought it about
            logger.exception("a request could not be prepared")
            message = f"the videos or pictures cannot be read ({type(error).__name__})."
            raise RequestError(400, message, "messages", "unreadable_media") from error
        length = inputs["input_ids"].shape[1]
        if self.context is not None and length >= self.context:
            message = f"the prompt has {length} tokens, and the model's context {self.context}. Ask for fewer frames."
            raise RequestError(400, message, "messages", "context_length_exceeded")
        return inputs

    # In the thread of `generating`

    def generate(self, asked: ChatRequest, inputs, send: Callable[[str], None], done: threading.Event) -> Answer:
        """Generates one answer. `send` gets its text piece by piece; it ends early once `done` is set."""
        length = inputs["input_ids"].shape[1]
        longest = asked.max_tokens or self.settings.max_new_tokens
        if self.context is not None:
            longest = min(longest, self.context - length)
        text = AnswerText(self.processor.decode, asked.stops, send, done)
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=asked.seed is not None):
            if asked.seed is not None:
                torch.manual_seed(asked.seed)
            self.model.generate(
                **inputs.to(device),
                max_new_tokens=longest,
                num_beams=1,
                streamer=text,
                stopping_criteria=StoppingCriteriaList([StopWhenSet(done)]),
                **sampling_of(asked),
            )
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        is_cut = len(text.ids) >= longest and not text.stopped and text.ids[-1] not in ends
        return Answer(text.text, "length" if is_cut else "stop", length, len(text.ids))


class Job:
    """One request on its way through an engine. `stop()` ends what it still does."""

    def __init__(self, engine: Engine, asked: ChatRequest):
        self.engine, self.asked = engine, asked
        self.done, self.is_stopped = threading.Event(), False  # the former also at a stop of the answer
        self.downloads: list[Download] = []
        self.running: dict[Future, asyncio.Future] = {}
        self.closing = ExitStack()
        self.leaving: asyncio.Future | None = None  # is done when the client has gone away
        engine.jobs.add(self)

    async def prepare(self):
        """The inputs of the model: opens, fetches and decodes what the request names."""
        opened = await self._run(self.engine.fetching, self._open)
        self.downloads = [media for media in opened if isinstance(media, Download)]
        for download in self.downloads:
            download.together = self.downloads
        fetched = [self._run(self.engine.fetching, self._fetch, download) for download in self.downloads]
        files = iter(await asyncio.gather(*fetched))
        opened = [next(files) if isinstance(media, Download) else media for media in opened]
        inputs = await self._run(self.engine.decoding, self.engine.prepare, self.asked, opened)
        self.closing.close()
        self.asked.messages.clear()  # a long answer need not keep its videos
        return inputs

    def _open(self) -> list:
        opened = []
        for part in self.asked.media:
            media = open_media(part.url, self.engine.settings)
            if isinstance(media, Media):
                self.closing.callback(media.close)
            opened.append(media)
        return opened

    def _fetch(self, download: Download) -> Media:
        media = Media(download.run(), download.url)
        self.closing.callback(media.close)
        return media

    async def generate(self, inputs, send: Callable[[str], None]) -> Answer:
        """The answer. `send` gets its text piece by piece, in the thread of the event loop."""
        loop = asyncio.get_running_loop()

        def from_thread(text: str) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server was told to stop at once
                loop.call_soon_threadsafe(send, text)

        work = self.engine.generate
        answer = await self._run(self.engine.generating, work, self.asked, inputs, from_thread, self.done)
        if self.is_stopped:
            raise STOPPED
        return answer

    async def _run(self, pool: ThreadPoolExecutor, work: Callable, *arguments):
        if self.is_stopped:
            raise STOPPED
        try:
            future = pool.submit(work, *arguments)
        except RuntimeError:  # the server is ending
            raise STOPPED from None
        self.running[future] = asyncio.wrap_future(future)
        self.running[future].add_done_callback(take_error)
        try:
            return await asyncio.shield(self.running[future])
        except asyncio.CancelledError:
            if future.cancelled():  # by `stop`, before a thread took it
                raise STOPPED from None
            raise

    def stop(self) -> None:
        """Begins nothing more, and ends downloads and generation."""
        self.is_stopped = True
        self.done.set()
        for download in self.downloads:
            download.stop()
        for future in self.running:
            future.cancel()

    async def close(self) -> None:
        """Stops, and waits until no thread works on the request any more, unless the whole server ends."""
        self.stop()
        if not self.engine.is_closed:
            await asyncio.gather(*self.running.values(), return_exceptions=True)
            self.closing.close()
        self.engine.jobs.discard(self)


def take_error(ended: asyncio.Future) -> None:
    """Asks for the error of what has ended, which is logged otherwise where nobody waits for it any more."""
    if not ended.cancelled():
        ended.exception()


def frames_of(asked: ChatRequest, settings: ServerSettings, video_processor) -> list[dict]:
    """For each video and picture of a request, its frame settings, all together within `max_frames`."""
    clip, chosen, counts, open_ended = video_processor.frames_per_clip, [], [], []
    for part in asked.media:
        if part.type.startswith("image"):
            chosen.append({})
            counts.append(1)
            continue
        own, given = part.frames, asked.mm_processor_kwargs.frames
        if "num_frames" in own:
            given = {}
        elif "fps" in own:
            given.pop("num_frames", None)
        given |= own
        chosen.append(given)
        if "num_frames" in given or ("fps" not in given and video_processor.fps is None):
            counts.append(given.get("num_frames") or video_processor.num_frames)
        elif "max_frames" in given:
            counts.append(given["max_frames"])
        else:
            counts.append(clip)
            open_ended.append(given)
    if sum(counts) > settings.max_frames:
        raise too_large("the number of frames of all its videos", sum(counts), settings.max_frames, "messages")
    for given in open_ended:
        share = clip + (settings.max_frames - sum(counts)) // len(open_ended) // clip * clip
        given["max_frames"] = min(share, video_processor.max_frames or share)
    return chosen


def message_of(message, parts) -> dict:
    """A message for the chat template."""
    role = "system" if message.role == "developer" else message.role
    if all(part.type == "text" for part in message.content) and len(message.content) == 1:
        return {"role": role, "content": message.content[0].text}
    content = []
    for part in message.content:
        if part.type == "text":
            content.append({"type": "text", "text": part.text})
        else:
            kind = part.type.removesuffix("_url")
            media, frames = next(parts)
            content.append({"type": kind, kind: media, **frames})
    return {"role": role, "content": content}


def sampling_of(asked: ChatRequest) -> dict:
    """Options of `generate`; those of the checkpoint where a request says nothing."""
    if asked.temperature is not None and asked.temperature < COLDEST:
        return {"do_sample": False}
    if asked.temperature is None and asked.top_p in (None, 1):
        return {}
    return {
        "do_sample": True,
        "temperature": 1.0 if asked.temperature is None else float(asked.temperature),
        "top_p": 1.0 if asked.top_p is None else float(asked.top_p),
    }
