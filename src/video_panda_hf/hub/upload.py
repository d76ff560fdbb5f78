"""Uploads files to the Hub in one commit, so that nobody sees an incomplete upload."""

from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects

from .card import CARD, is_blank, written


# Files of a training in its output folder. `training_args` is a pickle that may contain a token.
NOT_UPLOADED = ["checkpoint-*/*", "runs/*", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "training_args.*"]
NOT_UPLOADED += [".*", "*/.*", "__pycache__/*"]
# Weights of an earlier upload that are not replaced must be deleted: `from_pretrained` could load them.
WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


def files_of(folder: str | Path) -> dict[str, Path]:
    """The files of a folder to upload, by their path in it."""
    paths = [file.relative_to(folder).as_posix() for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    return {path: Path(folder) / path for path in filter_repo_objects(paths, ignore_patterns=NOT_UPLOADED)}


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    card: Callable[[str, HfApi], ModelCard] | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
) -> CommitInfo:
    """
    Uploads files in one commit, so that nobody sees an incomplete upload.

    Args:
        files: content or location of each file, by its path in the repository.
        repo_id: `user/name`, or `name` for the token's user. Created if needed.
        card: generates the model card from the repository's full name. It is used if neither `files` nor the
            repository has a card, or only transformers' blank template. A card that a person wrote is never replaced
            by a generated one.
        private, token, revision, create_pr, commit_message, commit_description: as in `push_to_hub`. The branch
            (`revision`) is created if needed.

    Raises:
        OSError: if the Hub refuses (`HfHubHTTPError`) or a file cannot be uploaded. Nothing becomes visible then.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = api.list_repo_files(repo_id, revision=revision)

    files = dict(files)
    local = Path(files[CARD]).read_text(encoding="utf-8") if CARD in files else None
    published = api.hf_hub_download(repo_id, CARD, revision=revision) if CARD in there else None
    published = Path(published).read_text(encoding="utf-8") if published else None
    text = written(local) or written(published) or local or published
    if card is not None and (text is None or is_blank(text)):
        text = str(card(repo_id, api))
    if text is not None:
        files[CARD] = text.encode()

    weights = set(filter_repo_objects(files, allow_patterns=WEIGHTS))
    stale = set(filter_repo_objects(there, allow_patterns=WEIGHTS)) - weights if weights else set()
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in sorted(stale)]
    try:
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    except RuntimeError as error:  # huggingface_hub raises it for any error with a large file
        raise OSError(f"{error} {error.__cause__ or ''} Nothing has changed in {repo_id}: try again.") from error
