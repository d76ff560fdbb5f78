"""A video of any kind → the frames that the model gets of it, as pixels and as inputs."""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from video_panda_hf.processing import rgb_frames


IN_MEMORY = (Image.Image, np.ndarray, torch.Tensor, list, tuple)
SAMPLING = ("num_frames", "fps", "max_frames")


def sampled_frames(processor, video, rate: float | None, sampling: dict) -> tuple[np.ndarray, VideoMetadata]:
    """The frames that the processor would choose, (T, height, width, 3), and what is known of the video."""
    video_processor = processor.video_processor
    if isinstance(video, Mapping):
        own = {name: video[name] for name in SAMPLING if video.get(name) is not None}
        if own.keys() & {"num_frames", "fps"}:
            sampling = dict.fromkeys(SAMPLING)
        sampling = {**sampling, **own}
        video = {name: value for name, value in video.items() if name not in SAMPLING}

    def sample(metadata):
        return video_processor.sample_frames(metadata, **sampling)

    if not isinstance(video, IN_MEMORY):
        if rate is not None:
            raise ValueError("`rate` is for frames in memory; a file has its own")
        return video_processor.fetch_videos(video, sample)
    if isinstance(video, Image.Image) or getattr(video, "ndim", 4) < 4:
        video = [video]
    if len(video) == 0:
        raise ValueError("there is no frame in `video`")
    frames = rgb_frames(list(video) if isinstance(video, tuple) else video).permute(0, 2, 3, 1).cpu().numpy()
    metadata = VideoMetadata(len(frames), fps=rate, height=frames.shape[1], width=frames.shape[2])
    metadata.frames_indices = [0] if len(frames) == 1 else [int(index) for index in sample(metadata)]
    return frames[metadata.frames_indices], metadata


def inputs_of(processor, frames: np.ndarray, metadata: VideoMetadata, question: str | None, system: str | None):
    """The inputs of the model: of the frames alone, or with a prompt that asks the question about them."""
    settings = {"do_sample_frames": False, "return_tensors": "pt"}
    if question is None:
        return processor.video_processor(frames, input_data_format="channels_last", **settings)
    if processor.video_processor.timestamps:
        settings["video_metadata"] = [dict(metadata)]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": question}]
    messages = [] if system is None else [{"role": "system", "content": system}]
    return processor.apply_chat_template(
        [*messages, {"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs=settings,
    )


def pixels_of(frames: np.ndarray) -> np.ndarray:
    """The frames as bytes, to be shown."""
    return frames if frames.dtype == np.uint8 else frames.round().clip(0, 255).astype(np.uint8)
