"""To the Hub: `push_folder` uploads a checkpoint, checked first and whole, in one commit.

`model.push_to_hub`, `processor.push_to_hub` and `Trainer(push_to_hub=True)` work as for every model of transformers;
this is for a folder that is on disk already, such as a converted checkpoint. `video-panda push` runs it.
"""

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

from .modeling import VideoPandaConfig
from .processing import VideoPandaProcessor


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What training leaves in its output folder beside the model.
NOT_UPLOADED = ["checkpoint-*/*", "runs/*", ".*", "*/.*", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*"]
# Uploaded ones replace all that match: a shard of an earlier, larger checkpoint would be loaded in their place.
REPLACED = ["*.safetensors", "*.safetensors.index.json"]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """
    Uploads a checkpoint (model and processor, or a PEFT adapter) in one commit, so that nobody sees half of it.

    Args:
        folder: what `save_pretrained` of model and processor, or of a PEFT model, wrote.
        repo_id: `user/name`, or `name` for the token's user. Created if there is none.
        private: whether a repository that is created is private. Defaults to what its owner has set.
        token: the token to use, `False` for none. Defaults to the one of `hf auth login`.
        revision: the branch, created if there is none. Defaults to the main one.
        create_pr: whether to open a pull request instead.
        commit_message: defaults to a message that names the folder's content.

    Returns: the URL of the files, or of the pull request.

    Raises:
        FileNotFoundError, ValueError: if the folder is not a complete checkpoint. Nothing has been uploaded then.
        HfHubHTTPError: if the Hub refuses.
    """
    folder = Path(folder)
    check_folder(folder)
    paths = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    paths = list(filter_repo_objects(paths, ignore_patterns=NOT_UPLOADED))

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = [] if create_pr and revision is None else api.list_repo_files(repo_id, revision=revision)
    stale = set(filter_repo_objects(there, allow_patterns=REPLACED)) - set(paths)
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path, folder / path) for path in paths),
            *(CommitOperationDelete(path) for path in sorted(stale) if "/" not in path),
        ],
        commit_message=commit_message or ("Upload adapter" if is_adapter(folder) else "Upload model and processor"),
        revision=revision,
        create_pr=create_pr,
    )
    return commit.pr_url or f"{commit.repo_url}/tree/{revision or 'main'}"


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def check_folder(folder: Path) -> None:
    """
    Checks that a checkpoint's configuration, weights and processor are there and can be read.

    Raises:
        FileNotFoundError, ValueError: naming what is missing or broken.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder.")
    if is_adapter(folder):
        return check_weights(folder / ADAPTER_WEIGHTS, None)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: give a folder that save_pretrained (or video-panda-convert) wrote."
        )
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != VideoPandaConfig.model_type:
        raise ValueError(
            f"{folder / 'config.json'} is of a model of type {model_type!r}, not {VideoPandaConfig.model_type!r}. A "
            "checkpoint of the reference release is to be converted first: video-panda-convert."
        )
    VideoPandaConfig.from_pretrained(folder)
    if (folder / WEIGHTS).is_file():
        check_weights(folder / WEIGHTS, None)
    elif (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise ValueError(f"{folder / INDEX} names {shard}, which is outside the folder.")
            check_weights(folder / shard, {name for name, file in weight_map.items() if file == shard})
    else:
        raise FileNotFoundError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}.")
    if not (folder / "processor_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no processor: save it there with processor.save_pretrained.")
    VideoPandaProcessor.from_pretrained(folder)


def check_weights(file: Path, expected: set[str] | None) -> None:
    """Raises `FileNotFoundError` or `ValueError` for a safetensors file that is missing, cut off, or lacks tensors."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing.")
    try:
        with safe_open(file, "pt") as tensors:
            missing = (expected or set()) - set(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if missing:
        raise ValueError(f"{file} lacks {len(missing)} tensors that the index says it has, such as {min(missing)}.")
