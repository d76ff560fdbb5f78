"""Reads the weights of a checkpoint in any format, and writes safetensors.

Memory does not grow with the checkpoint: tensors are memory-mapped, and read, converted and written chunk by chunk.
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import split_state_dict_into_shards_factory


CHUNK_ELEMENTS = 2**18
MAPPED_BYTES = 2**26  # to read from a file before it is mapped again
MAX_TEXT_BYTES = 2**27  # of a JSON file, or a tokenizer

# Names in a safetensors header of the dtypes that a checkpoint may have.
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


class ConversionError(ValueError):
    """A checkpoint cannot be converted. The message names the file or the tensor. The target is untouched."""


class Reader:
    """Keeps the last file mapped. Maps it again from time to time, which frees the pages that were read."""

    def __init__(self):
        self.file, self.tensors, self.bytes_read = None, {}, 0

    def read(self, file: Path, key: str) -> torch.Tensor:
        if file != self.file or self.bytes_read > MAPPED_BYTES:
            self.tensors = {}  # unmap before mapping the next file
            self.file, self.tensors, self.bytes_read = file, read_tensors(file), 0
        return self.tensors[key]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of the source, by its key."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    reader: Reader

    def chunks(self, view: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> Iterator[torch.Tensor]:
        """Yields `view` of the tensor as chunks (rows, remaining axes flattened)."""
        start, rows = 0, 1
        while start < rows:
            tensor = view(self.reader.read(self.file, self.key))
            tensor = tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
            rows, step = len(tensor), max(1, CHUNK_ELEMENTS // tensor.shape[1])
            chunk = tensor[start : start + step]
            self.reader.bytes_read += chunk.nbytes
            yield chunk
            start += step

    def __str__(self) -> str:
        return f"`{self.key}` in {self.file.name}"


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """
    All tensors of the checkpoint in a folder, by key: safetensors or `pytorch_model*.bin`, with or without an index.

    Raises:
        ConversionError: for missing, damaged or unsafe files, a key in two files, or a wrong index.
    """
    files, places = find_files(folder)
    stored, reader = {}, Reader()
    for file in files:
        for key, tensor in read_tensors(file).items():
            if key in stored:
                raise ConversionError(f"`{key}` is in two files, {stored[key].file.name} and {file.name}.")
            if places is not None and places.get(key) != file.name:
                raise ConversionError(f"{file.name} holds `{key}`, but the index does not say so.")
            stored[key] = StoredTensor(key, file, tuple(tensor.shape), tensor.dtype, reader)
    if lost := [key for key in places or () if key not in stored]:
        raise ConversionError(f"The index places {name_some(lost)} in {places[lost[0]]}, which does not hold it.")
    return stored


def find_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weights files, and the index's mapping from key to file name, if there is an index."""
    for index_name, pattern in (
        ("model.safetensors.index.json", "model*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (folder / index_name).is_file():
            places = read_index(folder / index_name)
            files = [folder / name for name in sorted(set(places.values()))]
        else:
            places = None
            files = sorted(folder.glob(pattern))
            files += [folder / name for name in missing_shards([file.name for file in files])]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ConversionError(f"{folder} lacks a part of its weights: {name_some(missing)}.")
        for file in files:
            check_inside(file)
        if files:
            return files, places
    raise ConversionError(f"{folder} has no weights: neither `pytorch_model*.bin` nor `model*.safetensors`.")


def check_files(folder: Path):
    """Raises for a pipe or a device, which may have no end, and for a tokenizer that is impossibly large."""
    for file in folder.iterdir():
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ConversionError(
                f"{file} is a pipe or a device, not a file: put the file itself there, or remove it."
            )
        if file.name.startswith("tokenizer"):
            check_size(file)


def check_size(file: Path):
    if file.is_file() and file.stat().st_size > MAX_TEXT_BYTES:
        raise ConversionError(f"{file} has more than {MAX_TEXT_BYTES} bytes, too many for what it should hold.")


def check_inside(file: Path):
    """Raises for a link that leads out of the checkpoint's folder (in the Hub's cache: out of the cache)."""
    home, resolved = file.parent.resolve(), file.resolve()
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        home = home.parents[2]  # the cache: files in <cache>/models--…/snapshots/<commit> are links to blobs
    if not resolved.is_relative_to(home):
        raise ConversionError(
            f"{file} is a link that leads out of its folder, to {resolved}: put the file itself there."
        )


def read_index(file: Path) -> dict[str, str]:
    """The `weight_map` of an index. Raises for names that are not files in the same folder."""
    places = read_json(file).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ConversionError(f"{file.name} is no index: it has no `weight_map` from keys to names of files.")
    for name in places.values():
        if not re.fullmatch(r"[^/\\:\0]+\.(?:bin|safetensors)", name):
            raise ConversionError(f"{file.name} names {name!r}, which is no weights file in its own folder.")
    return places


def missing_shards(names: list[str]) -> list[str]:
    """The missing shards of a set like `…-00001-of-00003.bin`."""
    expected = set()
    for name in names:
        if match := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\..*)", name):
            stem, _, count, suffix = match.groups()
            expected |= {f"{stem}{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)}
    return sorted(expected - set(names))


def read_json(file: Path) -> dict:
    check_size(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} should hold a JSON object.")
    return content


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """
    The memory-mapped tensors of a file. Their bytes are read on use.

    Raises:
        ConversionError: if the file is damaged, or a pickle of anything but a flat dictionary of tensors. No code in
            such a pickle is run.
    """
    try:
        if file.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(file)
        else:
            check_unpacked(file)
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except ConversionError:
        raise
    except pickle.UnpicklingError as error:
        # torch's message recommends to load the file without this protection.
        raise ConversionError(
            f"{file.name} is refused: it is damaged, or a pickle of more than tensors, which may hold code. "
            "Nothing of it was run."
        ) from error
    except Exception as error:  # damaged files raise many kinds of errors
        reason = str(error).strip().splitlines()[:1]
        raise ConversionError(f"{file.name} is damaged or no weights file: {' '.join(reason)}") from error
    if not isinstance(tensors, dict):
        raise ConversionError(f"{file.name} should hold a dictionary of tensors, not {type(tensors).__name__}.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"{file.name} should hold tensors by name, but {name!r} is {type(tensor).__name__}.")
        if tensor.is_meta or tensor.nbytes > file.stat().st_size:
            raise ConversionError(
                f"`{name}` in {file.name} is larger than the file: the file is damaged, or an attack."
            )
        if tensor.layout != torch.strided or tensor.dtype not in SAFETENSORS_DTYPES:
            raise ConversionError(
                f"`{name}` in {file.name} is a {tensor.layout} tensor of {tensor.dtype}: only plain (not quantised) "
                f"tensors of {', '.join(str(dtype) for dtype in SAFETENSORS_DTYPES)} can be converted."
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def check_unpacked(file: Path):
    """Raises for a zip archive that is larger once it is unpacked. torch writes archives that are not compressed."""
    with open(file, "rb") as opened:
        if opened.read(4) != b"PK\3\4":
            return
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > file.stat().st_size:
        raise ConversionError(
            f"{file.name} is compressed: {file.stat().st_size} bytes become {unpacked}. Load it with torch where you "
            "trust it, and save it again: torch.save does not compress."
        )


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write. `chunks()` yields its values in order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[], Iterator[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: Path, tensors: list[OutputTensor], max_shard_size: int, written: Callable[[], None]):
    """
    Writes `model.safetensors`, or shards with an index. A shard has at most `max_shard_size` bytes or one tensor.

    `written` is called after every tensor.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, [by_name[name] for name in names], written)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_safetensors(file: Path, tensors: list[OutputTensor], written: Callable[[], None]):
    """Writes one file in the safetensors format: length of the header, header, bytes of the tensors."""
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so that every tensor is aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            for chunk in tensor.chunks():
                chunk = chunk.to(tensor.dtype).reshape(-1).contiguous()
                opened.write(memoryview(chunk.view(torch.uint8).numpy()))
            written()
        if opened.tell() != 8 + len(encoded) + end:
            raise AssertionError(f"{file.name}: the tensors' chunks do not add up to their shapes")


def name_some(names) -> str:
    """Up to five names for a message."""
    names = list(names)
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
