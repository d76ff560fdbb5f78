"""Which checkpoint of a training can be gone on from."""

import json
import re
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open
from transformers.utils import logging


logger = logging.get_logger(__name__)

STATE = "trainer_state.json"
WEIGHTS = ("*.safetensors", "*model*.bin", "*/*.distcp", "*/*model*.pt")  # the latter two are FSDP's and DeepSpeed's


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    Finds the newest complete `checkpoint-N`. A run that was killed, or a full disk, may leave a damaged one: each file
    is looked into, as far as its header or its table of contents, and a warning names what is damaged.

    Args:
        output_dir (`str` or `Path`):
            The output folder of a training.

    Returns:
        `str` or `None`: its folder, or `None` if there is no complete checkpoint.
    """
    folders = {
        int(found[1]): folder
        for folder in Path(output_dir).glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    }
    for step in sorted(folders, reverse=True):
        problem = problem_of(folders[step], step)
        if problem is None:
            return str(folders[step])
        logger.warning(f"{folders[step]} is not complete, and is passed over: {problem}")
    return None


def problem_of(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, if something is."""
    if not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        return "it has no weights"
    for file in [folder / STATE, *sorted(path for path in folder.rglob("*") if path.is_file())]:
        try:
            if file.name == STATE and json.loads(file.read_text(encoding="utf-8")).get("global_step") != step:
                return f"{STATE} is not of step {step}"
            if file.name.endswith(".index.json"):
                shards = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
                if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
                    return f"{missing[0]} is missing"
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):  # which compares the size of the file with its header
                    pass
            if file.suffix in (".bin", ".pt", ".pth"):
                ZipFile(file).close()  # its table of contents is at the end
        except (OSError, ValueError, AttributeError, LookupError, BadZipFile, SafetensorError) as error:
            return f"{file.name}: {error}"
    return None
