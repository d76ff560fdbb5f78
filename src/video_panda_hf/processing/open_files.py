"""Opens a file as a video processor describes it, so that its frames can be read in parts."""

from contextlib import AbstractContextManager
from dataclasses import replace

from video_panda_hf.decoding import OpenedVideo, opened_video

from .video_processing_video_panda import has_picture_name


def opened(video) -> AbstractContextManager[OpenedVideo]:
    """Opens a file as the video processor describes it."""
    is_whole = video.start is video.end is video.indices is None
    return opened_video(
        video.source,
        start=video.start,
        end=video.end,
        limits=video.limits,
        strict=video.strict,
        pixels=video.pixels,
        may_be_picture=is_whole,
        may_be_mjpeg=not has_picture_name(video.source),
    )


def opened_file(video_processor, source) -> AbstractContextManager[OpenedVideo]:
    """Opens a file with the settings of a video processor."""
    (video,) = video_processor.list_videos(source)
    return opened(replace(video, **video_processor.how_to_decode()))
