"""`VideoPandaSession`: a video is encoded while it comes in, and questions about it are answered at any time."""

import copy
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from video_panda_hf.processing import opened_file, rgb_frames

from .cache import branch_of, cache_of, new_cache
from .encoding import FRAMES_AT_ONCE, encode
from .file import read_session, write_session
from .prompt import (
    VIDEO,
    Prompt,
    Video,
    check_template,
    ids_of_frame,
    ids_of_time,
    is_of_video,
    text_part,
    write_prompts,
)
from .sampling import FrameSampler


# transformers renamed the cache in 5.24.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
CLIPS_AT_ONCE = 8  # clips that are encoded and put into the cache by one call
TAKEN_OPTIONS = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values"}
TAKEN_OPTIONS |= {"streamer", "num_return_sequences", "return_dict_in_generate", "cache_implementation", "use_cache"}


class VideoPandaSession:
    r"""
    Watches a video as it comes in, and answers questions about it at any time.

    The model encodes clips of a few frames independently of each other. So a clip is encoded as soon as its frames are
    there, and its tokens stay in a key-value cache. A question is added behind them, answered, and taken out again.
    The answer is the one that a single prompt with the whole video would get.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model. It is used in evaluation mode.
        processor (`VideoPandaProcessor`):
            Its processor. Its chat template must put the video before the question.
        fps (`float`, *optional*, defaults to 1.0):
            Frames to take for each second of video: those shown at 0, 1/fps, 2/fps … seconds.
        system (`str`, *optional*):
            A system message.
        timestamps (`bool`, *optional*, defaults to `False`):
            Whether the time (`mm:ss`) stands before the tokens of each clip, also where it is a setting of the
            processor. The released weights have not seen it.
        max_clips (`int`, *optional*):
            Keep only the newest clips in the cache, this many of all videos together. Positions of the others stay as
            they are, so memory is bounded but the answer is an approximation. By default all are kept.

    Raises:
        ValueError: if the chat template puts the question before the video, or the language model has layers without
            a key-value cache.

    Example:

    ```python
    session = VideoPandaSession(model, processor, fps=1.0)
    session.add("clip.mp4", start=0, end=60)
    print(session.ask("What is happening now?"))
    session.add(frames, rate=25.0)
    for text in session.stream("And now?"):
        print(text, end="", flush=True)
    ```
    """

    def __init__(
        self,
        model,
        processor,
        *,
        fps: float = 1.0,
        system: str | None = None,
        max_clips: int | None = None,
        timestamps: bool = False,
    ):
        if not 0 < fps < float("inf"):
            raise ValueError(f"`fps` is a number of frames a second above 0, not {fps}")
        if max_clips is not None and max_clips < 1:
            raise ValueError(f"`max_clips` is a number of clips of at least 1, not {max_clips}")
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
        if others := kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
            raise ValueError(f"the language model has layers without keys and values: {', '.join(sorted(others))}")
        self.model, self.processor = model.eval(), processor
        self.fps, self.system, self.max_clips = float(fps), system, max_clips
        self.timestamps = timestamps or processor.video_processor.timestamps
        self._busy = threading.Lock()
        self.reset()
        check_template(processor, self._messages)

    # What comes in

    @torch.inference_mode()
    def add(self, video, *, rate: float | None = None, start: float | None = None, end: float | None = None) -> int:
        r"""
        Adds the next part of the video. Clips that are complete are encoded at once.

        Args:
            video:
                A file as the processor takes it (path, URL, bytes, file object), or with `rate` frames in memory: a
                picture, an array, a tensor, or a list of them.
            rate (`float`, *optional*):
                Frames a second of frames in memory.
            start (`float`, *optional*), end (`float`, *optional*):
                A part of a file, in seconds.

        Returns:
            `int`: the number of clips that were encoded by this call.

        Raises:
            ValueError: for frames without a rate, of another size than those before, or a part that is not there.
            VideoDecodeError: (a `ValueError`) for a file that cannot be read. What came before its fault stays.
        """
        with self._exclusively():
            if is_in_memory(video):
                if rate is None:
                    raise ValueError("frames in memory need their `rate`, a number of frames a second")
                if start is not None or end is not None:
                    raise ValueError("`start` and `end` choose a part of a file; frames in memory are cut by slicing")
                return self._add_frames(video, rate)
            if rate is not None:
                raise ValueError("`rate` is for frames in memory; a file has its own")
            return self._add_file(video, start, end)

    @torch.inference_mode()
    def add_picture(self, picture) -> None:
        """Adds a picture (a file, a PIL image, an array) and ends the video so far."""
        with self._exclusively():
            fetch = self.processor.video_processor.fetch_videos
            frame = (arrays_of(picture) if is_in_memory(picture) else fetch(picture, lambda _: [0])[0])[0]
            self._finish_video()
            self._new_video(None, frame)
            self._videos[-1].waiting.append(frame)
            self._encode_waiting()

    def add_text(self, text: str) -> None:
        """Adds text and ends the video so far."""
        with self._exclusively():
            self._finish_video()
            self._content.append(text_part(text))

    def next_video(self) -> None:
        """Ends the video so far and completes its last clip. The next one has its own clock."""
        with self._exclusively():
            self._finish_video()

    # Questions

    def ask(self, question: str | list[str], *, remember: bool = False, **generation) -> str | list[str]:
        r"""
        Answers a question about all that was added.

        Args:
            question (`str` or `list[str]`):
                The question. A list is answered together, each question as if it were the only one.
            remember (`bool`, *optional*, defaults to `False`):
                Whether question and answer stay in the conversation. It also ends the video so far.
            generation:
                Options of `generate`: `max_new_tokens`, `do_sample`, …

        Returns:
            `str` or `list[str]`: the answer, or one for each question.

        Raises:
            ValueError: for an option that a session sets itself, or a list of questions with `remember`.
        """
        questions = [question] if isinstance(question, str) else list(question)
        if remember and not isinstance(question, str):
            raise ValueError("`remember` is for one question at a time")
        if not questions:
            return []
        with self._exclusively():
            answers = self._answer(questions, remember, generation)
        return answers[0] if isinstance(question, str) else answers

    def stream(self, question: str, *, remember: bool = False, **generation) -> Iterator[str]:
        """As `ask` for one question, but yields the answer piece by piece. The answer ends where the caller stops."""
        stopped = threading.Event()
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopping = StoppingCriteriaList([*generation.pop("stopping_criteria", []), StopWhenSet(stopped)])
        failure: list[BaseException] = []

        def answer():
            try:
                self._answer([question], remember, {**generation, "stopping_criteria": stopping}, streamer)
            except BaseException as error:
                failure.append(error)
            finally:
                streamer.on_finalized_text("", stream_end=True)

        with self._exclusively():
            thread = threading.Thread(target=answer, daemon=True, name="VideoPandaSession")
            thread.start()
            try:
                begun = False
                for text in streamer:
                    text = text if begun else text.lstrip()
                    if text:
                        begun = True
                        yield text
            finally:
                stopped.set()
                thread.join()
        if failure:
            raise failure[0]

    @torch.inference_mode()
    def logits(self, question: str) -> torch.Tensor:
        """The logits of the answer's first token, `(vocabulary,)`."""
        with self._exclusively(), self._asking([question]) as (prompt,):
            return self._forward(prompt[len(self._cached) :], logits_to_keep=1).logits[0, -1].clone()

    @torch.inference_mode()
    def log_likelihoods(self, question: str, answers: list[str]) -> list[torch.Tensor]:
        r"""
        How likely each of several answers is. The question is put into the cache once, for all of them.

        Args:
            question (`str`):
                The question.
            answers (`list[str]`):
                Possible answers.

        Returns:
            `list[torch.Tensor]`: for each answer the natural logarithms of its tokens' probabilities, float32
            `(tokens,)`, without the special token that ends it.
        """
        if not answers:
            return []
        with self._exclusively(), self._asking([question]) as (prompt,):
            videos = self._videos_completed()
            whole = self._prompts(videos, [question] * len(answers), answers)
            start = min(prompt.shared_with(written) for written in whole)  # tokens may differ where an answer begins
            self._fill_cache(prompt[: start - 1])
            answers = [self._without_end(written.ids[start:]) for written in whole]
            rows = [np.append(prompt.ids[start - 1], answer) for answer in answers]
            longest = max(map(len, rows))
            ids = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
            positions = prompt.positions[start - 1] + np.arange(longest)
            output = self.model(
                input_ids=torch.from_numpy(ids).to(self.model.device),
                position_ids=torch.from_numpy(positions).expand(len(ids), -1).to(self.model.device),
                use_cache=True,
                **{CACHE: branch_of(self._cache)},
            )
            found = output.logits[:, :-1].float().log_softmax(-1).cpu()
        return [row[range(len(answer)), torch.from_numpy(answer)] for row, answer in zip(found, answers, strict=True)]

    def inputs_for(self, question: str) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, `(1, tokens)`, of the whole prompt; without clips that were dropped."""
        with self._exclusively():
            ids = torch.from_numpy(self._prompts(self._videos_completed(), [question])[0].ids)[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    # What there is

    @property
    def seconds(self) -> float:
        """Seconds of video that came in."""
        return float(sum(video.sampler.seconds for video in self._videos if video.sampler))

    @property
    def num_clips(self) -> int:
        """Clips that were encoded, pictures not counted."""
        return sum(video.clips for video in self._videos if video.sampler)

    @property
    def num_tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._cached)

    @property
    def memory_bytes(self) -> int:
        """Memory of the cache and of the frames that wait for the next clip."""
        cache = sum(buffer.nbytes for layer in self._cache.layers for buffer in layer.buffers)
        return cache + sum(frame.nbytes for video in self._videos for frame in video.kept_frames)

    def reset(self) -> None:
        """Forgets all that was added and remembered."""
        with self._exclusively():
            self._cache = new_cache()
            self._cached = Prompt(np.zeros(0, np.int64), np.zeros(0, np.int64))
            self._messages = [] if self.system is None else [{"role": "system", "content": self.system}]
            self._content: list[dict] = []
            self._videos: list[Video] = []
            self._warned = False

    def fork(self) -> "VideoPandaSession":
        """An independent session that has seen and remembered the same. It copies the cache."""
        with self._exclusively():
            other = copy.copy(self)
            other._busy = threading.Lock()
            other._cache = cache_of((layer.keys, layer.values) for layer in self._cache.layers)
            other._messages, other._content = copy.deepcopy(self._messages), copy.deepcopy(self._content)
            other._videos = [video.copy() for video in self._videos]
            return other

    # To and from a file

    def save(self, path: str | os.PathLike) -> None:
        """Writes the session to one file in safetensors' format, which [`~VideoPandaSession.load`] reads."""
        with self._exclusively():
            write_session(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, model, processor) -> "VideoPandaSession":
        r"""
        Reads a session from a file that [`~VideoPandaSession.save`] wrote.

        Args:
            path (`str` or `Path`):
                The file.
            model (`VideoPandaForConditionalGeneration`):
                The model that the session had.
            processor (`VideoPandaProcessor`):
                Its processor.

        Raises:
            ValueError: if it is not a session's file, or one of another model.
        """
        return read_session(cls, path, model, processor)

    # Frames → clips

    def _add_frames(self, frames, rate: float) -> int:
        if not 0 < rate < float("inf"):
            raise ValueError(f"`rate` is a number of frames a second above 0, not {rate}")
        frames = arrays_of(frames)
        seconds = len(frames) / Fraction(rate)
        video = self._current_video(frames[0])
        due = [min(number, len(frames) - 1) for number in video.sampler.due(seconds, Fraction(rate))]
        times = [number / Fraction(rate) for number in due]
        return self._take(video, [frames[number] for number in due], times, seconds)

    def _add_file(self, source, start: float | None, end: float | None) -> int:
        encoded = 0
        with opened_file(self.processor.video_processor, source) as file:
            metadata, name = file.metadata, name_of(source)
            if metadata.fps is None:
                if metadata.total_num_frames == 1:
                    raise ValueError(f"{name} is a picture: use `add_picture`")
                raise ValueError(
                    f"{name} holds pictures, which have no rate: `decode_video` returns them as frames, "
                    "for `add(frames, rate=…)`"
                )
            position, rate = Fraction(start or 0), Fraction(metadata.fps)
            length = metadata.total_num_frames / rate
            last = length if end is None else min(Fraction(end), length)
            if not 0 <= position < last:
                raise ValueError(
                    f"{name} has {float(length):g} seconds, so {start or 0:g} to {float(last):g} is no part"
                )
            while position < last:
                until = min(last, position + FRAMES_AT_ONCE / Fraction(self.fps))
                due = self._current_sampler().due(until - position, rate, position)
                due = [min(number, metadata.total_num_frames - 1) for number in due]
                times = [number / rate - position for number in due]
                frames = file.read(due or [0])  # one shows the size, where none is due
                encoded += self._take(
                    self._current_video(frames[0]), list(frames[: len(due)]), times, until - position
                )
                position = until
        return encoded

    def _take(self, video: Video, frames: list[np.ndarray], times: list[Fraction], seconds: Fraction) -> int:
        """Moves the video on by `seconds` with the frames that were due, at these times from where it was. Returns the
        clips that were encoded."""
        if self.timestamps:
            first = video.sampler.taken + len(video.sampler.unfinished)
            for number, time in enumerate(times, start=first):
                if number % video.clip_size == 0:
                    video.stamps.append(ids_of_time(self.processor, video.sampler.seconds + time))
        # Copies, because a frame that waits must not keep all others in memory.
        video.waiting += video.sampler.take([frame.copy() for frame in frames], seconds)
        return self._encode_waiting()

    def _video_goes_on(self) -> bool:
        return bool(self._videos) and self._videos[-1].sampler is not None and not self._videos[-1].ended

    def _current_sampler(self) -> FrameSampler:
        """That of the video that is coming in, or of a new one."""
        return self._videos[-1].sampler if self._video_goes_on() else FrameSampler(Fraction(self.fps))

    def _current_video(self, frame: np.ndarray) -> Video:
        """The video that is coming in, or a new one. `frame` is one of those that come next."""
        if not self._video_goes_on():
            self._new_video(FrameSampler(Fraction(self.fps)), frame)
        video = self._videos[-1]
        if video.shape != frame.shape:
            (height, width, _), (old_height, old_width, _) = frame.shape, video.shape
            raise ValueError(
                f"frames of {width}×{height} pixels after some of {old_width}×{old_height}: call `next_video()` first"
            )
        return video

    def _new_video(self, sampler: FrameSampler | None, frame: np.ndarray) -> None:
        (grid,) = self._pixels_of([frame])["video_grid_thw"]
        _, rows, columns = (grid // self.processor.video_processor.merge_size).tolist()
        clip_size = self.model.config.vision_config.frames_per_clip if sampler else 1
        self._videos.append(Video(sampler, frame.shape, ids_of_frame(self.processor, rows, columns), clip_size))
        self._content.append(VIDEO)

    def _finish_video(self) -> None:
        """Completes the last clip of the video that is coming in, for good."""
        if self._video_goes_on():
            self._videos = self._videos_completed()
            self._encode_waiting()
            self._videos[-1].ended = True

    def _videos_completed(self) -> list[Video]:
        """The videos as a question sees them."""
        return [*self._videos[:-1], self._videos[-1].completed()] if self._video_goes_on() else self._videos

    # Clips → cache

    def _encode_waiting(self) -> int:
        """Encodes the complete clips of the last video. Returns how many."""
        video, encoded = self._videos[-1], 0
        while count := min(len(video.waiting) // video.clip_size, CLIPS_AT_ONCE):
            frames = count * video.clip_size
            features = encode(self.model, self._pixels_of(video.waiting[:frames]))
            longer = replace(video, clips=video.clips + count, waiting=[])
            self._fill_cache(self._prefix([*self._videos[:-1], longer]), features)
            video.clips, video.waiting = longer.clips, video.waiting[frames:]
            encoded += count
            self._drop_old_clips()
        return encoded

    def _pixels_of(self, frames: list[np.ndarray]):
        return self.processor.video_processor(
            np.stack(frames), do_sample_frames=False, input_data_format="channels_last", return_tensors="pt"
        )

    def _fill_cache(self, prompt: Prompt, features: torch.Tensor | None = None) -> None:
        """Makes the cache hold `prompt`. `features` are those of the placeholders that it does not hold yet."""
        shared = self._shared(prompt)
        self._crop(shared)
        if shared < len(prompt):
            encoded = None if features is None else {"video": BaseModelOutputWithPooling(pooler_output=(features,))}
            self._forward(prompt[shared:], mm_encoder_outputs=encoded, logits_to_keep=1)
            self._cached = prompt
            self._warn_of_length()

    def _forward(self, prompt: Prompt, **kwargs):
        """Runs the model on tokens behind those in the cache. If it fails, the cache is as before."""
        try:
            return self.model(
                input_ids=torch.from_numpy(prompt.ids)[None].to(self.model.device),
                position_ids=torch.from_numpy(prompt.positions)[None].to(self.model.device),
                use_cache=True,
                **{CACHE: self._cache},
                **kwargs,
            )
        except BaseException:
            self._crop(len(self._cached))
            raise

    def _shared(self, prompt: Prompt) -> int:
        """How many tokens of the cache begin `prompt`. Those of videos must be among them."""
        shared = self._cached.shared_with(prompt)
        if is_of_video(self.processor, self._cached.ids[shared:]).any():
            raise ValueError("the chat template changes what is before a video, which is encoded already")
        return shared

    def _crop(self, length: int) -> None:
        """Removes from the cache all but the first `length` tokens."""
        for layer in self._cache.layers:
            layer.crop(length - layer.get_seq_length())
        self._cached = self._cached[:length]

    def _drop_old_clips(self) -> None:
        """Takes the oldest clips out of the cache until it holds `max_clips`."""
        surplus = sum(video.kept_clips for video in self._videos if video.sampler) - (self.max_clips or sys.maxsize)
        start = 0
        for video in self._videos:
            start += int(is_of_video(self.processor, self._cached.ids[start:]).argmax())
            dropped = max(0, min(surplus, video.kept_clips)) if video.sampler else 0
            if dropped:
                start -= len(video.stamps[video.dropped]) if video.stamps and video.dropped else 0
                end = start + len(video.ids_of_clips(video.dropped, video.dropped + dropped))
                for layer in self._cache.layers:
                    layer.cut_out(start, end)
                self._cached = self._cached.without(start, end)
                video.dropped += dropped
                surplus -= dropped
            start += len(video.ids_of_clips(video.dropped, video.clips))

    def _warn_of_length(self) -> None:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        position = int(self._cached.positions[-1])
        if longest and position >= longest and not self._warned:
            self._warned = True
            warnings.warn(
                f"the prompt has reached position {position}, and the language model was made for {longest}: answers "
                "may get worse. Use a smaller `fps`, or reset() the session.",
                stacklevel=2,
            )

    # Prompts

    def _prompts(self, videos: list[Video], questions: list[str], answers: list[str] | None = None) -> list[Prompt]:
        """The whole prompts of questions about these videos. With answers, those of each question and its answer."""
        asked = [[*self._content, text_part(question)] for question in questions]
        conversations = [[*self._messages, {"role": "user", "content": content}] for content in asked]
        for messages, answer in zip(conversations, answers or [], strict=False):
            messages.append({"role": "assistant", "content": answer})
        return write_prompts(self.processor, conversations, videos)

    def _without_end(self, ids: np.ndarray) -> np.ndarray:
        """The tokens of an answer up to the first special one."""
        added = self.processor.tokenizer.added_tokens_decoder
        is_end = [int(token) in added and added[int(token)].special for token in ids]
        return ids[: is_end.index(True)] if True in is_end else ids

    def _prefix(self, videos: list[Video]) -> Prompt:
        """What is the same for every question: up to the end of the last video, or of what was remembered after it."""
        (prompt,) = self._prompts(videos, ["?"])
        end = np.flatnonzero(is_of_video(self.processor, prompt.ids)).max(initial=-1) + 1
        if VIDEO not in self._content and self._messages and self._messages[-1]["role"] == "assistant":
            (remembered,) = write_prompts(self.processor, [self._messages], videos)
            end = max(end, remembered.shared_with(prompt))
        return prompt[:end]

    # Answers

    @contextmanager
    def _exclusively(self):
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("the session is busy: an answer is being streamed, or another thread uses it")
        try:
            yield
        finally:
            self._busy.release()

    @contextmanager
    def _asking(self, questions: list[str]):
        """Gives the prompts of these questions, with all videos in the cache. Afterwards the cache is as before."""
        self._fill_cache(self._prefix([replace(video, waiting=[]) for video in self._videos]))
        before, videos = len(self._cached), self._videos_completed()
        try:
            if videos and videos[-1].waiting:
                features = encode(self.model, self._pixels_of(videos[-1].waiting))
                self._fill_cache(self._prefix(videos), features)
            prompts = self._prompts(videos, questions)
            self._crop(min(self._shared(prompt) for prompt in prompts))
            yield prompts
        finally:
            self._crop(before)

    def _answer(self, questions: list[str], remember: bool, generation: dict, streamer=None) -> list[str]:
        if taken := sorted(TAKEN_OPTIONS & set(generation)):
            raise ValueError(f"{', '.join(taken)}: a session sets this itself")
        config = generation.get("generation_config") or self.model.generation_config
        single = len(questions) == 1 and (generation.get("num_beams") or config.num_beams or 1) == 1
        with torch.inference_mode():
            with self._asking(questions) as prompts:
                inputs = self._padded(prompts)
                if single or len(self._cached):
                    inputs[CACHE] = self._cache if single else branch_of(self._cache)
                if config.cache_implementation is not None:
                    generation = {**generation, "cache_implementation": None}
                output = self.model.generate(**inputs, use_cache=True, streamer=streamer, **generation)
                output = output[:, inputs["input_ids"].shape[1] :]
            answers = [text.strip() for text in self.processor.batch_decode(output, skip_special_tokens=True)]
            if remember:
                self._finish_video()
                self._messages.append({"role": "user", "content": [*self._content, text_part(questions[0])]})
                self._messages.append({"role": "assistant", "content": answers[0]})
                self._content = []
        return answers

    def _padded(self, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
        """Prompts of different lengths as one batch. They are padded where the cache ends and the questions begin."""
        cached, longest = len(self._cached), max(map(len, prompts))
        pad = self.processor.tokenizer.pad_token_id

        def rows(values: list[np.ndarray], fill: int) -> torch.Tensor:
            padded = [np.insert(row, cached, [fill] * (longest - len(row))) for row in values]
            return torch.from_numpy(np.stack(padded)).to(self.model.device)

        return {
            "input_ids": rows([prompt.ids for prompt in prompts], 0 if pad is None else pad),
            "attention_mask": rows([np.ones_like(prompt.ids) for prompt in prompts], 0),
            "position_ids": rows([prompt.positions for prompt in prompts], 0),
        }


class StopWhenSet(StoppingCriteria):
    """Ends all answers once an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def add_chosen_frames(session: VideoPandaSession, frames) -> None:
    """Adds all of these frames, which were chosen of a file before. A single one is a picture."""
    if len(frames) == 1:
        session.add_picture(frames[0])
    else:
        session.add(frames, rate=session.fps)  # at its own rate, a session takes them all


def is_in_memory(video) -> bool:
    return isinstance(video, (Image.Image, np.ndarray, torch.Tensor, list, tuple))


def arrays_of(frames) -> np.ndarray:
    """Frames in memory, one or many, as an array `(frames, height, width, 3)` of uint8 or float."""
    if isinstance(frames, Image.Image) or getattr(frames, "ndim", 4) < 4:
        frames = [frames]
    if len(frames) == 0:
        raise ValueError("there is no frame to add")
    return rgb_frames(list(frames) if isinstance(frames, tuple) else frames).permute(0, 2, 3, 1).cpu().numpy()


def name_of(source) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
