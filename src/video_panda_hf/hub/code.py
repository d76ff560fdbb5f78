"""The code in a checkpoint. Users without this package can load it with `trust_remote_code=True`.

There are six files: configuration, layout, STAB, model, processor, video processor. transformers writes them when it
saves an object of a registered class.
"""

import inspect
import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from video_panda_hf.modeling import (
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaModel,
    VideoPandaVisionConfig,
    VideoPandaVisionModel,
)
from video_panda_hf.processing import VideoPandaProcessor, VideoPandaVideoProcessor


OF_EARLIER_RELEASES = ("decoding*.py", "hub_video_panda.py")
CONFIGURATIONS = ("config.json", "processor_config.json", "tokenizer_config.json")


def register_code() -> None:
    """Makes `save_pretrained` and `push_to_hub` of this package's classes include their code and an `auto_map`."""
    for cls in (VideoPandaConfig, VideoPandaVisionConfig, VideoPandaProcessor, VideoPandaVideoProcessor):
        cls.register_for_auto_class()
    for cls in (VideoPandaModel, VideoPandaVisionModel):
        cls.register_for_auto_class("AutoModel")
    VideoPandaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")


def code_files() -> dict[str, Path]:
    """The code files by their name."""
    entries = [inspect.getfile(cls) for cls in (VideoPandaForConditionalGeneration, VideoPandaProcessor)]
    files = [file for entry in entries for file in (entry, *get_relative_import_files(entry))]
    return {Path(file).name: Path(file) for file in files}


def with_code(files: Mapping[str, Path | bytes], include: bool) -> dict[str, Path | bytes]:
    """
    Adds this package's code to a checkpoint's files, or removes it. All other files are kept.

    Args:
        files: their content or location, by their path in the checkpoint.
        include: whether the result contains the code and an `auto_map` that refers to it.
    """
    code = code_files()
    outdated = [*code, *OF_EARLIER_RELEASES]
    files = {path: file for path, file in files.items() if not any(fnmatch(path, name) for name in outdated)}

    def reference(cls: type) -> str:
        return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"

    parsed = {name: json.loads(files[name].read_text(encoding="utf-8")) for name in CONFIGURATIONS if name in files}
    video_processor = parsed.get("processor_config.json", {}).get("video_processor", {})
    for part in (*parsed.values(), video_processor):
        part.pop("auto_map", None)
    if include:
        files |= code
        parsed["config.json"]["auto_map"] = VideoPandaConfig.classes_by_auto_class
        processor = {"AutoProcessor": reference(VideoPandaProcessor)}
        parsed["processor_config.json"]["auto_map"] = processor
        video_processor["auto_map"] = processor | {"AutoVideoProcessor": reference(VideoPandaVideoProcessor)}
    return files | {n: (json.dumps(part, indent=2, sort_keys=True) + "\n").encode() for n, part in parsed.items()}


def add_code(folder: str | Path) -> None:
    """
    Adds this package's code, and each `auto_map` that refers to it, to a checkpoint.

    Args:
        folder (`str` or `Path`):
            The checkpoint's folder.
    """
    _rewrite(Path(folder), include=True)


def remove_code(folder: str | Path) -> None:
    """
    Removes the code, and each `auto_map` that refers to it, from a checkpoint. It then loads only after this package
    is imported.

    Args:
        folder (`str` or `Path`):
            Folder that `save_pretrained` wrote.
    """
    _rewrite(Path(folder), include=False)


def _rewrite(folder: Path, include: bool) -> None:
    files = {file.name: file for file in folder.iterdir() if file.is_file()}
    wanted = with_code(files, include)
    for name, content in wanted.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content.parent != folder:
            shutil.copyfile(content, folder / name)
    for name in files.keys() - wanted.keys():
        files[name].unlink()
