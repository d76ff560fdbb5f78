"""Pictures: videos of one frame, in any form, at any place among the videos of a prompt."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny_tokenizers import chatml_tokenizer
from video_panda_hf import VideoPandaProcessor
from video_panda_hf.decoding import NotAVideoError, VideoLimitError, VideoNotFoundError, decode_image
from video_panda_hf.processing import processing_video_panda, video_processing_video_panda


CLIP = np.full((4, 28, 56, 3), 200, np.uint8)
COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def processor() -> VideoPandaProcessor:
    return VideoPandaProcessor.from_text_pretrained(chatml_tokenizer(), image_size=56, num_frames=4)


def picture(colour: str = "red", size=(56, 28)) -> Image.Image:
    return Image.new("RGB", size, COLOURS[colour])


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colours(processor, inputs) -> list[str]:
    """The colour of every picture or video, by its first patch."""
    mean, std = (
        torch.tensor(processor.video_processor.__dict__.get(n) or getattr(processor.video_processor, n))
        for n in ("image_mean", "image_std")
    )
    starts = [0, *inputs["video_grid_thw"].prod(-1).cumsum(0).tolist()[:-1]]
    pixels = inputs["pixel_values_videos"][starts].reshape(len(starts), 3, -1).mean(-1)
    values = ((pixels * std + mean) * 255).round().int().tolist()
    names = {value: name for name, value in COLOURS.items()}
    return [names.get(tuple(value), str(value)) for value in values]


def ask(*content) -> list[dict]:
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]


def inputs_of(processor, messages, **kwargs):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


def test_a_picture_is_a_video_of_one_frame(processor):
    as_image = processor(text="a <image> b", images=picture(), return_tensors="pt")
    as_video = processor(text="a <video> b", videos=picture(), return_tensors="pt")
    assert (
        as_image.keys() == as_video.keys() == {"input_ids", "attention_mask", "pixel_values_videos", "video_grid_thw"}
    )
    assert all(as_image[key].equal(as_video[key]) for key in as_image)
    tokens = processor.tokenizer.convert_ids_to_tokens(as_image["input_ids"][0])
    assert as_image["video_grid_thw"].tolist() == [[1, 2, 4]]
    assert "".join(t for t in tokens if t in ("<video>", "<row>")) == "<video><video><video><row>"


def test_pictures_and_videos_are_packed_in_the_order_of_the_prompts(processor):
    texts = ["<image> <video> <image>", "none", "<video><image>"]
    clips = [np.full((4, 28, 56, 3), COLOURS[colour], np.uint8) for colour in ("green", "blue")]
    images = [[picture("red"), picture("blue")], [], [picture("green")]]
    nested = processor(
        text=texts, images=images, videos=[[clips[0]], [], [clips[1]]], padding=True, return_tensors="pt"
    )
    assert colours(processor, nested) == ["red", "green", "blue", "blue", "green"]
    assert nested["video_grid_thw"][:, 0].tolist() == [1, 4, 1, 4, 1]
    flat = processor(
        text=texts,
        images=[image for of_prompt in images for image in of_prompt],
        videos=clips,
        padding=True,
        return_tensors="pt",
    )
    assert all(flat[key].equal(nested[key]) for key in nested)
    rows = (nested["input_ids"] == processor.row_token_id).sum(-1).tolist()
    assert rows == [1 + 4 + 1, 0, 4 + 1]


@pytest.mark.parametrize("nothing", [None, [], [[]], [None]])
def test_no_pictures_and_no_videos_are_all_alike(processor, nothing):
    expected = processor(text="Hello")
    assert processor(text="Hello", images=nothing) == expected
    assert processor(text="Hello", images=nothing, videos=[]) == expected
    with_clip = processor(text="<video>", images=nothing, videos=CLIP)
    assert with_clip["video_grid_thw"].tolist() == [[4, 2, 4]]


def test_pictures_without_text_come_before_videos(processor):
    inputs = processor(images=[picture()] * 2, videos=CLIP)
    assert inputs["video_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 4], [4, 2, 4]]


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image>", None, "Found total 1 <image> tokens and 0 images"),
        ("What?", [picture()], "Found total 0 <image> tokens and 1 images"),
        ("<video>", [picture()], "Found total 0 <image> tokens and 1 images"),
        ("<image>", [3], "an image is a PIL image, .* not int"),
        (
            "<image>",
            [{"file": "photo.png"}],
            r"'file' is no key of image: there are \['image', 'path', 'url', 'base64'\]",
        ),
    ],
)
def test_pictures_that_do_not_fit_are_an_error(processor, text, images, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images)


def test_metadata_belongs_to_videos_and_skips_pictures(processor):
    clip = np.zeros((20, 28, 56, 3), np.uint8)
    inputs = processor(
        text="<image><video>",
        images=picture(),
        videos=clip,
        fps=2,
        video_metadata=[{"total_num_frames": 20, "fps": 5}],
    )
    assert inputs["video_grid_thw"][:, 0].tolist() == [1, 8]


# Every form of a picture


def test_pictures_are_of_every_kind(processor, tmp_path):
    path = tmp_path / "photo.png"
    data = file_of(picture())
    path.write_bytes(data)
    coded = base64.b64encode(data).decode()
    array = np.array(picture())
    kinds = [
        picture(),
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array),
        str(path),
        path,
        data,
        io.BytesIO(data),
    ]
    kinds += [coded, f"data:image/png;base64,{coded}", {"path": str(path)}, {"base64": coded}]
    inputs = processor(text="<image>" * len(kinds), images=kinds, return_tensors="pt")
    assert colours(processor, inputs) == ["red"] * len(kinds)
    batch = processor(text="<image><image>", images=np.stack([array, array]), return_tensors="pt")
    assert colours(processor, batch) == ["red", "red"]

    parts = [{"type": "image", "image": kind} for kind in kinds[:-2]]
    parts += [{"type": "image", "path": str(path)}, {"type": "image", "url": str(path)}]
    parts += [
        {"type": "image", "base64": coded},
        {"type": "image_url", "image_url": {"url": str(path), "detail": "low"}},
    ]
    parts += [{"type": "image_url", "image_url": f"data:image/png;base64,{coded}"}]
    inputs = inputs_of(processor, [ask(part) for part in parts], padding=True)
    assert colours(processor, inputs) == ["red"] * len(parts)
    assert len({tuple(ids) for ids in inputs["input_ids"].tolist()}) == 1


def test_messages_mix_pictures_and_videos(processor):
    video = {"type": "video", "video": np.full((4, 28, 56, 3), COLOURS["green"], np.uint8)}
    images = [{"type": "image", "image": picture(colour)} for colour in ("red", "blue")]
    messages = [ask(images[0], video, images[1]), ask(), ask(video, images[1])]
    inputs = inputs_of(processor, messages, padding=True)
    assert colours(processor, inputs) == ["red", "green", "blue", "green", "blue"]
    assert "user\n<image>\n<video>\n<image>\nWhat?" in processor.apply_chat_template(messages[0])


def test_orientation_depth_alpha_and_palette_are_those_of_the_picture(processor, tmp_path):
    upright = np.zeros((28, 56, 3), np.uint8)
    upright[:, :28] = COLOURS["red"]
    turned = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    for image in (file_of(turned, exif=exif), Image.open(io.BytesIO(file_of(turned, exif=exif)))):
        inputs = processor(images=image, return_tensors="pt")
        assert inputs["video_grid_thw"].tolist() == [[1, 2, 4]]
        assert colours(processor, inputs) == ["red"]
    deep = Image.fromarray(np.full((28, 56), 257 * 100, np.uint16))
    transparent = Image.new("RGBA", (56, 28), (*COLOURS["blue"], 7))
    kinds = [deep, file_of(deep), transparent, file_of(transparent), file_of(picture("green").quantize(4))]
    expected = ["[100, 100, 100]"] * 2 + ["blue"] * 2 + ["green"]
    assert [colours(processor, processor(images=kind, return_tensors="pt"))[0] for kind in kinds] == expected


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG2000", "PCX"])
def test_every_format_that_pillow_reads(processor, kind):
    others = (
        {"save_all": True, "append_images": [picture("blue", (32, 32))]} if kind in ("GIF", "TIFF", "WEBP") else {}
    )
    options = {"lossless": True} if kind == "WEBP" else {"sizes": [(32, 32)]} if kind == "ICO" else {}
    data = file_of(picture("red", (32, 32)), kind, **others, **options)
    assert colours(processor, processor(images=data, return_tensors="pt")) == ["red"]  # the first of several


def test_what_is_no_picture_or_too_large_is_an_error(processor, tmp_path):
    with pytest.raises(VideoNotFoundError, match=r"no-such\.png"):
        processor(images="no-such.png")
    with pytest.raises(NotAVideoError, match="is not a picture"):
        processor(images=b"nothing like one")
    with pytest.raises(NotAVideoError, match="is not a picture"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # Pillow would start Ghostscript
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        decode_image(file_of(picture())[:-30])
    with pytest.raises(VideoLimitError, match="max_side"):
        processor(images=file_of(picture()), decode_limits={"max_side": 40})


def test_a_checkpoint_without_the_package_takes_pictures_too(processor, monkeypatch, tmp_path):
    data = file_of(picture())
    (tmp_path / "photo.png").write_bytes(data)
    kinds = [str(tmp_path / "photo.png"), tmp_path / "photo.png", data, picture(), base64.b64encode(data).decode()]
    messages = ask(*({"type": "image", "image": kind} for kind in kinds), {"type": "video", "video": CLIP})
    expected = inputs_of(processor, messages)
    monkeypatch.setattr(video_processing_video_panda, "decoding", None)
    monkeypatch.setattr(processing_video_panda, "literals", None)
    monkeypatch.setattr(processing_video_panda, "answers", None)
    plain = inputs_of(processor, messages)
    assert all(plain[key].equal(expected[key]) for key in expected)
    with pytest.raises(ImportError, match="pip install video-panda-hf"):
        inputs_of(processor, messages, return_assistant_tokens_mask=True)
