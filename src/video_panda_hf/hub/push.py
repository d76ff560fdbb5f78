"""`push_folder` checks a checkpoint on disk and uploads it in one commit, so that nobody sees an incomplete upload."""

import json
from math import prod
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

from video_panda_hf.modeling import VideoPandaConfig
from video_panda_hf.processing import VideoPandaProcessor

from .card import CARD, ModelFacts, is_blank, written
from .code import with_code


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Weights of an earlier upload that are not replaced must be deleted: `from_pretrained` could load them.
ALL_WEIGHTS = [WEIGHTS, "model-*.safetensors", INDEX]
# Files of a training in its output folder. `training_args` is a pickle that may contain a token.
NOT_UPLOADED = ["checkpoint-*/*", "runs/*", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "training_args.*"]
NOT_UPLOADED += [".*", "*/.*", "__pycache__/*"]


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
    Uploads a checkpoint (model and processor, or a PEFT adapter) in one commit.

    If neither the folder nor the repository has a model card, one is generated. Old weights in the repository that
    this upload does not replace are deleted.

    Args:
        folder (`str` or `Path`):
            Folder that `save_pretrained` of model and processor, or of a PEFT model, wrote. It is not changed.
        repo_id (`str`):
            `user/name`, or `name` for the token's user. The repository is created if needed.
        private (`bool`, *optional*):
            Whether a new repository is private. Defaults to the owner's setting on the Hub.
        token (`str` or `bool`, *optional*):
            Access token, or `False` for none. Defaults to the one of `hf auth login`.
        revision (`str`, *optional*):
            Branch, created if needed. Defaults to the main branch.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead.
        commit_message (`str`, *optional*):
            Message of the commit. Defaults to one that names the content.
        include_code (`bool`, *optional*, defaults to `True`):
            Whether to upload the code of model and processor, so that users without this package can load them with
            `trust_remote_code=True`. The code is always this package's; code in the folder is ignored.
        license (`str`, *optional*):
            License of the weights in the Hub's spelling, for the model card. Defaults to that of the language model.

    Returns:
        `str`: URL of the files, or of the pull request.

    Raises:
        FileNotFoundError: If a file of the checkpoint is missing. Nothing is uploaded.
        ValueError: If the checkpoint is damaged or of another model. Nothing is uploaded.
        OSError: If the Hub refuses (`HfHubHTTPError`) or a file cannot be uploaded. Nothing of it becomes visible.
    """
    folder = Path(folder)
    num_parameters = check_folder(folder)
    files = files_of(folder)
    if not is_adapter(folder):
        files = with_code(files, include_code)

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = api.list_repo_files(repo_id, revision=revision)

    local = files[CARD].read_text(encoding="utf-8") if CARD in files else None
    published = api.hf_hub_download(repo_id, CARD, revision=revision) if CARD in there else None
    published = Path(published).read_text(encoding="utf-8") if published else None
    card = written(local) or written(published) or local or published
    if not is_adapter(folder) and (card is None or is_blank(card)):
        config = VideoPandaConfig.from_pretrained(folder)
        card = str(ModelFacts(config, include_code, num_parameters, license=license).card(repo_id, api))
    if card is not None:
        files[CARD] = card.encode()

    weights = set(filter_repo_objects(files, allow_patterns=ALL_WEIGHTS))
    stale = set(filter_repo_objects(there, allow_patterns=ALL_WEIGHTS)) - weights if weights else set()
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in sorted(stale)]
    try:
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload {'adapter' if is_adapter(folder) else 'model and processor'}",
            revision=revision,
            create_pr=create_pr,
        )
    except RuntimeError as error:  # huggingface_hub raises it for any error with a large file
        raise OSError(f"{error} {error.__cause__ or ''} Nothing has changed in {repo_id}: try again.") from error
    return commit.pr_url or f"{commit.repo_url}/tree/{revision or 'main'}"


def files_of(folder: str | Path) -> dict[str, Path]:
    """The files of a folder to upload, by their path in it."""
    paths = [file.relative_to(folder).as_posix() for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    return {path: Path(folder) / path for path in filter_repo_objects(paths, ignore_patterns=NOT_UPLOADED)}


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def check_folder(folder: Path) -> int:
    """
    Checks that a checkpoint's configuration, weights and processor are complete and readable.

    Args:
        folder (`Path`):
            The checkpoint's folder.

    Returns:
        `int`: the number of its parameters.

    Raises:
        FileNotFoundError: If a file is missing. The message names it.
        ValueError: If a file is damaged or of another model.
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
    Checks a safetensors file without reading the values. Returns the number of elements of its tensors.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is damaged or lacks an expected tensor.
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
