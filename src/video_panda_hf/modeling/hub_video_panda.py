"""What a checkpoint shows on the Hub: `upload` puts a folder there in one commit, `ModelFacts.card` describes it."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from .configuration_video_panda import VideoPandaConfig


# What huggingface_hub lets through where a request never reached the Hub: the errors of its HTTP library, which is
# httpx2 since version 2 and httpx before.
HTTP_LIBRARIES = [name for name in ("httpx2", "httpx") if find_spec(name) is not None]
HTTP_ERRORS = (HfHubHTTPError, *(import_module(name).HTTPError for name in HTTP_LIBRARIES))
CARD = "README.md"
# What training leaves in its output folder beside the model. Its arguments are a pickle, maybe with a token in it.
NOT_UPLOADED = ["checkpoint-*/*", "runs/*", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "training_args.*"]
NOT_UPLOADED += [".*", "*/.*", "__pycache__/*"]
# Of these, only what is uploaded stays: weights of an earlier upload, in another number of files, would be loaded.
WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


def files_of(folder: str | Path) -> dict[str, Path]:
    """The files of a folder that are worth uploading, by their path in it."""
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
    tags: Sequence[str] = (),
) -> CommitInfo:
    """
    Uploads files in one commit: until it is done, nobody sees any of them.

    Args:
        files: their content, by their path in the repository.
        repo_id: `user/name`, or `name` for the token's user. Created if there is none.
        card: makes the model card from the repository's full name. It is used where neither `files` nor the
            repository has a card, or only the one that transformers writes without knowing anything. A card that
            someone wrote is never replaced by one that nobody did.
        private, token, revision, create_pr, commit_message, commit_description: as in `push_to_hub`. A branch
            (`revision`) that is not there is created.
        tags: added to the card's.

    Raises:
        OSError: if the Hub refuses (`HfHubHTTPError`), if a file cannot be uploaded. No file of it is visible then.
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
        files[CARD] = with_tags(text, tags).encode()

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
    except RuntimeError as error:  # what huggingface_hub makes of any error with a large file
        raise OSError(f"{error} {error.__cause__ or ''} Nothing has changed in {repo_id}: try again.") from error


@dataclass
class ModelFacts:
    """
    What is known of a checkpoint. What is not known is left out of its card.

    Args:
        config: its configuration.
        has_code: whether its code is uploaded with it.
        num_parameters: of the whole model.
        base_model: Hub id of the model that training started from. Defaults to where the configuration, or that of
            the language model, was loaded from, if that is an id.
        license: Hub's name of it. Defaults to the base model's.
        datasets: what it was trained on: Hub ids, or descriptions.
        metrics: results on held-out data, name → value.
        evaluated_on: the name of that data.
        training: settings of the training, name → value.
        training_log: results during the training, as a Markdown table.
        tags: further tags.
    """

    config: VideoPandaConfig
    has_code: bool = True
    num_parameters: int | None = None
    base_model: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated_on: str | None = None
    training: Mapping[str, object] = field(default_factory=dict)
    training_log: str | None = None
    tags: Sequence[str] = ()

    def card(self, repo_id: str, api: HfApi) -> ModelCard:
        """The model card. Its last line tells whether it was edited later, see `is_generated`."""
        origins = (self.base_model, self.config._name_or_path, self.config.text_config._name_or_path)
        base_model = next((name for name in origins if is_hub_id(name) and name != repo_id), None)
        license = self.license or (base_model and license_of(base_model, api))
        results = [
            EvalResult(
                task_type="video-text-to-text",
                dataset_type=self.evaluated_on or "unknown",
                dataset_name=self.evaluated_on or "held-out data",
                metric_type=name,
                metric_value=value,
            )
            for name, value in self.metrics.items()
        ]
        data = ModelCardData(
            base_model=base_model,
            datasets=[name for name in self.datasets if is_hub_id(name)] or None,
            library_name="transformers",
            license=license,
            model_name=repo_id.split("/")[-1] if results else None,
            eval_results=results or None,
            pipeline_tag="video-text-to-text",
            tags=["video-panda", *self.tags],
        )
        sections = [
            f"# {repo_id.split('/')[-1]}",
            self.summary(),
            "## Use it\n\n" + self.usage(repo_id),
            self.training_section(base_model),
            self.evaluation_section(),
            "## License\n\n" + self.license_section(license),
            "## Citation\n\n" + CITATION,
        ]
        body = "\n\n".join(section for section in sections if section)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
        return ModelCard(f"{card}\n{mark_of(str(card))}\n")

    def summary(self) -> str:
        vision, text = self.config.vision_config, self.config.text_config
        origin = f", {link(text._name_or_path)}," if is_hub_id(text._name_or_path) else ""
        size = f" It has {in_words(self.num_parameters)} parameters." if self.num_parameters else ""
        return (
            "A [Video-Panda](https://arxiv.org/abs/2412.18609) model: it answers questions about videos, without a "
            f"vision encoder. A block called STAB, {vision.hidden_size} wide, turns frames of up to "
            f"{vision.image_size} × {vision.image_size} pixels into tokens of a language model{origin} of the type "
            f"`{text.model_type}` with {text.num_hidden_layers} layers.{size}"
        )

    def usage(self, repo_id: str) -> str:
        code = USAGE.format(
            repo_id=repo_id,
            package="" if self.has_code else "import video_panda_hf\n",
            trust=", trust_remote_code=True" if self.has_code else "",
        )
        if self.has_code:
            needs = (
                "Needs `pip install accelerate av torchvision transformers`. The model's code comes with it. Where "
                "the package `video-panda-hf` is installed, import it: its classes are then used, without "
                "`trust_remote_code`."
            )
        else:
            needs = "Needs the package `video-panda-hf`; importing it registers the model with transformers."
        return f"{needs}\n\n```python\n{code}```"

    def training_section(self, base_model: str | None) -> str:
        parts = []
        if base_model:
            parts.append(f"It started from {link(base_model)}.")
        if self.datasets:
            parts.append(f"Trained on {', '.join(self.datasets)}.")
        if self.training:
            parts.append("\n".join(f"* {name}: {value}" for name, value in self.training.items()))
        if self.training_log:
            parts.append(self.training_log.strip())
        return "## Training\n\n" + "\n\n".join(parts) if parts else ""

    def evaluation_section(self) -> str:
        if not self.metrics:
            return ""
        rows = [f"| {name} | {value:.4g} |" for name, value in self.metrics.items()]
        return "\n".join(["## Evaluation", "", f"| {self.evaluated_on or 'held-out data'} | |", "|---|---:|", *rows])

    def license_section(self, license: str | None) -> str:
        weights = (
            f"The weights: {license}." if license else "The weights are under the license of what they came from."
        )
        return weights + (" The code: Apache-2.0." if self.has_code else "")


USAGE = """\
from huggingface_hub import hf_hub_download
from transformers import AutoModelForImageTextToText, AutoProcessor
{package}
model_id = "{repo_id}"
processor = AutoProcessor.from_pretrained(model_id{trust})
model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto", device_map="auto"{trust})

video = hf_hub_download("raushan-testing-hf/videos-test", "sample_demo_1.mp4", repo_type="dataset")  # or a path, a URL
content = [{{"type": "video", "video": video}}, {{"type": "text", "text": "What happens in the video?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

CITATION = """\
```bibtex
@inproceedings{yi2025videopanda,
  title = {Video-Panda: Parameter-efficient Alignment for Encoder-free Video-Language Models},
  author = {Yi, Jinhui and Wasim, Syed Talal and Luo, Yanan and Naseer, Muzammal and Gall, Juergen},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2025}
}
```"""


BLANK_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
MARK = re.compile(r"\n<!-- Generated by video-panda; edited by hand, it is never overwritten\. (\w+) -->\n?\Z")


def mark_of(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"<!-- Generated by video-panda; edited by hand, it is never overwritten. {digest} -->"


def written(text: str | None) -> str | None:
    """A card that a person wrote or edited; `None` for any other."""
    return None if text is None or is_generated(text) or is_blank(text) else text


def is_generated(text: str) -> bool:
    """Whether a card is as `ModelFacts.card` wrote it."""
    found = MARK.search(text)
    return found is not None and mark_of(text[: found.start()]) == found[0].strip()


def is_blank(text: str) -> bool:
    """Whether a card is the form that transformers and PEFT upload, with nothing filled in."""
    before, after = ModelCard.from_template(ModelCardData(), model_description="\0").text.split("\0")
    body = ModelCard(text, ignore_metadata_errors=True).text
    body = re.sub(r"### Framework versions\s+- PEFT \S+\s*\Z", "", body).strip()
    filled_in = body.removeprefix(before.strip()).removesuffix(after.strip())
    return filled_in != body and filled_in.strip() in ("", BLANK_DESCRIPTION)


def with_tags(text: str, tags: Sequence[str]) -> str:
    """The card with these tags among its own. Unchanged if it has them."""
    card = ModelCard(text)
    missing = [tag for tag in tags if tag not in (card.data.tags or [])]
    if not missing:
        return text
    card.data.tags = [*(card.data.tags or []), *missing]
    edited = str(card)
    return f"{MARK.sub('', edited)}\n{mark_of(MARK.sub('', edited))}\n" if is_generated(text) else edited


def is_hub_id(name: str | None) -> bool:
    return bool(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not os.path.exists(name)


def link(repo_id: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{repo_id})"


def license_of(repo_id: str, api: HfApi) -> str | None:
    """The license that a model's card on the Hub names, if it names one and can be seen from here."""
    try:
        data = api.model_info(repo_id).card_data
    except (*HTTP_ERRORS, OfflineModeIsEnabled):
        return None
    return data.license if data is not None and isinstance(data.license, str) else None


def in_words(count: int) -> str:
    """1234567 → 1.2 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
