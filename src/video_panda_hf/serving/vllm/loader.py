"""Video files that vLLM receives → frames, chosen and decoded as the model's own video processor does it."""

import dataclasses
from functools import partial

from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader


BACKEND = "video_panda"
NOT_SAID = (-1, 32)  # of `num_frames`: ours, and what vLLM puts in where a request has only `fps`


@VIDEO_LOADER_REGISTRY.register(BACKEND)
class VideoPandaLoader(VideoLoader):
    """vLLM's own loaders take 32 frames, whatever the processor's settings are."""

    video_processors = {}  # by the name of the model, in this process

    @classmethod
    def use(cls, model: str, video_processor, media_io_kwargs: dict) -> None:
        """Makes this loader the default of the videos for a model, and has pictures left to the processor. What
        `--media-io-kwargs` says, stays."""
        cls.video_processors[model] = video_processor
        media_io_kwargs["image"] = {"image_mode": None, **media_io_kwargs.get("image", {})}
        media_io_kwargs["video"] = {
            "video_backend": BACKEND,
            "num_frames": NOT_SAID[0],
            **media_io_kwargs.get("video", {}),
            "model": model,
        }

    @classmethod
    def load_bytes(cls, data: bytes, num_frames=-1, fps=None, max_frames=None, model=None, **unknown):
        """
        Args:
            data (`bytes`):
                The file.
            num_frames (`int`, *optional*), fps (`float`, *optional*), max_frames (`int`, *optional*):
                As in the video processor, whose settings they replace.
            model (`str`):
                The name of the model.

        Returns:
            `tuple[np.ndarray, dict]`: frames (T, H, W, 3) uint8, and what is known of the video.

        Raises:
            ValueError: for other settings, and for a video that cannot be decoded.
        """
        if unknown:
            raise ValueError(f"{sorted(unknown)} of `media_io_kwargs`: there are num_frames, fps and max_frames")
        if model not in cls.video_processors:
            raise ValueError(f"`model` of `media_io_kwargs` is set by the server, it is not {model!r}")
        processor = cls.video_processors[model]
        wanted = {"num_frames": None if num_frames in NOT_SAID and (fps or num_frames == -1) else num_frames}
        wanted |= {"fps": fps, "max_frames": max_frames}
        if max_frames is not None and not (fps or (processor.fps and wanted["num_frames"] is None)):
            raise ValueError(f"`max_frames` = {max_frames} goes with `fps`")
        frames, metadata = processor.fetch_videos(data, partial(processor.sample_frames, **wanted))
        return frames, {**dataclasses.asdict(metadata), "do_sample_frames": False}
