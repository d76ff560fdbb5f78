"""What `VideoPandaVideoProcessor` makes of videos: which frames, what size, which pixels, in what order."""

import base64
import io
import pickle
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoVideoProcessor
from transformers.video_utils import VideoMetadata

from helpers.tiny_tokenizers import chatml_tokenizer
from video_panda_hf import VideoPandaProcessor, VideoPandaVideoProcessor
from video_panda_hf.processing import DecodeLimits, VideoDecodeError, VideoDecodeWarning
from video_panda_hf.processing.video_processing_video_panda import (
    resized_size,
    sample_frame_indices,
    sample_frame_indices_by_rate,
)


MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def small():
    return VideoPandaVideoProcessor(size={"longest_edge": 56})


@pytest.fixture(scope="module")
def video_file(tmp_path_factory):
    """20 frames at 10 fps; frame n is grey of level 10·n."""
    path = tmp_path_factory.mktemp("videos") / "levels.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 200, 10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered(num_frames, height=28, width=28):
    """(T, H, W, 3) uint8, frame n is grey of level 10·n."""
    levels = np.arange(num_frames, dtype=np.uint8) * 10
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3))


def pixels(inputs, index=0, patch_size=14):
    """The frames of one video, (T, H, W, 3) float 0..255, put together again from its patches."""
    counts = inputs["video_grid_thw"].prod(-1).tolist()
    t, h, w = inputs["video_grid_thw"][index].tolist()
    patches = inputs["pixel_values_videos"].split(counts)[index]
    patches = patches.reshape(t, h, w, 3, patch_size, patch_size).permute(0, 1, 4, 2, 5, 3)
    return (patches.reshape(t, h * patch_size, w * patch_size, 3) * STD + MEAN) * 255


def frame_numbers(inputs, index=0):
    return (pixels(inputs, index).mean((1, 2, 3)) / 10).round().int().tolist()


# Which frames


@pytest.mark.parametrize(
    ("num_frames_in_file", "rate", "num_frames", "expected"),
    [
        (132, 25, 8, [0, 18, 36, 54, 72, 90, 108, 126]),
        (250, 25, 8, [0, 25, 50, 75, 125, 150, 175, 225]),
        (120, 29.97, 8, [0, 17, 34, 51, 68, 85, 102, 119]),
        (5, 25, 8, [0, 1, 2, 3, 4, 4, 4, 4]),
        (8, 25, 8, list(range(8))),
        (250, 25, 1, [0]),
        (1, 25, 4, [0, 0, 0, 0]),
        (100, 0.4, 4, [0, 33, 66, 99]),
        (17, None, 4, [0, 5, 10, 16]),
    ],
)
def test_frames_are_sampled_as_in_training(num_frames_in_file, rate, num_frames, expected):
    assert sample_frame_indices(num_frames_in_file, rate, num_frames).tolist() == expected


def test_sampling_by_rate_keeps_the_rate_then_the_limit():
    assert sample_frame_indices_by_rate(40, 10.0, 2.0, None, 4).tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    assert sample_frame_indices_by_rate(30, 10.0, 2.0, None, 4).tolist() == [0, 5, 10, 15, 20, 25, 25, 25]
    assert sample_frame_indices_by_rate(40, 10.0, 2.0, 4, 4).tolist() == [0, 13, 26, 39]
    assert sample_frame_indices_by_rate(3, 10.0, 2.0, None, 4).tolist() == [0, 0, 0, 0]
    assert sample_frame_indices_by_rate(4, 10.0, 20.0, None, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_file_is_sampled_by_its_own_rate(small, video_file):
    assert frame_numbers(small(str(video_file))) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert frame_numbers(small(str(video_file), fps=5, max_frames=12)) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 18, 18]
    assert frame_numbers(small(str(video_file), do_sample_frames=False)) == list(range(20))


def test_arrays_and_frame_lists_without_a_rate_are_sampled_evenly(small):
    video = numbered(20)
    evenly = [0, 2, 5, 8, 10, 13, 16, 19]
    assert frame_numbers(small(video)) == evenly
    assert frame_numbers(small(torch.from_numpy(video.copy()))) == evenly
    assert frame_numbers(small([Image.fromarray(frame) for frame in video])) == evenly
    metadata = VideoMetadata(total_num_frames=20, fps=10)
    assert frame_numbers(small(video, video_metadata=metadata)) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert frame_numbers(small(video, video_metadata={"total_num_frames": 20, "fps": 10}, fps=2)) == [0, 5, 10, 15]


def test_a_short_video_repeats_its_last_frame(small):
    assert frame_numbers(small(numbered(3))) == [0, 1, 2, 2, 2, 2, 2, 2]
    assert frame_numbers(small(numbered(3), num_frames=4)) == [0, 1, 2, 2]


def test_a_picture_is_an_image_of_one_frame(small, tmp_path):
    picture = Image.new("RGB", (40, 20))
    picture.save(tmp_path / "picture.png")
    for given in [picture, [picture], np.array(picture), np.array(picture)[None], str(tmp_path / "picture.png")]:
        assert small(given)["video_grid_thw"].tolist() == [[1, 2, 4]]


@pytest.mark.parametrize("name", ["still.png", "still.jpg", "still.webp", "still.bmp", "moving.png", "moving.webp"])
def test_what_a_file_holds_decides_whether_it_is_a_picture(small, tmp_path, name):
    """By its name or another, as bytes, as a file, as a data URL and as a dictionary alike."""
    frames = [Image.fromarray(np.ascontiguousarray(frame)) for frame in numbered(8 if "moving" in name else 1)]
    lossless = {"quality": 100, "lossless": True}
    frames[0].save(tmp_path / name, save_all=len(frames) > 1, append_images=frames[1:], **lossless)
    data = (tmp_path / name).read_bytes()
    (tmp_path / "without_suffix").write_bytes(data)
    url = f"data:image/{name[-3:]};base64,{base64.b64encode(data).decode()}"
    with open(tmp_path / name, "rb") as file:
        file.seek(3)
        sources = [
            tmp_path / name,
            [str(tmp_path / name)],
            tmp_path / "without_suffix",
            data,
            file,
            url,
            {"video": data},
        ]
        found = [small(videos=source) for source in sources]
        assert file.tell() == 3
    assert [inputs["video_grid_thw"].tolist() for inputs in found] == [[[len(frames), 4, 4]]] * len(sources)
    for inputs in found:
        assert (pixels(inputs)[:, 0, 0, 0] - torch.arange(len(frames)) * 10).abs().max() < 1


def test_jpegs_in_a_row_are_a_video(small, tmp_path):
    with open(tmp_path / "raw.mjpeg", "wb") as file:
        for frame in numbered(8):
            Image.fromarray(np.ascontiguousarray(frame)).save(file, "JPEG")
    assert small(videos=(tmp_path / "raw.mjpeg").read_bytes())["video_grid_thw"].tolist() == [[8, 4, 4]]


def test_pictures_are_upright_of_eight_bits_and_within_the_limits(small, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (56, 28)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((28, 28), 20000, np.uint16)).save(tmp_path / "deep.png")
    for source in (tmp_path / "turned.png", (tmp_path / "turned.png").read_bytes(), {"path": tmp_path / "turned.png"}):
        assert small(videos=source)["video_grid_thw"].tolist() == [[1, 4, 2]]
        with pytest.raises(VideoDecodeError, match="its longer side in pixels is 56"):
            small(videos=source, decode_limits={"max_side": 28})
    assert (pixels(small(videos=tmp_path / "deep.png")) - 77).abs().max() < 1  # 20000 / 257


@pytest.mark.parametrize("content", [None, b"no picture"], ids=["missing", "broken"])
def test_a_picture_that_cannot_be_read_is_named(small, tmp_path, content):
    if content is not None:
        (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(VideoDecodeError, match=r"photo\.png.*(no such file|not a video)"):
        small(videos=str(tmp_path / "photo.png"))
    with pytest.raises(VideoDecodeError, match=r"photo\.png.*(no such file|is not a picture)"):
        small(videos=[str(tmp_path / "photo.png")] * 4)


def test_settings_that_make_no_sense_are_errors_at_once(small, video_file):
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`fps` is a number of frames a second above 0"):
            small(videos=video_file, fps=fps)
        with pytest.raises(ValueError, match="`fps` is a number of frames a second above 0"):
            VideoPandaVideoProcessor(fps=fps)
    for settings in ({"num_frames": 7}, {"fps": 2, "max_frames": 0}):
        with pytest.raises(ValueError, match="1 frame or a multiple of 4"):
            VideoPandaVideoProcessor(**settings)
        with pytest.raises(ValueError, match="1 frame or a multiple of 4"):
            small(videos=video_file, **settings)
    for settings in ({"max_frames": 4}, {"num_frames": 16, "max_frames": 8}):
        with pytest.raises(ValueError, match=r"`max_frames` = \d limits `fps`"):
            small(videos=video_file, **settings)
    assert len(frame_numbers(VideoPandaVideoProcessor(size=small.size, fps=5)(videos=video_file, max_frames=4))) == 4
    with pytest.raises(ValueError, match="needs `total_num_frames`"):
        small(videos=numbered(20), fps=2, video_metadata=[{"fps": 8.0}])
    with pytest.raises(ValueError, match="must be above 0"):
        small(videos=numbered(20), video_metadata=[{"fps": 0, "total_num_frames": 20}])


@pytest.fixture
def picture_files(tmp_path):
    """0.png to 11.png, of the levels of `numbered`."""
    names = [str(tmp_path / f"{n}.png") for n in range(12)]
    for name, frame in zip(names, numbered(12), strict=True):
        Image.fromarray(np.ascontiguousarray(frame)).save(name)
    return names


def test_picture_files_are_the_frames_of_one_video_and_sampled(small, picture_files):
    evenly = [0, 1, 3, 4, 6, 7, 9, 11]
    assert frame_numbers(small(picture_files)) == evenly
    assert frame_numbers(small(picture_files, do_sample_frames=True)) == evenly
    assert frame_numbers(small(picture_files, num_frames=4)) == [0, 3, 7, 11]
    rate = {"total_num_frames": 12, "fps": 4}
    assert frame_numbers(small(picture_files, fps=2, video_metadata=rate)) == [0, 2, 4, 6, 8, 10, 10, 10]
    assert frame_numbers(small(picture_files[:3])) == [0, 1, 2, 2, 2, 2, 2, 2]
    assert frame_numbers(small([[picture_files, picture_files[::-1]]]), 1) == [11, 10, 8, 7, 5, 4, 2, 0]


def test_picture_files_are_taken_as_they_are_without_sampling(small, picture_files):
    assert frame_numbers(small(picture_files, do_sample_frames=False)) == list(range(12))
    with pytest.raises(ValueError, match=r"video 0 of the call: .* multiple of 4 .* not 3"):
        small(picture_files[:3], do_sample_frames=False)
    with pytest.raises(
        ValueError, match=r"Sampling frames .* Set `do_sample_frames=False`, .* `num_frames` = 8 of them"
    ):
        small(picture_files[:3], do_sample_frames=True)


def test_limits_hold_for_lists_of_picture_files(small, picture_files):
    for limits in ({"max_side": 20}, {"max_frames": 7}, {"max_output_bytes": 1000}, {"max_source_bytes": 10}):
        with pytest.raises(VideoDecodeError, match=next(iter(limits))):
            small(picture_files, decode_limits=limits)
        with pytest.raises(VideoDecodeError, match=next(iter(limits))):
            VideoPandaVideoProcessor(size=small.size, decode_limits=limits)([[picture_files]])
    videos = small.list_videos([[picture_files]])
    with pytest.raises(VideoDecodeError, match="max_side"):
        small(videos, decode_limits={"max_side": 20})
    assert len(frame_numbers(small(videos))) == 8  # the limits were those of the call


def test_a_damaged_picture_file_may_be_passed_over(small, picture_files):
    data = Path(picture_files[1]).read_bytes()
    Path(picture_files[1]).write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoDecodeError, match=r"1\.png"):
        small(picture_files, do_sample_frames=False)
    with pytest.warns(VideoDecodeWarning, match="first frame 1 of 12"):
        found = small(picture_files, do_sample_frames=False, strict_decoding=False)
    assert frame_numbers(found)[:3] in ([0, 0, 2], [0, 2, 2])


def test_a_folder_of_pictures_is_a_video_of_them_in_natural_order(small, picture_files, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    evenly = [0, 1, 3, 4, 6, 7, 9, 11]
    for given in (tmp_path, str(tmp_path), {"path": str(tmp_path)}, [[tmp_path]]):
        assert frame_numbers(small(given)) == evenly
    assert frame_numbers(small([tmp_path, str(tmp_path)], num_frames=4), 1) == [0, 3, 7, 11]
    assert frame_numbers(small(tmp_path, do_sample_frames=False)) == list(range(12))
    assert frame_numbers(small({"video": tmp_path, "indices": [10, 2, 9, 0]})) == [10, 2, 9, 0]
    rate = {"total_num_frames": 12, "fps": 4}
    inputs = small(tmp_path, fps=2, video_metadata=rate, return_metadata=True)
    assert frame_numbers(inputs) == [0, 2, 4, 6, 8, 10, 10, 10]
    (metadata,) = inputs["video_metadata"]
    assert (metadata.total_num_frames, metadata.fps) == (12, 4)
    with pytest.raises(ValueError, match="needs the video's own rate"):
        small(tmp_path, fps=2)
    with pytest.raises(VideoDecodeError, match="its longer side in pixels is 28"):
        small(tmp_path, decode_limits={"max_side": 20})
    with pytest.raises(ValueError, match="pictures in a folder have no times"):
        small({"video": tmp_path, "start": 1.0})


def test_messages_may_name_a_folder_or_picture_files(picture_files, tmp_path):
    processor = VideoPandaProcessor.from_text_pretrained(chatml_tokenizer(), image_size=56)
    sources = [str(tmp_path), picture_files, picture_files[::-1]]
    content = [{"type": "video", "path": source} for source in sources] + [{"type": "text", "text": "What?"}]
    prompt = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([[{"role": "user", "content": content}]] * 2, num_frames=4, **prompt)
    expected = [[0, 3, 7, 11], [0, 3, 7, 11], [11, 8, 4, 0]]
    assert [frame_numbers(inputs, index) for index in range(6)] == expected * 2


@pytest.mark.parametrize(
    ("part", "settings", "expected"),
    [
        ({"start": 1.0}, {"num_frames": 4}, [10, 13, 16, 19]),
        ({"end": 0.8}, {"num_frames": 8}, list(range(8))),
        ({"start": 0.5, "end": 1.3}, {"num_frames": 4}, [5, 7, 9, 11]),
        ({"start": 0.5, "end": 1.3}, {"fps": 5}, [5, 7, 9, 11]),
        ({"indices": [3, 1, 4, 1]}, {"num_frames": 8}, [3, 1, 4, 1]),
        ({"indices": [7]}, {}, [7]),
        ({"start": 1.0, "indices": [0, 1, 2, 3]}, {}, [10, 11, 12, 13]),
        ({"start": 1.0, "end": None, "indices": None, "text": None}, {"num_frames": 1}, [10]),
    ],
)
def test_a_part_of_a_file_is_sampled_as_if_it_were_cut_there(small, video_file, part, settings, expected):
    for name in ("video", "path"):
        assert frame_numbers(small({name: video_file, **part}, **settings)) == expected
    assert frame_numbers(small([video_file, {"video": video_file.read_bytes(), **part}], **settings), 1) == expected


def test_limits_and_strictness_reach_the_decoder(video_file, tmp_path):
    with pytest.raises(VideoDecodeError, match=r"longer side .* is 64, above the limit of 32"):
        VideoPandaVideoProcessor(decode_limits={"max_side": 32})(video_file)
    with pytest.raises(VideoDecodeError, match="above the limit"):
        VideoPandaVideoProcessor()(video_file, decode_limits=DecodeLimits(max_side=32))
    damaged = tmp_path / "damaged.mp4"
    data = video_file.read_bytes()
    pictures = data.index(b"mdat") + 4
    middle = (pictures + data.index(b"moov")) // 2
    damaged.write_bytes(data[:middle] + bytes(60) + data[middle + 60 :])
    with pytest.raises(VideoDecodeError):
        VideoPandaVideoProcessor()(damaged)
    lenient = VideoPandaVideoProcessor(strict_decoding=False)
    lenient.save_pretrained(tmp_path)
    for processor in (lenient, AutoVideoProcessor.from_pretrained(tmp_path)):
        with pytest.warns(VideoDecodeWarning):
            assert processor(damaged)["video_grid_thw"][0, 0] == 8


def test_metadata_tells_which_frames_were_taken(small, video_file):
    inputs = small([str(video_file), numbered(3)], num_frames=4, return_metadata=True)
    of_file, of_array = inputs["video_metadata"]
    assert (of_file.total_num_frames, of_file.fps, list(of_file.frames_indices)) == (20, 10, [0, 6, 12, 18])
    assert (of_array.total_num_frames, of_array.fps, list(of_array.frames_indices)) == (3, None, [0, 1, 2, 2])


# What size and which pixels


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (720, 1280, (252, 448)),
        (1280, 720, (448, 252)),
        (480, 640, (336, 448)),
        (100, 100, (448, 448)),
        (300, 448, (308, 448)),
        (308, 448, (308, 448)),
        (1, 4000, (28, 448)),
        (99, 1584, (28, 448)),  # 448·99/1584 is 28 exactly
        (3001, 48000, (56, 448)),  # and here a hundredth of a pixel more
        (21 * 7, 48 * 7, (196, 448)),  # and here 196, where floats may say a little more
    ],
)
def test_the_longer_side_fills_the_canvas_and_the_shorter_is_rounded_up(height, width, expected):
    assert resized_size(height, width, longest_edge=448, factor=28) == expected


def scene(height, width):
    """A (height, width, 3) uint8 picture with edges, gradients and some noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    waves = np.stack([np.sin(x / 7 + c) + np.cos(y / 5 - c) for c in range(3)], -1)
    shapes = ((x // 23 + y // 17) % 2)[..., None] * 90
    return np.clip(110 + 40 * waves + shapes - 45 + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "size", [(720, 1280), (97, 131), (333, 500), (500, 333), (31, 400), (448, 448), (20, 20), (853, 480)]
)
def test_pixels_are_those_of_pil_bicubic(size):
    """On a picture with structure. On noise, some tall pictures differ in 2 % of values from Pillow 13, which resizes
    these in height first, unlike torch and the versions before."""
    picture = scene(*size)
    inputs = VideoPandaVideoProcessor()(picture)
    height, width = resized_size(*size, 448, 28)
    expected = np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    difference = (pixels(inputs)[0] - torch.from_numpy(expected)).abs()
    assert (difference < 1.01).float().mean() >= 0.99


def test_patches_are_ordered_frame_row_column_and_flattened_channel_y_x(small):
    video = np.random.default_rng(0).integers(0, 256, (4, 28, 56, 3), dtype=np.uint8)
    inputs = small(video, do_sample_frames=False)
    assert inputs["video_grid_thw"].tolist() == [[4, 2, 4]]
    frame, row, column, channel, y, x = 2, 1, 3, 1, 5, 11
    value = inputs["pixel_values_videos"][(frame * 2 + row) * 4 + column, (channel * 14 + y) * 14 + x]
    expected = (video[frame, row * 14 + y, column * 14 + x, channel] / 255 - MEAN[channel]) / STD[channel]
    torch.testing.assert_close(value, expected.float())


def test_each_video_is_as_it_would_be_alone(small, video_file):
    videos = [numbered(8, 30, 50), str(video_file), numbered(5, 50, 30), numbered(8, 30, 50)[::-1]]
    together = small(videos)
    for index, video in enumerate(videos):
        torch.testing.assert_close(pixels(together, index), pixels(small(video)))


def test_rescaling_and_normalising_can_be_left_out(small):
    video = numbered(4)
    raw = small(video, do_sample_frames=False, do_rescale=False, do_normalize=False)["pixel_values_videos"]
    assert raw.dtype == torch.float32 and raw.amax() == 30
    scaled = small(video, do_sample_frames=False, do_normalize=False)["pixel_values_videos"]
    assert scaled.amax() == pytest.approx(30 / 255)


def test_without_resizing_the_sides_must_hold_whole_tokens(small):
    assert small(numbered(4, 28, 84), do_resize=False, num_frames=4)["video_grid_thw"].tolist() == [[4, 2, 6]]
    with pytest.raises(ValueError, match=r"28×70 pixels: .* multiples of 28"):
        small(numbered(4, 28, 70), do_resize=False)


def test_the_helper_for_serving_counts_the_rows(small):
    rows = len(small(numbered(8, 30, 50))["pixel_values_videos"])
    assert small.get_num_of_video_patches(8, 30, 50) == rows
    assert small.get_num_of_video_patches(8, 30, 50, {"size": {"longest_edge": 112}}) > rows


# What a video may be


def test_every_kind_of_video_gives_the_same_input(small, video_file):
    path = str(video_file)
    expected = small(path)
    with open(path, "rb") as file:
        data = file.read()
    for given in [video_file, data, bytearray(data), io.BytesIO(data), open(path, "rb")]:
        torch.testing.assert_close(small(given)["pixel_values_videos"], expected["pixel_values_videos"])


def test_layouts_and_colours_of_arrays(small):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 28, 56, 3), dtype=np.uint8)
    expected = small(rgb, num_frames=4)["pixel_values_videos"]
    alpha = np.concatenate([rgb, np.full((4, 28, 56, 1), 7, np.uint8)], -1)
    read_only = rgb.copy()
    read_only.flags.writeable = False
    same = [
        rgb.transpose(0, 3, 1, 2),
        torch.from_numpy(rgb),
        torch.from_numpy(rgb).permute(0, 3, 1, 2),
        rgb.astype(np.float64),
        alpha,
        alpha.transpose(0, 3, 1, 2),
        list(rgb),
        tuple(rgb),
        [torch.from_numpy(frame) for frame in rgb],
        [Image.fromarray(frame) for frame in rgb],
        [Image.fromarray(frame, "RGBA") for frame in alpha],
        [[Image.fromarray(frame) for frame in rgb]],
        rgb[None],
        read_only,
        rgb[::-1][::-1],
    ]
    for given in same:
        torch.testing.assert_close(small(given, num_frames=4)["pixel_values_videos"], expected)
    scaled = small(rgb / np.float32(255), num_frames=4, do_rescale=False)["pixel_values_videos"]
    torch.testing.assert_close(scaled, expected)

    grey = rgb[..., :1]
    expected = small(grey.repeat(3, -1), num_frames=4)["pixel_values_videos"]
    for given in [
        grey,
        grey.transpose(0, 3, 1, 2),
        list(grey[..., 0]),
        [Image.fromarray(frame) for frame in grey[..., 0]],
    ]:
        torch.testing.assert_close(small(given, num_frames=4)["pixel_values_videos"], expected)


def test_grey_arrays_are_a_video_where_they_can_be_no_picture(small):
    grey = np.ascontiguousarray(numbered(10)[..., 0])
    expected = small(grey[..., None], num_frames=4)["pixel_values_videos"]
    for given in (grey, torch.from_numpy(grey), grey.astype(np.float32), [[grey]]):
        torch.testing.assert_close(small(given, num_frames=4)["pixel_values_videos"], expected)
    two = small([grey, grey[::-1]], num_frames=4)
    assert frame_numbers(two) == [0, 3, 6, 9] and frame_numbers(two, 1) == [9, 6, 3, 0]
    for picture in (grey[0], grey[:3], grey[:1], grey[:, :, :3]):  # the last three may have these as channels
        assert small(picture)["video_grid_thw"][0, 0] == 1


@pytest.mark.parametrize("view", [slice(None, None, -1), slice(0, 1), slice(4, 3, -1), slice(None, None, 2)], ids=str)
def test_any_view_of_an_array_is_read(small, view):
    frames = np.ascontiguousarray(numbered(8))
    for array in (frames[view], np.ascontiguousarray(frames[..., ::-1])[view, :, ::-1]):
        expected = small(np.array(array), num_frames=1)["pixel_values_videos"]
        assert torch.equal(small(array, num_frames=1)["pixel_values_videos"], expected)


def test_kinds_mix_in_one_call(small, video_file):
    pil = [Image.fromarray(frame) for frame in numbered(8)]
    inputs = small([str(video_file), numbered(8), pil, torch.zeros(4, 3, 28, 56, dtype=torch.uint8)])
    assert inputs["video_grid_thw"].tolist() == [[8, 4, 4], [8, 4, 4], [8, 4, 4], [8, 2, 4]]
    nested = small([[str(video_file), numbered(8)], [], [pil]])  # as a chat template gathers them
    assert len(nested["video_grid_thw"]) == 3


# Settings and errors


def test_the_settings_given_last_decide_between_num_frames_and_fps(small, video_file):
    by_rate = VideoPandaVideoProcessor(size={"longest_edge": 56}, fps=2)
    assert by_rate.num_frames is None
    assert len(frame_numbers(by_rate(str(video_file)))) == 4
    assert len(frame_numbers(by_rate(str(video_file), num_frames=12))) == 12
    assert len(frame_numbers(small(str(video_file), fps=2))) == 4


@pytest.mark.parametrize("num_frames", [2, 6, 7])
def test_a_number_of_frames_that_is_no_whole_number_of_clips_is_an_error(small, num_frames):
    with pytest.raises(ValueError, match=f"not {num_frames}"):
        small(numbered(20), num_frames=num_frames)
    with pytest.raises(ValueError, match=f"not {num_frames}"):
        small(numbered(num_frames), do_sample_frames=False)


@pytest.mark.parametrize(
    ("video", "kwargs", "message"),
    [
        (numbered(8), {"num_frames": 4, "fps": 1}, "mutually exclusive"),
        (numbered(8), {"fps": 1}, "needs the video's own rate"),
        (numbered(8), {"fps": 1, "max_frames": 6, "video_metadata": {"total_num_frames": 8, "fps": 1}}, "not 6"),
        (numbered(8), {"video_metadata": {"total_num_frames": 9}}, "says 9 frames, the video has 8"),
        (numbered(8), {"video_metadata": [{"total_num_frames": 8}] * 2}, "1 videos, but 2 entries"),
        (numbered(8), {"size": {"longest_edge": 50}}, "50, is not a multiple of 28"),
        (numbered(8), {"size": {"height": 28, "width": 28}}, "longest_edge"),
        (numbered(8) / 255, {}, "do_rescale=False"),
        (numbered(8).astype(np.int64), {}, "uint8 or floating point"),
        ([numbered(1)[0], numbered(1, 30)[0]], {"do_sample_frames": False}, "differ in shape"),
        (np.zeros((4, 2, 28, 56), np.uint8), {}, "channel"),
        (numbered(0), {}, "without frames"),
        ([], {}, "no video"),
        (3, {}, "not int"),
        (b"no video at all", {}, "video"),
        ({"start": 1.0}, {}, r'has \["start"\]'.replace('"', "'")),
        ({"video": numbered(8), "start": 1.0}, {}, "cut by slicing"),
        ({"video": "clip.mp4", "strat": 1.0}, {}, "strat"),
        (numbered(8), {"decode_limits": {"max_sides": 3}}, "max_sides"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_says_why(small, video, kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(video, **kwargs)


def test_settings_survive_saving_and_pickling(tmp_path):
    processor = VideoPandaVideoProcessor(size={"longest_edge": 112}, fps=2, max_frames=32, frames_per_clip=8)
    processor.save_pretrained(tmp_path)
    for loaded in [AutoVideoProcessor.from_pretrained(tmp_path), pickle.loads(pickle.dumps(processor))]:
        assert type(loaded) is VideoPandaVideoProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert (loaded.num_frames, loaded.fps, loaded.max_frames, loaded.frames_per_clip) == (None, 2, 32, 8)


@pytest.mark.gpu
def test_a_video_can_be_processed_on_the_gpu(small):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    video = scene(97, 131)[None].repeat(4, 0)
    on_gpu = small(video, num_frames=4, device="cuda")
    assert on_gpu["pixel_values_videos"].is_cuda
    difference = (pixels(on_gpu.to("cpu")) - pixels(small(video, num_frames=4))).abs()
    assert (difference < 1.01).float().mean() >= 0.99


# What engines ask for


def test_frames_that_are_sampled_already_keep_the_metadata_of_their_file(small):
    clip = np.zeros((4, 28, 28, 3), np.uint8)
    known = {"total_num_frames": 100, "fps": 25, "frames_indices": [0, 30, 60, 90]}
    for metadata, indices in [(known, [0, 30, 60, 90]), ({"total_num_frames": 100, "fps": 25}, None)]:
        given = {"video_metadata": [metadata], "do_sample_frames": False, "return_metadata": True}
        (kept,) = small(clip, **given)["video_metadata"]
        assert (kept.total_num_frames, kept.fps, kept.frames_indices) == (100, 25, indices)
    with pytest.raises(ValueError, match="video_metadata says 100 frames, the video has 4"):
        small(clip, video_metadata=[known])


def test_inputs_are_numpy_arrays_or_cast_without_touching_the_grids(small):
    clip = np.zeros((4, 28, 28, 3), np.uint8)
    arrays, tensors = small(clip, return_tensors="np"), small(clip, return_tensors="pt")
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    assert arrays["pixel_values_videos"].dtype == np.float32 and arrays["video_grid_thw"].dtype == np.int64
    cast = tensors.to(torch.bfloat16)
    assert cast["pixel_values_videos"].dtype == torch.bfloat16 and cast["video_grid_thw"].dtype == torch.int64


def test_engines_find_the_step_of_frame_counts(small):
    assert small.temporal_patch_size == small.frames_per_clip == 4
    assert "temporal_patch_size" not in small.to_dict()
