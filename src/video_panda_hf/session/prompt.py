"""The prompt of a conversation whose videos are still coming in: token ids and positions, without any pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from video_panda_hf.processing import timestamp

from .sampling import FrameSampler


VIDEO = {"type": "video"}  # in the content of a message, where a video or a picture stands


@dataclass
class Video:
    """
    A video of the prompt, or a picture, as far as it has come in.

    Args:
        sampler (`FrameSampler`, *optional*):
            Chooses its frames; `None` for a picture.
        shape (`tuple[int, int, int]`):
            Height, width and channels of a frame.
        frame_ids (`np.ndarray`):
            The token ids of one frame.
        clip_size (`int`):
            Frames of a clip; 1 for a picture.
        clips (`int`, *optional*, defaults to 0):
            Clips that were encoded and put into the cache.
        dropped (`int`, *optional*, defaults to 0):
            Clips, the oldest ones, that were taken out of the cache again.
        waiting (`list[np.ndarray]`, *optional*):
            Frames that are not encoded yet.
        ended (`bool`, *optional*, defaults to `False`):
            Whether what is added next is another video.
        stamps (`list[np.ndarray]`, *optional*):
            The token ids of the time before each clip; empty without timestamps. A prompt's text has the first one.
    """

    sampler: FrameSampler | None
    shape: tuple[int, int, int]
    frame_ids: np.ndarray
    clip_size: int
    clips: int = 0
    dropped: int = 0
    waiting: list[np.ndarray] = field(default_factory=list)
    ended: bool = False
    stamps: list[np.ndarray] = field(default_factory=list)

    def copy(self) -> "Video":
        sampler = self.sampler and replace(self.sampler, unfinished=list(self.sampler.unfinished))
        return replace(self, sampler=sampler, waiting=list(self.waiting), stamps=list(self.stamps))

    def completed(self) -> "Video":
        """A copy whose last clip is completed by repeating its last frame, as the processor does for a file."""
        video = self.copy()
        if video.sampler and not video.clips and not video.waiting:  # of the shortest file, it takes one frame
            video.waiting = video.sampler.unfinished[:1]
        video.waiting += video.waiting[-1:] * (-len(video.waiting) % video.clip_size)
        return video

    @property
    def kept_frames(self) -> list[np.ndarray]:
        """The frames in memory."""
        return self.waiting + (self.sampler.unfinished if self.sampler else [])

    @property
    def kept_clips(self) -> int:
        """The clips in the cache."""
        return self.clips - self.dropped

    def ids_of_clips(self, start: int, end: int) -> np.ndarray:
        """The token ids of the clips from `start` up to `end`, each but the video's first after its time."""
        clip = np.tile(self.frame_ids, self.clip_size)
        parts = [clip[:0]]
        for number in range(start, end):
            parts += [self.stamps[number], clip] if self.stamps and number else [clip]
        return np.concatenate(parts)


@dataclass
class Prompt:
    """Token ids `(tokens,)` and their positions in the whole prompt, where dropped clips leave gaps."""

    ids: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Prompt":
        return Prompt(self.ids[part], self.positions[part])

    def without(self, start: int, end: int) -> "Prompt":
        return Prompt(np.delete(self.ids, slice(start, end)), np.delete(self.positions, slice(start, end)))

    def shared_with(self, other: "Prompt") -> int:
        """The number of tokens that both begin with."""
        length = min(len(self), len(other))
        differs = (self.ids[:length] != other.ids[:length]) | (self.positions[:length] != other.positions[:length])
        return int(differs.argmax()) if differs.any() else length


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def is_of_video(processor, ids: np.ndarray) -> np.ndarray:
    """Which tokens stand for videos, as a mask."""
    return np.isin(ids, processor.video_token_ids)


def ids_of_frame(processor, rows: int, columns: int) -> np.ndarray:
    """The tokens of one frame of rows × columns tokens."""
    return np.array(processor.tokenizer.convert_tokens_to_ids(processor.placeholders_of_frame(rows, columns)))


def ids_of_time(processor, seconds: float) -> np.ndarray:
    """The tokens of a time between two clips."""
    text = processor.row_token + timestamp(seconds) + processor.video_token
    return np.array(processor.tokenizer.encode(text, add_special_tokens=False)[1:-1])


def write_prompts(processor, conversations: list[list[dict]], videos: list[Video]) -> list[Prompt]:
    """
    The prompts of conversations about the same videos: several are faster than one by one.

    Args:
        processor (`VideoPandaProcessor`):
            It has the chat template and the tokenizer.
        conversations (`list[list[dict]]`):
            The messages. `VIDEO` in the content of a message stands for the next of the videos.
        videos (`list[Video]`):
            As far as they have come in, with the clips that are kept and the frames that wait.
    """
    frames = np.array([video.clip_size if video.stamps else 1 for video in videos], dtype=int)  # of the stand-ins
    return [with_tokens(processor, ids, videos, frames) for ids in with_stand_ins(processor, conversations, frames)]


def with_tokens(processor, ids: np.ndarray, videos: list[Video], frames: np.ndarray) -> Prompt:
    """The prompt with the videos' own tokens in place of their stand-ins, which have so many frames."""
    length_of_frame = len(ids_of_frame(processor, 1, 1))
    # A frame of a stand-in has two such tokens: its context and its token.
    starts = np.flatnonzero(ids == processor.video_token_id)[2 * (frames.cumsum() - frames)]
    parts, positions, position, end = [], [], 0, 0
    for start, count, video in zip(starts, frames, videos, strict=True):
        tokens = video.ids_of_clips(video.dropped, video.clips + len(video.waiting) // video.clip_size)
        for part, gap in ((ids[end:start], 0), (tokens, len(video.ids_of_clips(0, video.dropped)))):
            position += gap
            parts.append(part)
            positions.append(np.arange(position, position + len(part)))
            position += len(part)
        end = start + count * length_of_frame
    parts.append(ids[end:])
    positions.append(np.arange(position, position + len(ids) - end))
    return Prompt(np.concatenate(parts), np.concatenate(positions))


def with_stand_ins(processor, conversations: list[list[dict]], frames: Sequence[int]) -> list[np.ndarray]:
    """
    The token ids of conversations in which every video has so many frames of one token. Above one, they have a time.
    All conversations have the same videos and end with the same role.
    """
    side = processor.video_processor.patch_size * processor.video_processor.merge_size
    videos = [{"type": "video", "video": np.zeros((count, side, side, 3), np.uint8)} for count in frames]

    def fill(messages: list[dict]) -> list[dict]:
        stand_ins, filled = iter(videos), []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [next(stand_ins) if part == VIDEO else part for part in content]
            filled.append({**message, "content": content})
        return filled

    settings = {"do_resize": False, "do_sample_frames": False, "input_data_format": "channels_last"}
    if max(frames, default=1) > 1:
        metadata = [{"total_num_frames": count, "fps": 1.0} for count in frames]
        settings |= {"timestamps": True, "video_metadata": metadata * len(conversations)}
    inputs = processor.apply_chat_template(
        [fill(messages) for messages in conversations],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=conversations[0][-1]["role"] == "user",
        processor_kwargs=settings,
    )
    return [np.asarray(ids, dtype=np.int64) for ids in inputs["input_ids"]]


def check_template(processor, messages: list[dict]) -> None:
    """Raises `ValueError` if a question changes the prompt before the end of its video."""
    asked = [[VIDEO, text_part(question)] for question in ("What is it?", "Why?")]
    prompts = with_stand_ins(processor, [[*messages, {"role": "user", "content": content}] for content in asked], [1])
    before = [ids[: np.flatnonzero(is_of_video(processor, ids)).max(initial=-1) + 1] for ids in prompts]
    if len(before[0]) == 0 or not np.array_equal(*before):
        raise ValueError(
            "the chat template puts the question before the video, but a session encodes the video before it has a "
            "question: use a template that keeps the order of a message's content"
        )
