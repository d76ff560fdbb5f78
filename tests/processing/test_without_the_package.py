"""The code of a checkpoint without the package: videos are decoded plainly, and what that cannot do is an error."""

import io
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from helpers.video_files import VideoSpec, paint, read_number
from video_panda_hf.decoding import decode_video
from video_panda_hf.processing import VideoPandaVideoProcessor, video_processing_video_panda


SPECS = [
    VideoSpec("b_frames.mp4", "libx264", options={"bf": "3"}),
    VideoSpec("vp9.webm", "libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    VideoSpec("mpeg4.avi", "mpeg4"),
    VideoSpec("rotated_90.mp4", "libx264", rotation=90),
    VideoSpec("rotated_180.mp4", "libx264", rotation=180),
    VideoSpec("rotated_270.mp4", "libx264", rotation=270),
    VideoSpec("mirrored.mp4", "libx264", mirrored=True),
    VideoSpec("mirrored_90.mp4", "libx264", rotation=90, mirrored=True),
    VideoSpec("mirrored_180.mp4", "libx264", rotation=180, mirrored=True),
    VideoSpec("mirrored_270.mp4", "libx264", rotation=270, mirrored=True),
]


COLOURFUL = [
    VideoSpec("untagged_hd.mp4", "libx264", width=1280, height=720, frames=3, draw=paint),
    VideoSpec("bt709_full_range.mp4", "libx264", frames=3, draw=paint, colour={"colorspace": 1, "color_range": 2}),
    VideoSpec("wide_pixels.mp4", "libx264", frames=3, draw=paint, aspect=Fraction(11, 10)),
    VideoSpec("ten_bits.mp4", "libx264", frames=3, draw=paint, pix_fmt="yuv420p10le"),
    VideoSpec("odd_height.mov", "mpeg4", frames=3, draw=paint, height=63),
]


@pytest.fixture
def processor(monkeypatch) -> VideoPandaVideoProcessor:
    monkeypatch.setattr(video_processing_video_panda, "decoding", None)
    return VideoPandaVideoProcessor(size={"longest_edge": 56}, num_frames=4)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_frames_are_those_of_the_package(spec, processor, tmp_path):
    path = spec.write(tmp_path)
    expected, _ = decode_video(path)
    for source in (str(path), path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        frames, metadata = processor.fetch_videos(source, lambda metadata: [40, 0, 13])
        np.testing.assert_array_equal(frames, expected[[40, 0, 13]])
        assert (metadata.total_num_frames, metadata.frames_indices) == (48, [40, 0, 13])
        assert (metadata.fps, metadata.height, metadata.width) == (25, *expected.shape[1:3])
    everything, _ = processor.fetch_videos(str(path))
    assert [read_number(frame) for frame in everything] == list(range(48))


@pytest.mark.parametrize("spec", COLOURFUL, ids=lambda spec: spec.name)
def test_pixels_are_the_stored_ones(spec, processor, tmp_path):
    path = spec.write(tmp_path)
    np.testing.assert_array_equal(processor.fetch_videos(path)[0], decode_video(path)[0])


def test_inputs_of_a_model_are_those_of_the_package(processor, monkeypatch, tmp_path):
    path = SPECS[0].write(tmp_path)
    picture = tmp_path / "photo.png"
    Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint8).reshape(60, 40, 3)).save(picture)
    videos = [str(path), {"video": str(path), "indices": [1, 2, 3, 4]}, str(picture), [str(picture)] * 5]
    plain = processor(videos=videos)
    monkeypatch.undo()
    for name, expected in processor(videos=videos).items():
        np.testing.assert_array_equal(plain[name], expected)


@pytest.mark.parametrize(
    ("video", "settings"),
    [
        ({"video": "CLIP", "start": 0.5}, {}),
        ("CLIP", {"strict_decoding": False}),
        ("CLIP", {"pixels": "displayed"}),
        ("FOLDER", {}),
        ("CLIP", {"decode_limits": {"max_seconds": 3}}),
        (["PICTURE"] * 8, {"decode_limits": {"max_seconds": 3}}),
        ("http://127.0.0.1:1/clip.mp4", {}),
        ("data:video/mp4;base64,AAAA", {}),
        ("moving.webp", {}),
    ],
)
def test_what_needs_the_package_says_so(video, settings, processor, tmp_path):
    path = SPECS[0].write(tmp_path)
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pictures[0].save(tmp_path / "moving.webp", save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / "still.png")
    if isinstance(video, list):
        video = [str(tmp_path / "still.png") for _ in video]
    named = {"CLIP": str(path), "FOLDER": str(tmp_path), "moving.webp": str(tmp_path / "moving.webp")}
    if isinstance(video, dict):
        video = {key: named.get(value, value) for key, value in video.items()}
    with pytest.raises(ImportError, match="pip install video-panda-hf"):
        processor(videos=named.get(video, video) if isinstance(video, str) else video, **settings)


def test_a_playlist_opens_no_other_file(processor, tmp_path):
    SPECS[0].write(tmp_path)
    playlist = tmp_path / "list.txt"
    playlist.write_text(f"ffconcat version 1.0\nfile '{tmp_path / SPECS[0].name}'\n")
    with pytest.raises(OSError):
        processor(videos=str(playlist))
