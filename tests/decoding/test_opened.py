"""`opened_video`: the frames of one file in several calls are those of `decode_video`."""

import time

import numpy as np
import pytest
from PIL import Image

from helpers.video_files import VideoSpec
from video_panda_hf.decoding import (
    DecodeLimits,
    VideoFrameError,
    VideoLimitError,
    decode_video,
    decode_video_or_picture,
    opened_video,
    readers,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, codec in (("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.mpg", "mpeg2video"), ("a.gif", "gif")):
        VideoSpec(name, codec, pix_fmt="rgb8" if codec == "gif" else "yuv420p").write(folder)
    (folder / "pictures").mkdir()
    for number in range(8):
        Image.new("RGB", (32, 24), (30 * number, 0, 0)).save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mpg", "a.gif", "pictures"])
@pytest.mark.parametrize("how", ["kept", "again", "isolated"])
def test_parts_are_the_whole(folder, name, how, monkeypatch):
    monkeypatch.setattr(readers, "KEPT_BYTES", 0 if how == "again" else readers.KEPT_BYTES)
    whole, metadata = decode_video(folder / name)
    with opened_video(folder / name, limits=DecodeLimits(isolate=how == "isolated")) as video:
        assert video.metadata.total_num_frames == len(whole)
        assert (video.metadata.fps, video.metadata.duration) == (metadata.fps, metadata.duration)
        for numbers in (range(5), range(5, 8), [7, 7, 6], [0, len(whole) - 1], []):
            np.testing.assert_array_equal(video.read(numbers), whole[list(numbers)])


def test_a_window_is_numbered_from_its_start(folder):
    whole, metadata = decode_video(folder / "a.mkv", start=0.4, end=1.2)
    with opened_video(folder / "a.mkv", start=0.4, end=1.2) as video:
        assert video.metadata.total_num_frames == metadata.total_num_frames == 20
        np.testing.assert_array_equal(video.read([3, 19]), whole[[3, 19]])


def test_a_linear_pass_goes_on_where_the_last_part_ended(folder, monkeypatch):
    monkeypatch.setattr(readers, "KEPT_BYTES", 0)
    opened, open_video = [], readers.open_video
    monkeypatch.setattr(readers, "open_video", lambda *given: opened.append(1) or open_video(*given))
    with opened_video(folder / "a.mpg") as video:
        before = len(opened)
        for start in range(0, 48, 4):
            video.read(range(start, start + 4))
        assert len(opened) - before == 1
        video.read([0])
        assert len(opened) - before == 2


def test_a_picture_is_a_video_of_one_frame(folder):
    name = folder / "pictures" / "5.png"
    with opened_video(name, may_be_picture=True) as video:
        assert video.is_picture
        assert video.metadata.total_num_frames == 1
        np.testing.assert_array_equal(video.read([0]), decode_video_or_picture(name)[0])


def test_limits_are_for_each_part_and_time_is_that_of_reading(folder, monkeypatch):
    clock, now = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + clock[0])
    size = np.prod(decode_video(folder / "a.mp4")[0].shape[1:])
    with opened_video(folder / "a.mp4", limits=DecodeLimits(max_output_bytes=int(4 * size), max_seconds=60)) as video:
        for start in range(0, 48, 4):
            clock[0] += 50
            assert len(video.read(range(start, start + 4))) == 4
        with pytest.raises(VideoLimitError, match=r"a\.mp4.*max_output_bytes"):
            video.read(range(5))
        with pytest.raises(VideoFrameError, match="frame 48 was asked for, but the video has 48 frames"):
            video.read([48])


def test_a_closed_video_says_so(folder):
    with opened_video(folder / "a.mp4") as video:
        video.read([0])
    with pytest.raises(ValueError, match="the video is closed"):
        video.read([0])
