"""`push_folder` uploads a checkpoint that is on disk, checked first and whole, in one commit."""

import json
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from video_panda_hf.modeling import VideoPandaConfig
from video_panda_hf.processing import VideoPandaProcessor

from .card import ModelFacts
from .code import with_code
from .upload import files_of, upload


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    include_code: bool = True,
    license: str | None = None,
) -> str:
    """
    Uploads a checkpoint (model and processor, or a PEFT adapter) in one commit, so that nobody sees half of it.

    A model card comes with it where neither the folder nor the repository has one. Of weights that the repository has
    already, those that are not replaced are deleted.

    Args:
        folder: what `save_pretrained` of model and processor, or of a PEFT model, wrote. Not changed.
        repo_id: `user/name`, or `name` for the token's user. Created if there is none.
        private: whether a repository that is created is private. Defaults to what its owner has set.
        token: the token to use, `False` for none. Defaults to the one of `hf auth login`.
        revision: the branch, created if there is none. Defaults to the main one.
        create_pr: whether to open a pull request instead.
        commit_message: defaults to a message that names the folder's content.
        include_code: whether the code of model and processor goes with them, so that `trust_remote_code=True` loads
            them where this package is not installed. Both are taken from this package, whatever the folder has.
        license: Hub's name of the weights' license, for the model card. Defaults to that of the language model.

    Returns: the URL of the files, or of the pull request.

    Raises:
        FileNotFoundError, ValueError: if the folder is not a complete checkpoint. Nothing has been uploaded then.
        OSError: if the Hub refuses (`HfHubHTTPError`), if a file cannot be uploaded. No file of it is visible then.
    """
    folder = Path(folder)
    num_parameters = check_folder(folder)
    files, card = files_of(folder), None
    if not is_adapter(folder):
        files = with_code(files, include_code)
        config = VideoPandaConfig.from_pretrained(folder)
        card = ModelFacts(config, include_code, num_parameters, license=license).card
    commit = upload(
        files,
        repo_id,
        card,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or ("Upload adapter" if is_adapter(folder) else "Upload model and processor"),
    )
    return commit.pr_url or f"{commit.repo_url}/tree/{revision or 'main'}"


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def check_folder(folder: Path) -> int:
    """
    Checks that a checkpoint's configuration, weights and processor are there and can be read.

    Returns: the number of its parameters.

    Raises:
        FileNotFoundError, ValueError: naming what is missing or broken.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder.")
    if is_adapter(folder):
        return check_weights(folder / ADAPTER_WEIGHTS)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: give a folder that save_pretrained (or video-panda-convert) wrote."
        )
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != VideoPandaConfig.model_type:
        raise ValueError(
            f"{folder / 'config.json'} is of a model of the type {model_type!r}, not {VideoPandaConfig.model_type!r}. "
            "A checkpoint of the reference release is to be converted first: video-panda-convert."
        )
    VideoPandaConfig.from_pretrained(folder)
    for name in ("processor_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: save the processor there with its save_pretrained.")
    VideoPandaProcessor.from_pretrained(folder)

    if (folder / WEIGHTS).is_file():
        return check_weights(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}.")
    weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    num_parameters = 0
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{folder / INDEX} names {shard}, which is outside the folder.")
        names = {name for name, file in weight_map.items() if file == shard}
        num_parameters += check_weights(folder / shard, names)
    return num_parameters


def check_weights(file: Path, expected: set[str] = frozenset()) -> int:
    """
    Checks a safetensors file, without reading what its tensors hold.

    Returns: the number of their elements.

    Raises:
        FileNotFoundError, ValueError: for a file that is missing, cut off, or lacks an expected tensor.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing.")
    try:
        with safe_open(file, "pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if missing := expected - set(shapes):
        raise ValueError(f"{file} lacks {len(missing)} tensors that the index says it has, such as {min(missing)}.")
    return sum(prod(shape) for shape in shapes.values())
