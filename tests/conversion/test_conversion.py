"""Reference checkpoints become this model: every tensor accounted for, or an error and nothing written."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.hub_server import LoopbackHub
from helpers.reference_checkpoint import (
    CANVAS,
    VOCAB_SIZE,
    eve_tensors,
    golden,
    reference_llm,
    reference_tensors,
    tiny_tokenizer,
    to_patches,
    write_reference,
)
from video_panda_hf import VideoPandaForConditionalGeneration, conversion
from video_panda_hf.conversion import ConversionError, convert_checkpoint, files, main


PREFIX = "model.vision_tower."
EMBEDDINGS = "model.language_model.embed_tokens.weight"


@pytest.fixture
def convert(tmp_path):
    """Writes a reference checkpoint of these tensors and converts it."""

    def write_and_convert(tensors=None, options=None, **source) -> Path:
        folder = write_reference(tmp_path / "source", tensors, **source)
        return convert_checkpoint(folder, tmp_path / "target", quiet=True, **(options or {}))

    return write_and_convert


def assert_refused(source: Path, *messages: str, **options):
    """The conversion fails with all of these in its message, and leaves nothing behind."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(source, source.parent / "target", quiet=True, **options)
    for message in messages:
        assert message in str(error.value)
    assert sorted(source.parent.iterdir()) == before


def load(folder: Path, **options):
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@torch.no_grad()
def video_logits(model) -> torch.Tensor:
    patches, grid = to_patches(golden()[0]["wide.pixels"])
    video, row = model.config.video_token_id, model.config.row_token_id
    frame = [video] + ([video] * (grid[2] // 2) + [row]) * (grid[1] // 2)
    ids = torch.tensor([[1, 300, *(frame * grid[0]), 301, 302]])
    return model(input_ids=ids, pixel_values_videos=patches, video_grid_thw=torch.tensor([grid])).logits


@pytest.fixture(scope="module")
def expected_logits(tmp_path_factory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("expected")
    return video_logits(load(convert_checkpoint(write_reference(folder / "source"), folder / "target", quiet=True)))


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize(("shards", "max_shard_size"), [(1, "5GB"), (3, "100KB")])
def test_the_same_model_from_every_format_in_files_of_any_size(
    convert, expected_logits, monkeypatch, kind, shards, max_shard_size
):
    monkeypatch.setattr(files, "CHUNK_ELEMENTS", 5000)
    monkeypatch.setattr(files, "MAPPED_BYTES", 200_000)
    target = convert(kind=kind, shards=shards, options={"max_shard_size": max_shard_size})
    written = list(target.glob("*.safetensors"))
    assert len(written) == 1 if shards == 1 else len(written) > 3 and max(f.stat().st_size for f in written) < 110_000
    # The rows of the two new tokens are sums of chunks, so that their last bit may differ.
    torch.testing.assert_close(video_logits(load(target)), expected_logits, rtol=0, atol=1e-6)


def test_text_gets_the_logits_of_the_checkpoints_llm(convert):
    model, llm, ids = load(convert()), reference_llm(), torch.arange(5, 40)[None]
    assert torch.equal(model(ids).logits[..., :VOCAB_SIZE], llm(ids).logits)


def test_the_two_new_tokens_have_the_mean_of_all_others(convert):
    weights, llm = load_weights(convert()), reference_llm()
    for name, old in {EMBEDDINGS: llm.get_input_embeddings().weight, "lm_head.weight": llm.lm_head.weight}.items():
        assert torch.equal(weights[name][:-2], old)
        assert torch.allclose(weights[name][-2:], old.mean(0).expand(2, -1), atol=1e-7)


def test_tied_embeddings_are_one_tensor(convert):
    tensors = reference_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    target = convert(tensors, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_weights(target)
    model = load(target)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_the_type_of_all_weights(convert, dtype):
    target = convert(options={"dtype": dtype}, kind="safetensors")
    weights = load_weights(target)
    tracked = weights.pop(PREFIX + "lste.norm.num_batches_tracked")
    assert tracked.dtype == torch.int64
    assert {value.dtype for value in weights.values()} == {getattr(torch, dtype)}
    assert load(target).dtype == getattr(torch, dtype)


def test_without_dtype_weights_keep_their_bits(convert):
    tensors = reference_tensors(torch.bfloat16)
    target = convert(tensors)
    weights = load_weights(target)
    assert torch.equal(weights[PREFIX + "dpe.weight"], tensors["model.video_tower.dpe.weight"])
    query, key, value = tensors["model.video_tower.dec.attn.in_proj_weight"].chunk(3)
    assert torch.equal(weights[PREFIX + "gstra.attention.query.weight"], query)
    assert torch.equal(weights[PREFIX + "gstra.attention.key_weight"], key)
    assert torch.equal(weights[PREFIX + "gstra.attention.value_weight"], value)
    assert load(target).dtype == torch.bfloat16


def test_a_converted_folder_answers_a_question_about_a_video(convert):
    target = convert()
    processor = AutoProcessor.from_pretrained(target)
    model = AutoModelForImageTextToText.from_pretrained(target)
    video = torch.randint(0, 256, (8, 3, 40, 64), dtype=torch.uint8)
    content = [{"type": "video", "video": video}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["video_grid_thw"].tolist() == [[8, 10, 16]]
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    assert (model.config.video_token_id, model.config.row_token_id) == (VOCAB_SIZE, VOCAB_SIZE + 1)
    assert model.config.text_config.vocab_size == VOCAB_SIZE + 2


def test_the_checkpoint_says_which_tokens_begin_end_and_pad(tmp_path):
    source = write_reference(tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.9, "do_sample": false}')
    config = load(convert_checkpoint(source, tmp_path / "target", quiet=True)).generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 7], 0)


# --- EVE, where training starts ---


def test_eve_fills_what_it_has_and_the_rest_gets_fixed_initial_values(tmp_path, caplog):
    source = write_reference(tmp_path / "eve", eve_tensors(), model_type="eve")
    first, second = (load_weights(convert_checkpoint(source, tmp_path / name, quiet=True)) for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first | second)
    assert torch.equal(first[PREFIX + "fsra.class_embedding"], eve_tensors()["model.vision_tower.class_embedding"])
    assert first[PREFIX + "lste.expand.weight"].count_nonzero() == 0
    assert first[PREFIX + "lste.reduce.weight"].std() > 0
    assert "initial values" in caplog.text and PREFIX + "gstra.query" in caplog.text
    assert torch.isfinite(video_logits(load(tmp_path / "a"))).all()


@pytest.mark.parametrize("is_eve", [True, False])
def test_the_golden_picture_goes_through_processor_and_model(tmp_path, is_eve):
    """The golden files have the picture's pixels after its resizing, so that is the one step which is left out here;
    the size it leads to is checked."""
    tensors, cases = golden()
    made_of = {"tensors": eve_tensors(), "model_type": "eve"} if is_eve else {}
    folder = convert_checkpoint(write_reference(tmp_path / "source", **made_of), tmp_path / "converted", quiet=True)
    processor = AutoProcessor.from_pretrained(folder)
    model = VideoPandaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    case, (pixels,) = cases["image"], tensors["image.pixels"]
    messages = [{"role": "user", "content": [{"type": "image", "image": pixels}, {"type": "text", "text": "What?"}]}]
    as_it_is = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=as_it_is,
    )
    assert inputs["video_grid_thw"].tolist() == [[1, case["rows"], case["cols"]]]
    source = Image.new("RGB", case["source"])
    assert processor(images=source)["video_grid_thw"].tolist() == [[1, case["rows"], case["cols"]]]

    grids = inputs["video_grid_thw"]
    (features,) = model.get_video_features(inputs["pixel_values_videos"], grids).pooler_output
    assert (features - tensors["image.features"][0]).abs().max() <= 1e-5
    h, w = case["token_grid"]
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    start, end = tokens.index("<video>"), len(tokens) - tokens[::-1].index("<row>")
    assert tokens[start:end] == ["<video>"] + h * (w * ["<video>"] + ["<row>"]) and len(features) == end - start
    assert tokens[start - 6 : start] == ["U", "S", "E", "R", ":", "▁"]
    assert tokens[end : end + 4] == ["▁", "<0x0A>", "W", "h"]
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > end


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"model_type": "eve"}, 672),
        ({"model_type": "eve", "mm_vision_tower": "openai/eve-patch14-anypixel-1344"}, 1344),
        ({"model_type": "eve", "mm_vision_tower": "openai/eve-patch14-anypixel-1344", "image_size": 64}, 64),
        ({"model_type": "videopanda"}, 32 * 4),
    ],
)
def test_eve_takes_pictures_of_its_own_size(tmp_path, config, size):
    source = write_reference(tmp_path / "source", eve_tensors() if config["model_type"] == "eve" else None)
    flat = json.loads((source / "config.json").read_text())
    del flat["image_size"]
    (source / "config.json").write_text(json.dumps({**flat, **config}))
    folder = convert_checkpoint(source, tmp_path / "converted", quiet=True)
    assert VideoPandaForConditionalGeneration.from_pretrained(folder).config.vision_config.image_size == size
    assert AutoProcessor.from_pretrained(folder).video_processor.size["longest_edge"] == size


@pytest.mark.parametrize(
    "lost", ["model.vision_tower.class_embedding", "model.mm_projector.2.bias", "model.layers.1.mlp.up_proj.weight"]
)
def test_eve_may_lack_only_what_eve_never_has(tmp_path, lost):
    tensors = eve_tensors()
    del tensors[lost]
    name = lost.replace("vision_tower", "video_tower").replace("mm_projector", "video_projector")
    assert_refused(write_reference(tmp_path / "source", tensors, model_type="eve"), "lacks 1 tensors", name)


# --- Every key is accounted for ---


@pytest.mark.parametrize("left_out", ["vision_tower", "video_tower"])
def test_one_of_two_copies_is_enough(convert, expected_logits, left_out):
    tensors = {key: value for key, value in reference_tensors().items() if f"model.{left_out}." not in key}
    assert torch.equal(video_logits(load(convert(tensors))), expected_logits)


@pytest.mark.parametrize("name", ["vision_tower.dec.attn.in_proj_bias", "mm_projector.0.weight"])
def test_copies_that_differ_in_one_bit_are_an_error(tmp_path, name):
    tensors = reference_tensors()
    tensors[f"model.{name}"].view(torch.int32).view(-1)[-1] ^= 1
    original = name.replace("vision_tower", "video_tower").replace("mm_projector", "video_projector")
    assert_refused(write_reference(tmp_path / "source", tensors), f"model.{name}", f"model.{original}", "differ")


@pytest.mark.parametrize(
    "key",
    [
        "model.video_tower.lste.weight",
        "model.video_tower.local_attention.kv.1.bias",
        "model.layers.2.mlp.up_proj.weight",
        "model.embed_tokens.bias",
        "video_tower.dpe.weight",
        "lm_head.bias",
    ],
)
def test_an_unknown_key_is_an_error(tmp_path, key):
    tensors = {**reference_tensors(), key: torch.ones(3)}
    assert_refused(write_reference(tmp_path / "source", tensors), f"`{key}` in pytorch_model.bin", "unknown")


@pytest.mark.parametrize(
    "key", ["model.video_tower.dpe.bias", "model.video_tower.lmhra1.pos_embed.0.running_var", "lm_head.weight"]
)
def test_a_missing_key_is_an_error(tmp_path, key):
    tensors = reference_tensors()
    for copy in {key, key.replace("video_tower", "vision_tower")}:
        del tensors[copy]
    assert_refused(write_reference(tmp_path / "source", tensors), f"lacks 1 tensors: `{key}`")


@pytest.mark.parametrize(
    ("key", "shape", "asked"),
    [
        ("model.embed_tokens.weight", (VOCAB_SIZE + 1, 32), (VOCAB_SIZE, 32)),
        ("lm_head.weight", (VOCAB_SIZE - 1, 32), (VOCAB_SIZE, 32)),
        ("model.layers.0.mlp.up_proj.weight", (32, 64), (64, 32)),
        ("model.video_tower.dpe.weight", (64, 3, 3, 3), (64, 1, 3, 3, 3)),
        ("model.video_tower.dec.attn.in_proj_weight", (189, 64), (64, 64)),
        ("model.video_tower.dec.attn.in_proj_weight", (191, 64), "3 tensors"),
        ("model.video_tower.lmhra1.pos_embed.1.weight", (42, 32, 2, 1, 1), "length 1"),
        ("model.video_tower.temporal_cls_token", (1, 64, 1), "length 1"),
        ("model.video_tower.patch_embedding.weight", (64, 3, 4, 8), "(hidden, 3, patch, patch)"),
        ("model.video_tower.patch_embedding.weight", (32, 3, 4, 4), "video_hidden_size"),
    ],
)
def test_a_wrong_shape_is_an_error_with_both_shapes(tmp_path, key, shape, asked):
    tensors = {k: v for k, v in reference_tensors().items() if "vision_tower." not in k}
    tensors[key] = torch.ones(shape)
    assert_refused(write_reference(tmp_path / "source", tensors), key, str(shape), str(asked))


def test_quantised_weights_are_an_error(tmp_path):
    tensors = {**reference_tensors(), "lm_head.weight": torch.ones(VOCAB_SIZE, 32, dtype=torch.int8)}
    assert_refused(write_reference(tmp_path / "source", tensors), "lm_head.weight", "int8")


# --- Files that are damaged, or that want more than to be read ---


class Attack:
    """Unpickling it would call a function that creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("save", [torch.save, lambda value, file: Path(file).write_bytes(pickle.dumps(value))])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, save):
    source = write_reference(tmp_path / "source")
    save({**reference_tensors(), "model.extra": Attack(tmp_path / "attacked")}, source / "pytorch_model.bin")
    assert_refused(source, "pytorch_model.bin")
    assert not (tmp_path / "attacked").exists()
    assert torch.load(source / "pytorch_model.bin", weights_only=False) if save is torch.save else True
    assert (tmp_path / "attacked").exists() == (save is torch.save)  # the attack is one


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.0])
def test_a_truncated_shard_is_an_error(tmp_path, kind, kept):
    source = write_reference(tmp_path / "source", kind=kind, shards=2)
    shard = sorted(source.glob(f"*-00002-of-*.{kind}"))[0]
    shard.write_bytes(shard.read_bytes()[: int(kept * shard.stat().st_size)])
    assert_refused(source, shard.name, "damaged")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_an_error(tmp_path, kind, with_index):
    source = write_reference(tmp_path / "source", kind=kind, shards=3)
    shard = sorted(source.glob(f"*-00003-of-*.{kind}"))[0]
    shard.unlink()
    if not with_index:
        next(source.glob("*.index.json")).unlink()
    assert_refused(source, "lacks a part of its weights", shard.name)


@pytest.mark.parametrize(
    "name", ["../outside.bin", "{root}/outside.bin", "sub/../../outside.bin", "..\\outside.bin", ".."]
)
def test_an_index_that_leads_out_of_the_folder_is_an_error(tmp_path, name):
    source = write_reference(tmp_path / "source", shards=2)
    name = name.format(root=tmp_path)
    (source / "pytorch_model-00002-of-00002.bin").rename(tmp_path / "outside.bin")
    index = source / "pytorch_model.bin.index.json"
    places = json.loads(index.read_text())["weight_map"]
    places = {key: name if "00002" in file else file for key, file in places.items()}
    index.write_text(json.dumps({"weight_map": places}))
    assert_refused(source, index.name, repr(name))


@pytest.mark.parametrize("with_index", [True, False])
def test_a_link_that_leads_out_of_the_folder_is_an_error(tmp_path, with_index):
    source = write_reference(tmp_path / "source", shards=2)
    shard = source / "pytorch_model-00002-of-00002.bin"
    shard.rename(tmp_path / "outside.bin")
    shard.symlink_to("../outside.bin")
    if not with_index:
        (source / "pytorch_model.bin.index.json").unlink()
    assert_refused(source, shard.name, "link", str(tmp_path / "outside.bin"))


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--user--name" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    write_reference(snapshot)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / f"of-{file.name}")
        file.symlink_to(f"../../blobs/of-{file.name}")
    assert (convert_checkpoint(snapshot, tmp_path / "target", quiet=True) / "model.safetensors").exists()


def test_an_index_that_contradicts_the_files_is_an_error(tmp_path):
    source = write_reference(tmp_path / "source", shards=2)
    index = source / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "pytorch_model-00002-of-00002.bin"
    index.write_text(json.dumps(content))
    assert_refused(source, "`lm_head.weight`", "index")


def test_a_key_in_two_files_is_an_error(tmp_path):
    source = write_reference(tmp_path / "source", kind="bin", shards=2)
    next(source.glob("*.index.json")).unlink()
    shard = source / "pytorch_model-00002-of-00002.bin"
    torch.save({**torch.load(shard), "lm_head.weight": torch.ones(VOCAB_SIZE, 32)}, shard)
    assert_refused(source, "`lm_head.weight` is in two files")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_attention_heads": 5}, "Llama"),
        ({"image_size": 60}, "image_size"),
    ],
)
def test_a_config_that_describes_no_reference_model_is_an_error(tmp_path, config, message):
    assert_refused(write_reference(tmp_path / "source", **config), message)


def test_a_folder_without_weights_or_config_is_an_error(tmp_path):
    source = write_reference(tmp_path / "source")
    (source / "pytorch_model.bin").unlink()
    assert_refused(source, "has no weights")
    (source / "config.json").unlink()
    assert_refused(source, "config.json")


def test_a_target_that_holds_something_is_left_alone(tmp_path):
    source, target = write_reference(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    assert_refused(source, "target is there already")
    assert [file.name for file in target.iterdir()] == ["mine"]


def test_an_empty_target_is_filled_and_an_unfinished_one_never_seen(tmp_path, monkeypatch):
    source, target = write_reference(tmp_path / "source"), tmp_path / "target"
    target.mkdir()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("video_panda_hf.processing.VideoPandaProcessor.save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, target, quiet=True)
    assert list(target.iterdir()) == [] and len(list(tmp_path.iterdir())) == 2
    assert convert_checkpoint(source, target, quiet=True) == target
    assert (target / "model.safetensors").exists()


def test_too_little_room_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    source = write_reference(tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert_refused(source, str(tmp_path), "0.0 GB of room")


def forked(function: Callable, *arguments) -> multiprocessing.Process:
    """Runs a function in a forked process, which needs no new imports."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, capfd):
    source = write_reference(tmp_path / "source")

    def convert_without_room():
        torch.set_num_threads(1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond fails as on a full disk
        main([str(source), str(tmp_path / "target")])

    process = forked(convert_without_room)
    process.join()
    message = capfd.readouterr().err
    assert process.exitcode == 1 and "video-panda-convert: " in message and "Traceback" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_leaves_no_target_and_is_named_by_the_next(tmp_path, stop, caplog):
    source, target = write_reference(tmp_path / "source"), tmp_path / "target"

    def convert_slowly():
        torch.set_num_threads(1)
        conversion.convert.build_generation_config = lambda *_: time.sleep(60)
        main([str(source), str(target)])

    process = forked(convert_slowly)
    while not list(tmp_path.glob(".target.*/*/config.json")):  # all is written but the processor
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, stop)
    process.join()
    assert not target.exists()
    left = [str(path) for path in tmp_path.glob(".target.*.unfinished")]
    assert len(left) == (stop == signal.SIGKILL)
    assert convert_checkpoint(source, target, quiet=True) == target
    assert all(name in caplog.text for name in left) and ("was killed" in caplog.text) == bool(left)
    load(target)


# --- The tokenizer ---


def test_a_checkpoint_without_tokenizer_asks_for_one(tmp_path):
    source = write_reference(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    assert_refused(source, "--tokenizer")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    convert_checkpoint(source, tmp_path / "target", tokenizer=tmp_path / "tokenizer", quiet=True)
    assert len(AutoProcessor.from_pretrained(tmp_path / "target").tokenizer) == VOCAB_SIZE + 2


def test_a_tokenizer_of_another_model_is_an_error(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    assert_refused(write_reference(tmp_path / "source"), f"{VOCAB_SIZE + 1} tokens", tokenizer=tokenizer)


def test_llamas_own_tokenizer_file_reads_a_prompt_as_the_reference_does(tmp_path):
    """The reference reads the texts before and after a video one by one with sentencepiece, after a BOS."""
    sentencepiece = pytest.importorskip("sentencepiece")
    before, after = "the assistant answers. USER: ", "\nWhat is the answer? ASSISTANT:"
    text = tmp_path / "text"
    text.write_text("\n".join([before, after.strip(), "USER: What is it? ASSISTANT: the answer"] * 20))
    source = write_reference(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(source / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))

    processor = AutoProcessor.from_pretrained(convert_checkpoint(source, tmp_path / "target", quiet=True))
    video = torch.zeros(4, 3, CANVAS, CANVAS, dtype=torch.uint8)
    inputs = processor(text=before + "<video>" + after, videos=[video], num_frames=4)
    ids, placeholders = inputs["input_ids"][0], (processor.video_token_id, processor.row_token_id)
    first = ids.index(processor.video_token_id)
    last = len(ids) - 1 - ids[::-1].index(processor.row_token_id)
    assert ids[:first] == [1, *pieces.encode(before)]
    assert ids[last + 1 :] == pieces.encode(after)
    assert set(ids[first : last + 1]) == set(placeholders) == {300, 301}
    assert processor.tokenizer.pad_token == "<unk>"


# --- The command ---


def test_the_command_converts(tmp_path, capsys):
    source, target = write_reference(tmp_path / "source"), tmp_path / "target"
    main([str(source), str(target), "--dtype", "bfloat16", "--max-shard-size", "100KB", "--image-size", "32"])
    assert capsys.readouterr().out.strip() == str(target)
    model = load(target)
    assert model.dtype == torch.bfloat16 and model.config.vision_config.image_size == 32
    assert AutoProcessor.from_pretrained(target).video_processor.size["longest_edge"] == 32
    assert (target / "model.safetensors.index.json").exists()


@pytest.mark.slow
def test_the_command_pushes_and_keeps_the_folder_if_the_hub_refuses(tmp_path):
    write_reference(tmp_path / "source")
    script = """if True:
        import os
        from video_panda_hf.conversion import main
        main(["source", "a", "--push-to", "me/panda", "--private"])
        del os.environ["HF_TOKEN"]
        main(["source", "b", "--push-to", "me/panda", "--private"])
    """
    with LoopbackHub(tokens={"hf_me": "me"}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=hub.environment(tmp_path / "cache", token="hf_me"),
            capture_output=True,
            text=True,
        )
        assert hub.repositories["models", "me/panda"].private
        assert hub.files("me/panda")["model.safetensors"] == (tmp_path / "a" / "model.safetensors").read_bytes()
    printed = [str(tmp_path / "a"), f"{hub.endpoint}/me/panda/tree/main", str(tmp_path / "b")]
    assert done.stdout.splitlines() == printed
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"video-panda push {tmp_path / 'b'} me/panda --private" in done.stderr
    load(tmp_path / "b")


def test_an_impossible_repository_is_refused_before_the_conversion(tmp_path):
    with pytest.raises(SystemExit, match="not/a/name"):
        main([str(write_reference(tmp_path / "source")), str(tmp_path / "target"), "--push-to", "not/a/name"])
    assert not (tmp_path / "target").exists()


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path):
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / "nothing"), str(tmp_path / "target")])
    assert "video-panda-convert: " in str(exit.value) and "nothing is no folder" in str(exit.value)


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "SOURCE" in shown and "example:\n  video-panda-convert " in shown


def test_the_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="video-panda-convert")
    assert command.value == "video_panda_cli.convert:main" and callable(command.load())
