"""Checkpoints that are made to take all time or memory: a `ConversionError` that names the file, soon and cheaply."""

import multiprocessing
import os
import resource
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from helpers.reference_checkpoint import eve_tensors, reference_tensors, write_reference
from video_panda_hf.conversion import ConversionError, convert_checkpoint


ROOM = 300 * 2**20  # bytes of memory that a conversion may take beyond those of this process
SECONDS = 30


def refusal(source: Path, prepare: Callable = lambda: None, **options) -> str:
    """The message of the `ConversionError` in a process with little memory and time. It leaves nothing behind."""

    def convert(connection):
        torch.set_num_threads(1)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, in_use + ROOM))
        prepare()
        try:
            connection.send(
                f"converted to {convert_checkpoint(source, source.parent / 'target', quiet=True, **options)}"
            )
        except ConversionError as error:
            connection.send(str(error))
        except BaseException as error:
            connection.send(f"not a ConversionError, but {error!r:.1000}")

    before = sorted(source.parent.iterdir())
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=convert, args=[sender], daemon=True)
    process.start()
    sender.close()
    try:
        assert receiver.poll(SECONDS), f"not done after {SECONDS} s"
        message = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert sorted(source.parent.iterdir()) == before
    return message


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        ({"num_attention_heads": 0}, ["config.json", "`num_attention_heads`", "from 1 on, not 0"]),
        ({"num_attention_heads": -4}, ["config.json", "`num_attention_heads`", "from 1 on, not -4"]),
        ({"num_key_value_heads": 0}, ["config.json does not describe a Llama", "ZeroDivisionError"]),
        ({"hidden_size": 2**40}, ["model.embed_tokens.weight", "config.json", f"{2**40})"]),
        ({"vocab_size": 2**40}, ["model.embed_tokens.weight", "config.json", f"({2**40}, "]),
        ({"intermediate_size": 2**60}, ["config.json does not describe a Llama"]),
        ({"num_hidden_layers": 10**6}, ["config.json", "1000000 layers", "have 2"]),
        ({"rope_scaling": {"rope_type": "nonsense", "factor": 2.0}}, ["config.json does not describe a Llama"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["config.json does not describe a Llama"]),
        ({"hidden_act": "nonsense"}, ["config.json does not describe a Llama", "nonsense"]),
    ],
    ids=str,
)
def test_sizes_and_settings_that_cannot_be_are_refused(tmp_path, config, messages):
    message = refusal(write_reference(tmp_path / "source", **config))
    assert not [part for part in messages if part not in message], message


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "pytorch_model.bin.index.json"])
def test_deep_json_is_refused(tmp_path, name):
    source = write_reference(tmp_path / "source")
    (source / name).write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    message = refusal(source)
    assert f"{source / name} cannot be read" in message and "recursion" in message


def test_json_that_is_too_large_is_refused_unread(tmp_path):
    source = write_reference(tmp_path / "source")
    os.truncate(source / "config.json", 2**36)  # a sparse file: it takes no room
    message = refusal(source)
    assert f"{source / 'config.json'} has more than" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "pytorch_model.bin"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    source = write_reference(tmp_path / "source")
    (source / name).unlink()
    os.mkfifo(source / name)
    message = refusal(source)
    assert f"{source / name} is a pipe or a device" in message and "remove it" in message


def test_a_device_is_refused_in_the_tokenizers_folder_too(tmp_path):
    source = write_reference(tmp_path / "source")
    write_reference(tmp_path / "other")
    link = tmp_path / "other" / "tokenizer_config.json"
    link.unlink()
    link.symlink_to("/dev/zero")
    assert f"{link} is a pipe or a device" in refusal(source, tokenizer=tmp_path / "other")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    source = write_reference(tmp_path / "source")
    bomb, size = source / "pytorch_model.bin", 2**20 * 400
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w") as opened:
            for _ in range(400):
                opened.write(bytes(2**20))
    assert bomb.stat().st_size < 10 * 2**20
    message = refusal(source)
    assert f"pytorch_model.bin is compressed: {bomb.stat().st_size} bytes become {size}" in message
    assert "save it again" in message


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_larger_than_its_file_is_refused(tmp_path, device):
    """Strides of zero make a tensor of any size of one number."""
    tensors = reference_tensors()
    tensors["model.embed_tokens.weight"] = torch.zeros(1, device=device).expand(2**20, 2**20)
    message = refusal(write_reference(tmp_path / "source", tensors))
    assert "`model.embed_tokens.weight` in pytorch_model.bin is larger than the file" in message


def test_eve_gets_no_initial_values_before_the_shapes_are_checked(tmp_path):
    tensors = eve_tensors()
    tensors["model.vision_tower.patch_embedding.weight"] = torch.zeros(2**17, 3, 1, 1)
    source = write_reference(tmp_path / "source", tensors, model_type="eve", video_hidden_size=2**17)
    message = refusal(source)
    assert "pytorch_model.bin has shape" in message and "131072" in message


def test_a_disk_that_is_full_at_the_tokenizer_leaves_nothing_behind(tmp_path):
    save = PreTrainedTokenizerBase.save_pretrained

    def save_without_room(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # a write beyond fails as on a full disk
        return save(*args, **kwargs)

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        PreTrainedTokenizerBase.save_pretrained = save_without_room

    message = refusal(write_reference(tmp_path / "source"), prepare)
    assert f"The tokenizer and the processor of {tmp_path / 'target'} cannot be written" in message
    assert "(os error 27). Make room on the disk" in message  # what the tokenizers library says
