"""Long videos: decoded, prepared and encoded a few clips at a time, so that their pixels are never all in memory."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from tqdm import tqdm
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.video_utils import VideoMetadata

from video_panda_hf.processing import check_frame_count, list_metadata, opened, rgb_frames


FRAMES_AT_ONCE = 32  # of a video that are decoded and encoded together


@torch.inference_mode()
def encode_videos(model, processor, conversation, **settings) -> dict:
    r"""
    The inputs of `generate` for a conversation whose videos may be hours long.

    The videos are decoded and encoded a few clips at a time. So their tokens are in memory, but never all of their
    pixels. The features are those of `get_video_features` for the whole videos.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model.
        processor (`VideoPandaProcessor`):
            Its processor.
        conversation (`list[dict]` or `list[list[dict]]`):
            The messages, or a list of conversations, as `processor.apply_chat_template` takes them.
        settings:
            What `apply_chat_template` takes: `fps`, `max_frames`, `num_frames`, `max_video_tokens`, `padding`, …

    Returns:
        `dict`: `input_ids` and `attention_mask`, `(conversations, tokens)`, and with videos or pictures
        `mm_encoder_outputs`, all on the model's device.

    Raises:
        VideoDecodeError: (a `ValueError`) for a video that cannot be read.
        ValueError: for what `apply_chat_template` refuses, and, before anything is encoded, for a prompt that is
            longer than the language model's context.

    Example:

    ```python
    messages = [{"role": "user", "content": [{"type": "video", "path": "film.mkv"}, {"type": "text", "text": "…?"}]}]
    inputs = encode_videos(model, processor, messages, fps=0.5, max_video_tokens=30_000)
    output = model.generate(**inputs, max_new_tokens=64)
    print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    ```
    """
    settings = {"add_generation_prompt": True, "return_tensors": "pt", **settings}
    with ExitStack() as closing:
        processor = copy.copy(processor)
        processor.video_processor = video_processor = in_pieces(processor.video_processor, closing)
        inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **settings)
        grids = inputs.pop("video_grid_thw")
        inputs.pop("pixel_values_videos", None)  # there are some, 0 rows, where there are no videos
        model.check_length(inputs["input_ids"], inputs.get("attention_mask"), grids)
        inputs = dict(inputs.to(model.device))
        if not len(grids):
            return inputs
        videos, features = video_processor.chosen, []
        frames = sum(len(video) for video in videos)
        with tqdm(total=frames, unit="frame", disable=None if frames > FRAMES_AT_ONCE else True) as progress:
            for video in videos:
                parts = []
                for piece in video.pieces():
                    parts.append(encode(model, piece))
                    progress.update(int(piece["video_grid_thw"][0, 0]))
                features.append(torch.cat(parts))
    return {**inputs, "mm_encoder_outputs": {"video": BaseModelOutputWithPooling(pooler_output=tuple(features))}}


def encode(model, inputs: BatchFeature) -> torch.Tensor:
    """The tokens of one video or piece of it, `(tokens, text hidden size)`."""
    pixels = inputs["pixel_values_videos"].to(model.device)
    (features,) = model.get_video_features(pixels, inputs["video_grid_thw"], return_dict=True).pooler_output
    return features


@dataclass
class ChosenFrames:
    """
    The frames that were chosen of a video, not read yet.

    Args:
        numbers (`Sequence[int]`):
            Their numbers in the video.
        size (`tuple[int, int]`):
            Their height and width.
        read (`Callable`):
            Gives the frames of such numbers, as the video processor takes them.
        prepare (`Callable`, *optional*):
            Makes the model's inputs of frames.
    """

    numbers: Sequence[int]
    size: tuple[int, int]
    read: Callable
    prepare: Callable | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def pieces(self) -> Iterator[BatchFeature]:
        """The model's inputs of a few clips at a time."""
        for start in range(0, len(self), FRAMES_AT_ONCE):
            yield self.prepare(self.read(self.numbers[start : start + FRAMES_AT_ONCE]))


class InPieces:
    """Makes of a video processor one that chooses the frames and gives their grids, without reading them."""

    opened: ExitStack
    chosen: list[ChosenFrames]

    def _decode_and_sample_videos(self, videos, video_metadata=None, do_sample_frames=None, sample_indices_fn=None):
        chosen, metadata = [], []
        for video, given in zip(videos, list_metadata(video_metadata, videos), strict=True):
            sample = self._own_sampling(video, sample_indices_fn)
            if hasattr(video, "source"):
                frames, given = self._chosen_of_file(video, given, sample)
            else:
                frames, given = self._sample_in_memory(video, given, sample)
                frames = ChosenFrames(range(len(frames)), rgb_frames(frames[:1]).shape[2:], part_of(frames))
            chosen.append(frames)
            metadata.append(given)
        return chosen, metadata

    def _chosen_of_file(self, video, given: VideoMetadata | None, sample) -> tuple[ChosenFrames, VideoMetadata]:
        if video.is_picture:
            frames, metadata = video.decode()
            return ChosenFrames([0], frames.shape[1:3], part_of(frames)), metadata
        file = self.opened.enter_context(opened(video))
        metadata = file.metadata
        metadata.fps = metadata.fps or (given and given.fps)
        numbers = file.choose(sample if video.indices is None else lambda _: video.indices)
        return ChosenFrames(numbers, (metadata.height, metadata.width), file.read), metadata

    def _prepare_input_videos(self, videos, do_convert_rgb=None, input_data_format=None, device=None):
        prepare = partial(super()._prepare_input_videos, input_data_format=input_data_format, device=device)
        return [replace(video, prepare=lambda frames: prepare([frames])) for video in videos]

    def _preprocess(self, videos, **settings) -> BatchFeature:
        grids, process = [], super()._preprocess
        for index, video in enumerate(videos):
            check_frame_count(len(video), settings["frames_per_clip"], f"video {index} of the call")
            grids.append((len(video), *self.grid_of(*video.size, **settings)))
        self.chosen = [
            replace(video, prepare=lambda frames, rgb=video.prepare: process(rgb(frames), **settings))
            for video in videos
        ]
        return BatchFeature({"video_grid_thw": torch.tensor(grids)})


def in_pieces(video_processor, opened: ExitStack):
    """A copy of a video processor that is `InPieces` as well. Its files stay open until `opened` closes."""
    copied = copy.copy(video_processor)
    copied.__class__ = type("VideoProcessorInPieces", (InPieces, type(video_processor)), {})
    copied.opened = opened
    return copied


def part_of(frames) -> Callable:
    """Gives frames in memory by their numbers."""
    return lambda numbers: frames[numbers[0] : numbers[-1] + 1]
