"""Videos and pictures in columns of `datasets`, as files, as bytes and as objects: in training and in messages."""

import base64
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny_models import model_with_processor
from helpers.tiny_tokenizers import chatml_tokenizer
from helpers.video_files import VideoSpec
from video_panda_hf.training import ConversationError, VideoPandaDataCollator, load_conversations


datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def without_torchcodec(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)


@pytest.fixture(scope="module")
def processor():
    return model_with_processor(chatml_tokenizer())[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    VideoSpec("wide.mp4", "libx264", width=64, height=32, frames=16).write(folder)
    VideoSpec("square.mp4", "libx264", width=32, height=32, frames=16).write(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


def turns(question):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "A red ball."}]


def part(kind, **given):
    return [{"type": kind, **given}, {"type": "text", "text": "What?"}]


def batch_of(rows, processor):
    return VideoPandaDataCollator(processor)(list(rows))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def expected(folder, processor):
    """The batches of plain rows, by what stands in them."""
    rows = {
        "video": [{"video": "wide.mp4", "messages": turns("<video>What?")}],
        "videos": [{"videos": ["wide.mp4", "square.mp4"], "messages": turns("<video><video>What?")}],
        "both": [{"videos": ["wide.mp4"], "images": ["photo.png"], "messages": turns("<image><video>What?")}],
        "image": [{"image": "photo.png", "messages": turns("<image>What?")}],
    }
    return {name: batch_of(load_conversations(row, folder), processor) for name, row in rows.items()}


def tables(folder):
    """For each kind of columns a dataset with one row, and which of `expected` it is."""
    path = {name: str(folder / name) for name in ("wide.mp4", "square.mp4", "photo.png")}
    bytes_of = {name: {"path": name, "bytes": (folder / name).read_bytes()} for name in path}
    video, image = datasets.Video(), datasets.Image()

    def table(row, **types):
        made = datasets.Dataset.from_list([row])
        features = made.features.copy()
        features.update(types)
        return made.cast(features)

    lists = getattr(datasets, "List", datasets.Sequence)
    one, two = turns("<video>What?"), turns("<video><video>What?")
    mixed = turns("<image><video>What?")
    return {
        "a column of videos by path": ("video", table({"video": path["wide.mp4"], "messages": one}, video=video)),
        "a column of videos by bytes": ("video", table({"video": bytes_of["wide.mp4"], "messages": one}, video=video)),
        "a column of structs": ("video", table({"video": bytes_of["wide.mp4"], "messages": one})),
        "a column of bytes": ("video", table({"video": bytes_of["wide.mp4"]["bytes"], "messages": one})),
        "a column of lists": (
            "videos",
            table({"videos": [path["wide.mp4"], path["square.mp4"]], "messages": two}, videos=lists(video)),
        ),
        "lists of both": (
            "both",
            table(
                {"videos": [bytes_of["wide.mp4"]], "images": [bytes_of["photo.png"]], "messages": mixed},
                videos=lists(video),
                images=lists(image),
            ),
        ),
        "a column of pictures": (
            "image",
            table({"image": path["photo.png"], "messages": turns("<image>What?")}, image=image),
        ),
        "a part of a message": (
            "video",
            table(
                {
                    "messages": [
                        {"role": "user", "content": part("video", video=bytes_of["wide.mp4"])},
                        {"role": "assistant", "content": part("text", text="A red ball.")[:1]},
                    ]
                }
            ),
        ),
    }


NAMES = ["a column of videos by path", "a column of videos by bytes", "a column of structs", "a column of bytes"]
NAMES += ["a column of lists", "lists of both", "a column of pictures", "a part of a message"]


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_datasets_are_read_as_files_are(folder, processor, expected, tmp_path, name):
    which, table = tables(folder)[name]
    table.to_parquet(tmp_path / "data.parquet")
    for source in (table, tmp_path / "data.parquet"):
        for streaming in (False, True):
            found = load_conversations(source, folder, streaming=streaming)
            assert_same(batch_of(found, processor), expected[which])


@pytest.mark.parametrize(("kind", "name"), [("video", "wide.mp4"), ("image", "photo.png")])
def test_folders_with_metadata_are_data_sets(folder, processor, expected, tmp_path, kind, name):
    shutil.copy(folder / name, tmp_path / name)
    row = {
        "file_name": name,
        "conversations": [{"from": "human", "value": f"<{kind}>What?"}, {"from": "gpt", "value": "A red ball."}],
    }
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    table = datasets.load_dataset(f"{kind}folder", data_dir=str(tmp_path), split="train")
    for source in (table, tmp_path):
        assert_same(batch_of(load_conversations(source), processor), expected[kind])


def test_the_collator_takes_columns_too(folder, processor, expected):
    which, table = tables(folder)["a column of pictures"]
    assert_same(batch_of(table, processor), expected[which])
    row = {"videos": [{"path": "x", "bytes": (folder / n).read_bytes()} for n in ("wide.mp4", "square.mp4")]}
    assert_same(batch_of([{**row, "messages": turns("<video><video>What?")}], processor), expected["videos"])


def parts(folder):
    """Every form of a video and a picture that is a file or becomes one, as a part of a message."""
    video, photo = (folder / "wide.mp4"), (folder / "photo.png")
    encoded = {file: base64.b64encode(file.read_bytes()).decode() for file in (video, photo)}
    url = f"data:image/png;base64,{encoded[photo]}"
    return [
        ("video", {"type": "video", "video": video}),
        ("video", {"type": "video", "path": str(video)}),
        ("video", {"type": "video", "url": f"data:video/mp4;base64,{encoded[video]}"}),
        ("video", {"type": "video", "video": video.read_bytes()}),
        ("video", {"type": "video", "bytes": video.read_bytes()}),
        ("video", {"type": "video", "video": {"path": "any.mp4", "bytes": video.read_bytes()}}),
        ("video", {"type": "video", "video": {"path": str(video), "bytes": None}}),
        ("video", {"type": "video", "video": open(video, "rb")}),
        ("video", {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{encoded[video]}"}}),
        ("image", {"type": "image", "image": Image.open(photo)}),
        ("image", {"type": "image", "image": {"path": "any.png", "bytes": photo.read_bytes()}}),
        ("image", {"type": "image", "image": photo.read_bytes()}),
        ("image", {"type": "image", "base64": encoded[photo]}),
        ("image", {"type": "image", "url": url}),
        ("image", {"type": "image_url", "image_url": {"url": url}}),
    ]


@pytest.mark.parametrize("number", range(15))
def test_what_rows_may_have_messages_may_have_and_the_reverse(folder, processor, expected, number):
    kind, given = parts(folder)[number]
    messages = turns([given, {"type": "text", "text": "What?"}])
    in_training = batch_of(load_conversations([{"messages": messages}]), processor)
    assert_same(in_training, expected[kind])
    kind, given = parts(folder)[number]  # a file object is read once
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(turns([given, {"type": "text", "text": "What?"}]), **options)
    for name, value in inputs.items():
        assert torch.equal(value, expected[kind][name]), name


def test_the_processor_takes_what_columns_have_beside_text(folder, processor):
    file = {"path": "any.mp4", "bytes": (folder / "wide.mp4").read_bytes()}
    photo = {"path": str(folder / "photo.png"), "bytes": None}
    found = processor(text="<image><video>", videos=[file], images=[photo], return_tensors="pt")
    plain = processor(
        text="<image><video>", videos=[folder / "wide.mp4"], images=[folder / "photo.png"], return_tensors="pt"
    )
    assert torch.equal(found["pixel_values_videos"], plain["pixel_values_videos"])


def test_frames_in_memory_are_no_data(folder):
    frames = np.zeros((8, 4, 4, 3), np.uint8)
    with pytest.raises(ConversationError, match="a video is a path, a URL or a file's bytes here, not ndarray"):
        load_conversations([{"messages": turns(part("video", video=frames))}])
    with pytest.raises(ConversationError, match="'start' of video is a number, not 'now'"):
        load_conversations([{"messages": turns(part("video", video="a.mp4", start="now"))}])


def test_rows_with_many_bytes_are_converted_in_stretches(folder, monkeypatch):
    monkeypatch.setattr("video_panda_hf.training.data.BYTES_AT_ONCE", 10)
    lengths, from_list = [], datasets.Dataset.from_list
    monkeypatch.setattr(
        datasets.Dataset, "from_list", lambda rows, **options: lengths.append(len(rows)) or from_list(rows, **options)
    )
    rows = [{"video": bytes(6), "messages": turns("<video>What?")} for _ in range(5)]
    assert len(load_conversations(rows)) == 5 and lengths == [2, 2, 1]
