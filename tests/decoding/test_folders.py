"""A folder of pictures, or a list of their names, is a video of them."""

import numpy as np
import pytest
from PIL import Image

from helpers.video_files import draw_number, read_number
from video_panda_hf.decoding import (
    CAN_ISOLATE,
    CorruptVideoError,
    DecodeLimits,
    NotAVideoError,
    VideoDecodeWarning,
    VideoFrameError,
    VideoLimitError,
    VideoUnreadableError,
    decode_video,
    decode_video_or_picture,
)


@pytest.fixture
def folder(tmp_path):
    """Frames 0 to 11 in the order of their names, and files that are no frames."""
    for number in range(12):
        suffix = ("png", "JPG", "bmp")[number % 3]
        Image.fromarray(draw_number(number)).save(tmp_path / f"shot 2 frame {number}.{suffix}")
    (tmp_path / "frames.txt").write_text("no picture")
    (tmp_path / "._shot 2 frame 0.png").write_bytes(b"what macOS leaves on other disks")
    (tmp_path / "more.png").mkdir()
    return tmp_path


def test_the_frames_are_in_the_natural_order_of_the_names(folder):
    for decode in (decode_video, decode_video_or_picture):
        for source in (folder, str(folder)):
            frames, metadata = decode(source)
            assert frames.shape == (12, 64, 96, 3) and frames.dtype == np.uint8
            assert [read_number(frame) for frame in frames] == list(range(12))
    assert (metadata.total_num_frames, metadata.height, metadata.width) == (12, 64, 96)
    assert metadata.fps is None and metadata.duration is None


def test_frames_are_chosen_as_of_any_video(folder):
    frames, metadata = decode_video(folder, lambda metadata: [metadata.total_num_frames - 1, 2, 2])
    assert [read_number(frame) for frame in frames] == metadata.frames_indices == [11, 2, 2]
    assert [read_number(frame) for frame in decode_video(folder, indices=[10, 9])[0]] == [10, 9]
    with pytest.raises(VideoFrameError, match="frame 12 was asked for, but the video has 12 frames, 0 to 11"):
        decode_video(folder, indices=[12])
    with pytest.raises(ValueError, match="no times for a window"):
        decode_video(folder, start=1.0)


def test_only_the_chosen_pictures_are_read(folder):
    (folder / "shot 2 frame 3.png").write_bytes(b"")
    assert [read_number(frame) for frame in decode_video(folder, indices=[2, 4])[0]] == [2, 4]


def test_a_damaged_picture_is_named_or_the_nearest_stands_in(folder):
    path = folder / "shot 2 frame 3.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptVideoError, match=r"shot 2 frame 3\.png"):
        decode_video(folder)
    with pytest.warns(VideoDecodeWarning, match="first frame 3 of 12"):
        frames, _ = decode_video(folder, strict=False)
    assert [read_number(frame) for frame in frames] == [0, 1, 2, 2, *range(4, 12)]


def test_pictures_of_several_sizes_are_no_video(folder):
    Image.fromarray(draw_number(12, 32, 48)).save(folder / "shot 2 frame 12.png")
    with pytest.raises(NotAVideoError, match=r"frame 12\.png.* is of \(32, 48\) .* of \(64, 96\)"):
        decode_video(folder)


def test_a_folder_without_pictures_is_an_error_that_names_it(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"a clip")
    with pytest.raises(VideoUnreadableError, match=rf"{tmp_path}.* is a directory without pictures"):
        decode_video(tmp_path)


def names_in(folder):
    return [folder / f"shot 2 frame {number}.{('png', 'JPG', 'bmp')[number % 3]}" for number in range(12)]


LIMITS = [
    {"max_side": 95},
    {"max_pixels": 96 * 64 - 1},
    {"max_frames": 11},
    {"max_seconds": 0.0},
    {"max_output_bytes": 12 * 96 * 64 * 3 - 1},
    {"max_source_bytes": 100},
]


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: next(iter(limits)))
def test_limits_hold_for_folders_and_lists(folder, limits):
    for source in (folder, names_in(folder)):
        with pytest.raises(VideoLimitError, match=next(iter(limits))):
            decode_video(source, limits=DecodeLimits(**limits))


@pytest.mark.parametrize("isolate", [False] + [True] * CAN_ISOLATE)
def test_a_list_of_pictures_is_a_video_in_its_own_order(folder, isolate, monkeypatch):
    names = [str(names_in(folder)[number]) for number in (3, 1, 7, 1)]
    monkeypatch.chdir(folder)
    for source in (names, [names_in(folder)[3].name, *names[1:]]):
        frames, metadata = decode_video(source, isolate=isolate)
        assert [read_number(frame) for frame in frames] == [3, 1, 7, 1]
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (4, None, None)
    frames, _ = decode_video_or_picture(names, lambda _: [2], limits=DecodeLimits(isolate=isolate))
    assert [read_number(frame) for frame in frames] == [7]


def test_what_is_no_list_of_pictures_is_named(folder):
    with pytest.raises(NotAVideoError, match="video of 0 picture files>: is an empty list"):
        decode_video([])
    with pytest.raises(TypeError, match="a list of pictures has their names"):
        decode_video([names_in(folder)[0].read_bytes()])
    with pytest.raises(NotAVideoError, match=r"frames\.txt': is not a picture"):
        decode_video([*names_in(folder), folder / "frames.txt"])
