"""Converts reference checkpoints for `from_pretrained`: `video-panda-convert SOURCE TARGET`.

The source is a checkpoint of the reference release or EVE-7B, where training starts. The result is one folder with
model and processor. If a tensor is unknown or missing, nothing is written.
"""

import copy
import dataclasses
import glob
import logging
import re
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaTokenizer, PreTrainedTokenizerBase

from video_panda_hf.hub import add_code, push_folder
from video_panda_hf.modeling import (
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaVisionConfig,
    VideoPandaVisionModel,
)
from video_panda_hf.processing import CHAT_TEMPLATE, VideoPandaProcessor

from .files import (
    ConversionError,
    OutputTensor,
    StoredTensor,
    check_files,
    list_tensors,
    name_some,
    read_json,
    write_safetensors,
    write_tensors,
)
from .rules import DISTILLATION_HEAD, DROP, NOT_IN_EVE, canonical_key, find_rule, required_keys


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CANVAS_PATCHES = 32  # side of the canvas in all released models
EVE_IMAGE_SIZE = 672

UNFINISHED = ".unfinished"  # suffix of the temporary folder

PATCH_EMBEDDING = "model.video_tower.patch_embedding.weight"
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    image_size: int | None = None,
    keep_distillation_head: bool = False,
    quiet: bool = False,
) -> Path:
    """
    Converts a reference checkpoint into a folder with model and processor, for `from_pretrained`.

    `<video>` and `<row>` become the next two token ids. Their rows of the embeddings and of the LM head are the mean
    of the other rows; the logits of all other tokens stay those of the reference. Parts of STAB that EVE-7B lacks get
    initial values, the same in every run. Teachers are left out. So is the distillation head, by default.

    The target folder appears only when everything is written. A killed conversion leaves a hidden folder beside it;
    the next conversion logs its name. Any checkpoint needs only a few hundred megabytes of memory.

    Args:
        source (`str` or `Path`):
            Folder of the reference checkpoint: `config.json` and safetensors or `pytorch_model*.bin`.
        target (`str` or `Path`):
            Folder to write. It must be empty or not exist.
        tokenizer (`str`, `Path` or `PreTrainedTokenizerBase`, *optional*):
            The LLM's tokenizer, its folder or Hub id. Defaults to the one in `source`.
        dtype (`str` or `torch.dtype`, *optional*):
            Dtype of the weights: `"float32"`, `"float16"` or `"bfloat16"`. Defaults to that of the source.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`):
            Maximum size of a weights file, in bytes or like `"5GB"`.
        image_size (`int`, *optional*):
            Side of the canvas, in pixels. Defaults to `image_size` in the config, or else 32 patches; for EVE the size
            that `mm_vision_tower` names, or else 672.
        keep_distillation_head (`bool`, *optional*, defaults to `False`):
            Whether to write `distillation_head.safetensors` too, to continue training with it.
        quiet (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        `Path`: the target folder.

    Raises:
        ConversionError: If the source or a setting is wrong, or the processor cannot be written. The message names the
            file, key or setting. Nothing is left.
        OSError: If the folder cannot be written. Nothing of it is left.
    """
    source, target = Path(source), Path(target).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConversionError(f"{target} is there already: choose a new or an empty folder.")
    max_shard_size = convert_file_size_to_int(max_shard_size)
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in (None, *DTYPES.values()):
        raise ConversionError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}.")

    flat_config = read_reference_config(source)
    stored = list_tensors(source)
    copies = sort_tensors(stored, tied=bool(flat_config.get("tie_word_embeddings")))
    check_sizes(flat_config, copies)
    vision_config = build_vision_config(flat_config, copies, image_size)
    processor = build_processor(source if tokenizer is None else tokenizer, flat_config, vision_config)
    config = build_config(flat_config, vision_config, processor, dtype or copies[PATCH_EMBEDDING][0].dtype)
    tensors = plan_tensors(copies, config, flat_config["vocab_size"], dtype)
    head = plan_distillation_head(stored, config, dtype) if keep_distillation_head else []

    check_room(target, sum(tensor.num_bytes for tensor in tensors + head))

    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=UNFINISHED, dir=target.parent) as workplace,
        tqdm(total=len(tensors) + len(head), unit="tensor", disable=True if quiet else None) as progress,
    ):
        folder = Path(workplace) / "converted"
        folder.mkdir()
        write_tensors(folder, tensors, max_shard_size, written=progress.update)
        if head:
            from video_panda_hf.training import HEAD_FILE

            write_safetensors(folder / HEAD_FILE, head, written=progress.update)
        config.save_pretrained(folder)
        build_generation_config(source, config, processor).save_pretrained(folder)
        try:
            processor.save_pretrained(folder)
        except Exception as error:  # tokenizers raises that class itself
            raise ConversionError(
                f"The tokenizer and the processor of {target} cannot be written: {error}. Make room on the disk, and "
                "convert again."
            ) from error
        add_code(folder)
        if target.exists():
            target.rmdir()
        folder.rename(target)
    return target


def check_room(target: Path, num_bytes: int):
    """Raises if the disk has too little room for the weights. Warns about folders that killed conversions left."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{UNFINISHED}"):
        logger.warning("%s is of a conversion that was killed, or still runs: delete it if it does not.", left)
    folder = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ConversionError(
            f"{folder} has {free / 1e9:.1f} GB of room, but the converted weights take {num_bytes / 1e9:.1f} GB."
        )


def read_reference_config(source: Path) -> dict:
    """The flat `config.json` of a reference checkpoint."""
    if not source.is_dir():
        raise ConversionError(f"{source} is no folder.")
    check_files(source)
    file = source / "config.json"
    flat_config = read_json(file)
    model_type = flat_config.get("model_type")
    if model_type not in ("videopanda", "eve"):
        raise ConversionError(f"{file} is of model_type {model_type!r}, not of the reference's 'videopanda' or 'eve'.")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        value = flat_config.get(name)
        if not isinstance(value, int) or value < 1:
            raise ConversionError(f"{file} should say what `{name}` is: a whole number from 1 on, not {value!r:.50}.")
    return flat_config


def sort_tensors(stored: dict[str, StoredTensor], tied: bool) -> dict[str, list[StoredTensor]]:
    """
    The tensors to convert by their canonical key, each with all its copies in the checkpoint.

    Raises:
        ConversionError: for a key without a rule, or if there is no patch embedding.
    """
    copies = defaultdict(list)
    for key, tensor in stored.items():
        try:
            rule = find_rule(key)
        except KeyError:
            raise ConversionError(f"{tensor} is unknown: no reference checkpoint has such a tensor.") from None
        if rule is not DROP:
            copies[EMBEDDINGS if tied and key == HEAD else canonical_key(key)].append(tensor)
    for key in (PATCH_EMBEDDING, EMBEDDINGS):
        if key not in copies:
            raise ConversionError(f"The checkpoint lacks `{key}` and what else makes it a Video-Panda or EVE.")
    return dict(copies)


def check_sizes(flat_config: dict, copies: dict[str, list[StoredTensor]]):
    """Raises for a config that asks for a larger language model than the weights are, before one is built."""
    embeddings, shape = copies[EMBEDDINGS][0], (flat_config["vocab_size"], flat_config["hidden_size"])
    if embeddings.shape != shape:
        raise ConversionError(
            f"{embeddings} has shape {embeddings.shape}, but `vocab_size` and `hidden_size` in config.json ask for "
            f"{shape}: is this the config.json of these weights?"
        )
    num_layers = len({match[1] for key in copies if (match := re.match(r"model\.layers\.(\d+)\.", key))})
    if flat_config["num_hidden_layers"] > num_layers:
        raise ConversionError(
            f"config.json asks for {flat_config['num_hidden_layers']} layers (`num_hidden_layers`), but the weights "
            f"have {num_layers}: is this the config.json of these weights?"
        )


def build_vision_config(flat_config: dict, copies: dict, image_size: int | None) -> VideoPandaVisionConfig:
    """STAB's sizes, from the patch embedding's shape (hidden, channels, patch, patch)."""
    weight = copies[PATCH_EMBEDDING][0]
    if len(weight.shape) != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3]:
        raise ConversionError(f"{weight} has shape {weight.shape}, but should have (hidden, 3, patch, patch).")
    hidden_size, _, patch_size, _ = weight.shape
    if flat_config.get("video_hidden_size", hidden_size) != hidden_size:
        raise ConversionError(
            f"{weight} has shape {weight.shape}, but `video_hidden_size` is {flat_config['video_hidden_size']}."
        )
    image_size = image_size or flat_config.get("image_size") or default_image_size(flat_config, patch_size)
    try:
        return VideoPandaVisionConfig(hidden_size=hidden_size, patch_size=patch_size, image_size=image_size)
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(f"The sizes of STAB are impossible: {error}") from error


def default_image_size(flat_config: dict, patch_size: int) -> int:
    """EVE's is in the name of its image processor: 672, or 1344 for EVE-7B-HD."""
    if flat_config["model_type"] != "eve":
        return CANVAS_PATCHES * patch_size
    named = re.search(r"-anypixel-(\d{1,6})/?$", str(flat_config.get("mm_vision_tower", "")))
    return int(named[1]) if named else EVE_IMAGE_SIZE


def build_processor(
    tokenizer: str | Path | PreTrainedTokenizerBase, flat_config: dict, vision_config: VideoPandaVisionConfig
) -> VideoPandaProcessor:
    """The released model's processor around a tokenizer (or its folder or Hub id)."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(tokenizer)
    else:
        tokenizer = load_tokenizer(tokenizer)
    if len(tokenizer) > flat_config["vocab_size"]:
        raise ConversionError(
            f"The tokenizer has {len(tokenizer)} tokens, more than the model's {flat_config['vocab_size']}: "
            "it belongs to another model."
        )
    # The reference starts prompts with BOS and pads with UNK. The files of Llama's tokenizer may not contain that.
    if tokenizer.bos_token is not None and tokenizer("").input_ids != [tokenizer.bos_token_id]:
        tokenizer.add_bos_token = True
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    return VideoPandaProcessor.from_text_pretrained(
        tokenizer,
        image_size=vision_config.image_size,
        patch_size=vision_config.patch_size,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(folder_or_id: str | Path) -> PreTrainedTokenizerBase:
    folder = Path(folder_or_id)
    names = ("tokenizer.json", "tokenizer.model")
    if folder.is_dir():
        check_files(folder)
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        raise ConversionError(
            f"{folder} has no tokenizer ({' or '.join(names)}): pass --tokenizer with the folder or Hub id of one, "
            "such as that of the LLM that the model was trained from."
        )
    try:
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            return LlamaTokenizer.from_pretrained(folder)  # AutoTokenizer cannot tell the class from `tokenizer.model`
        # transformers does not know the model type in the checkpoint's config.
        return AutoTokenizer.from_pretrained(folder_or_id, config=LlamaConfig())
    except Exception as error:  # transformers raises almost anything here
        raise ConversionError(f"No tokenizer can be loaded from {folder_or_id}: {error}") from error


def build_config(
    flat_config: dict, vision_config: VideoPandaVisionConfig, processor: VideoPandaProcessor, dtype: torch.dtype
) -> VideoPandaConfig:
    """The nested config: the Llama settings of the flat one, with room for the two tokens in the vocabulary."""
    known = {field.name for field in dataclasses.fields(LlamaConfig)} | {"rope_theta", "rope_scaling"}
    known -= {"architectures", "dtype"}
    text_config = {name: value for name, value in flat_config.items() if name in known and value is not None}
    token_ids = {"video_token_id": processor.video_token_id, "row_token_id": processor.row_token_id}
    text_config["vocab_size"] = max(flat_config["vocab_size"], *(token_id + 1 for token_id in token_ids.values()))
    with blaming_the_config():
        return VideoPandaConfig(
            text_config=LlamaConfig(**text_config),
            vision_config=vision_config,
            architectures=[VideoPandaForConditionalGeneration.__name__],
            dtype=dtype,
            **token_ids,
        )


@contextmanager
def blaming_the_config():
    """An error inside is one of `config.json`, whose bad values raise almost anything in transformers and torch."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConversionError(
            f"config.json does not describe a Llama: {reason:.500}. Compare it with the base model's."
        ) from error


def build_generation_config(
    source: Path, config: VideoPandaConfig, processor: VideoPandaProcessor
) -> GenerationConfig:
    """BOS, EOS and padding token ids: from the checkpoint's generation config, else its config, else the tokenizer."""
    file = source / "generation_config.json"
    sources = (read_json(file) if file.is_file() else {}, config.text_config.to_dict())
    ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = [values[name] for values in sources if values.get(name) is not None]
        ids[name] = given[0] if given else getattr(processor.tokenizer, name)
    return GenerationConfig(**ids)


def plan_tensors(
    copies: dict[str, list[StoredTensor]], config: VideoPandaConfig, vocab_size: int, dtype: torch.dtype | None
) -> list[OutputTensor]:
    """
    All tensors of the model, with the source of their values. `vocab_size` is the reference's.

    Raises:
        ConversionError: for a missing or unknown key, a wrong shape, or copies that differ.
    """
    with blaming_the_config(), torch.device("meta"):
        expected = VideoPandaForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        del expected[HEAD]
    for key, stored in copies.items():
        for tensor in stored:
            check_shapes(key, tensor, expected, vocab_size)
    fresh = check_complete(copies, expected, config)

    tensors = []
    for key, stored in copies.items():
        for other in stored[1:]:
            check_equal(stored[0], other)
        for name, part in parts_of(key, stored[0]).items():
            part_dtype = dtype if dtype and part.is_floating_point() else part.dtype
            chunks = partial(chunks_of, key, stored[0], name, len(expected[name]) if expected[name].ndim else 1)
            tensors.append(OutputTensor(name, tuple(expected[name].shape), part_dtype, chunks))
    for name, values in fresh.items():
        values = values.to(config.dtype) if values.is_floating_point() else values
        tensors.append(OutputTensor(name, tuple(values.shape), values.dtype, partial(iter, [values])))
    return tensors


def plan_distillation_head(
    stored: dict[str, StoredTensor], config: VideoPandaConfig, dtype: torch.dtype | None
) -> list[OutputTensor]:
    """
    The tensors of the distillation head. Their names stay as they are.

    Raises:
        ConversionError: if the checkpoint has no head, or one that does not fit its LLM.
    """
    from video_panda_hf.training import VideoPandaDistillationHead  # imported late: it takes 100 MB of memory

    head = {}
    for key, tensor in stored.items():
        if match := DISTILLATION_HEAD.fullmatch(key):
            if match[1] in head:
                check_equal(head[match[1]], tensor)
            head[match[1]] = tensor
    if "input_layer.weight" not in head:
        raise ConversionError("The checkpoint has no distillation head to keep.")
    text_config, teacher_hidden_size = config.text_config, head["input_layer.weight"].shape[0]
    with torch.device("meta"):
        expected = VideoPandaDistillationHead(
            text_config.hidden_size, teacher_hidden_size, text_config.num_hidden_layers
        ).state_dict()
    if odd := sorted(set(head) ^ set(expected)):
        raise ConversionError(f"The distillation head does not fit the LLM: wrong or missing {name_some(odd)}.")
    for name, tensor in head.items():
        if tensor.shape != tuple(expected[name].shape):
            raise ConversionError(f"{tensor} has shape {tensor.shape}, but should have {tuple(expected[name].shape)}.")
    return [OutputTensor(name, tensor.shape, dtype or tensor.dtype, tensor.chunks) for name, tensor in head.items()]


def check_complete(copies: dict, expected: dict, config: VideoPandaConfig) -> dict[str, torch.Tensor]:
    """Raises for missing keys. Returns initial values for the tensors that EVE lacks, if this is EVE."""
    missing = required_keys(expected) - set(copies)
    not_in_eve = {key for key in required_keys(expected) if NOT_IN_EVE.fullmatch(key)}
    is_eve = missing >= not_in_eve and not any("video_tower" in tensor.key for ts in copies.values() for tensor in ts)
    if is_eve:
        missing -= not_in_eve
    if missing:
        raise ConversionError(f"The checkpoint lacks {len(missing)} tensors: {name_some(sorted(missing))}.")
    if not is_eve:
        return {}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = VideoPandaVisionModel(config.vision_config).float()
    filled = {name for key, stored in copies.items() for name in parts_of(key, stored[0])}
    values = {f"model.vision_tower.{name}": value for name, value in tower.state_dict().items()}
    fresh = {name: value for name, value in values.items() if name not in filled}
    logger.warning("An EVE checkpoint: %d tensors of STAB get their initial values: %s.", len(fresh), ", ".join(fresh))
    return fresh


def check_shapes(key: str, stored: StoredTensor, expected: dict[str, torch.Tensor], vocab_size: int):
    """Raises unless every part of the tensor fits a tensor of the model."""
    for name, part in parts_of(key, stored).items():
        if name not in expected:
            raise ConversionError(f"{stored} is unknown: the model that config.json describes has no such tensor.")
        shape = tuple(expected[name].shape)
        if key in (EMBEDDINGS, HEAD):
            shape = (vocab_size, *shape[1:])
        if tuple(part.shape) != shape:
            raise ConversionError(
                f"{stored} has shape {stored.shape}, which gives `{name}` {tuple(part.shape)}, but the sizes in "
                f"config.json (`vocab_size` {vocab_size}, …) ask for {shape}."
            )
        if part.is_floating_point() != expected[name].is_floating_point():
            raise ConversionError(f"{stored} is of {stored.dtype}, which is not what `{name}` can be.")


def parts_of(key: str, stored: StoredTensor) -> dict[str, torch.Tensor]:
    """The model's tensors that a stored one contains, on `meta`. Raises if its shape does not fit the rule."""
    try:
        return find_rule(key)(torch.empty(stored.shape, dtype=stored.dtype, device="meta"))
    except ValueError as error:
        raise ConversionError(f"{stored} has shape {stored.shape}: {error}.") from error


def check_equal(one: StoredTensor, other: StoredTensor):
    """Raises unless the two have the same bits."""
    equal = one.shape == other.shape and one.dtype == other.dtype
    if not equal or not all(map(same_bits, one.chunks(), other.chunks())):
        raise ConversionError(f"{one} and {other} should be the same tensor, but differ.")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)))


def chunks_of(key: str, stored: StoredTensor, name: str, rows: int) -> Iterator[torch.Tensor]:
    """The values of one part of a stored tensor. Embeddings with fewer than `rows` rows are filled with their mean."""
    rule = find_rule(key)
    count, total = 0, 0.0
    for chunk in stored.chunks(lambda tensor: rule(tensor)[name]):
        yield chunk
        if key in (EMBEDDINGS, HEAD):
            count, total = count + len(chunk), total + chunk.sum(0, dtype=torch.float64)
    if key in (EMBEDDINGS, HEAD) and rows > count:
        yield (total / count).expand(rows - count, -1)


class UploadError(Exception):
    """A converted checkpoint could not be uploaded. It is kept. The message has the command to try again."""


def convert_and_push(push_to: str | None, private: bool, **options) -> None:
    """
    Does the work of the commands `video-panda convert` and `video-panda-convert`, and prints what it has made.

    Args:
        push_to (`str`, *optional*):
            Repository on the Hub to upload the result to.
        private (`bool`):
            Whether to create it as a private one.
        options:
            Arguments of `convert_checkpoint`.

    Raises:
        ConversionError: If the source or a setting is wrong.
        OSError: If the folder cannot be written.
        UploadError: If the folder is written, but not uploaded.
    """
    if push_to is not None:
        validate_repo_id(push_to)
    # SIGTERM (from a scheduler or `docker stop`) cleans up as Ctrl-C does.
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        target = convert_checkpoint(**options)
    finally:
        signal.signal(signal.SIGTERM, former)
    print(target, flush=True)
    if push_to is None:
        return
    try:
        print(push_folder(target, push_to, private=private or None))
    except (OSError, ValueError) as error:
        raise UploadError(
            f"{target} is converted, but not on the Hub: {error}\n"
            f"To try again: video-panda push {target} {push_to}{' --private' if private else ''}"
        ) from error
