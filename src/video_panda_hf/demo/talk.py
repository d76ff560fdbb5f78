"""What the demo does when somebody asks: reading the clip, the session, the explanation. Knows nothing of Gradio."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from video_panda_hf.decoding import CAN_ISOLATE, DecodeLimits, opened_video
from video_panda_hf.explain import Explanation, explain
from video_panda_hf.session import VideoPandaSession, add_chosen_frames


# What a clip of a stranger may cost. This and `read_frames` are the one place where uploads are decoded.
DECODE_LIMITS = DecodeLimits(
    max_side=4096,
    max_pixels=4096 * 2304,
    max_duration=3600.0,
    max_frames=256,
    max_output_bytes=2**30,
    max_source_bytes=2**29,
    max_seconds=60.0,
    isolate=CAN_ISOLATE,
)


@dataclass
class Talk:
    """
    One visitor's conversation about one clip.

    Args:
        clip (`tuple`):
            The file and what was chosen of it.
        session (`VideoPandaSession`):
            It has seen the clip.
        frames (`np.ndarray`):
            The frames of the clip that the model got.
        questions (`list[str]`, *optional*):
            What was asked so far.
    """

    clip: tuple
    session: VideoPandaSession
    frames: np.ndarray
    questions: list[str] = field(default_factory=list)


class Talker:
    """
    Answers for all visitors. The model is one for all: the caller sees to it that one call at a time uses it. `limits`
    are what decoding one clip may cost.
    """

    def __init__(self, model, processor, limits: DecodeLimits, max_new_tokens: int):
        self.model, self.processor = model, processor
        self.limits, self.max_new_tokens = limits, max_new_tokens

    def read_frames(self, file: str, num_frames: int, start: float | None, end: float | None) -> np.ndarray:
        """The frames of an uploaded file, (T, height, width, 3). Raises `VideoDecodeError` if it cannot be read."""
        video_processor = self.processor.video_processor
        how = video_processor.how_to_decode(self.limits)

        def sample(metadata):
            return video_processor.sample_frames(metadata, num_frames=num_frames)

        may_be_picture = start is None and end is None
        with opened_video(file, start=start, end=end, may_be_picture=may_be_picture, **how) as video:
            return video.read(video.choose(sample))

    def begin(self, file: str, num_frames: int, start: float | None, end: float | None) -> Talk:
        """A new conversation, whose session has seen the clip."""
        if end is not None and end <= (start or 0):
            raise ValueError(f"the time window ends at {end:g} s, before it begins")
        frames = self.read_frames(file, num_frames, start, end)
        session = VideoPandaSession(self.model, self.processor)
        add_chosen_frames(session, frames)
        return Talk((file, num_frames, start, end), session, frames)

    def answer(self, talk: Talk, question: str) -> Iterator[str]:
        """Yields the answer as far as it has come. It stays in the conversation once it is complete."""
        text = ""
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        with closing(talk.session.stream(question, remember=True, **options)) as pieces:
            for piece in pieces:
                text += piece
                yield text.strip()
        talk.questions.append(question)

    def explain(self, talk: Talk, question: str, method: str, ablation: bool) -> Explanation:
        """The explanation of a question, asked as the first one about the clip."""
        options = {"method": method, "ablation": ablation, "max_new_tokens": self.max_new_tokens}
        if len(talk.frames) > 1:
            options["num_frames"] = len(talk.frames)  # all of them
        return explain(self.model, self.processor, talk.frames, question, **options)
