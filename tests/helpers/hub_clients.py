"""What the processes of `test_hub.py` do: `python hub_clients.py TASK FOLDER`, with `HF_ENDPOINT` set.

`FOLDER` passes tensors from one to another. Packages named by `WITHOUT` in the environment cannot be imported.
"""

# ruff: noqa: E402, for the finder has to be there before anything is imported

import contextlib
import io
import json
import os
import sys
from pathlib import Path


class Missing:
    """Makes Python find that some packages are not installed."""

    packages = os.environ.get("WITHOUT", "").split()

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


for name in [name for name in sys.modules if name.split(".")[0] in Missing.packages]:
    del sys.modules[name]  # torchvision imports PyAV up to 0.21
sys.meta_path.insert(0, Missing())

import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)


CLIP = Path(__file__).parents[2] / "src/video_panda_hf/assets/clips/red_circle_left.mp4"
FOLDER = Path(sys.argv[2])


def inputs_of(processor, *parts):
    content = [*parts, {"type": "video", "video": str(CLIP)}, {"type": "text", "text": "Describe the video."}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def logits_of(model, processor) -> torch.Tensor:
    picture = {"type": "image", "image": Image.new("RGB", (40, 30), "red")}
    with torch.no_grad():
        return model(**inputs_of(processor, picture)).logits


def push():
    """Pushes by `push_folder` and by `push_to_hub`. Keeps the logits that others should find."""
    import peft

    from video_panda_hf import SHIPPED_MODEL, VideoPandaConfig, VideoPandaForConditionalGeneration, VideoPandaProcessor
    from video_panda_hf.hub import push_folder

    model = VideoPandaForConditionalGeneration.from_pretrained(SHIPPED_MODEL)
    model.config.text_config._name_or_path = "ann/llm"  # as `from_text_pretrained("ann/llm")` leaves it
    processor = VideoPandaProcessor.from_pretrained(SHIPPED_MODEL)
    logits = {"main": logits_of(model, processor)}

    def saved(name: str, **options) -> Path:
        for part, kwargs in ((model, options), (processor, {})):
            part.save_pretrained(FOLDER / name, **kwargs)
        return FOLDER / name

    shards = saved("shards", max_shard_size="1MB")
    push_folder(shards, "ann/panda")
    push_folder(saved("whole"), "ann/edited", commit_message="A better model")  # has a card that someone wrote
    push_folder(shards, "ann/no-code", include_code=False)
    VideoPandaConfig().push_to_hub("ann/config")
    processor.video_processor.push_to_hub("ann/video-processor")
    for part in (model, processor):
        part.push_to_hub("ann/secret", private=True)

    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    logits["lighter"] = logits_of(model, processor)
    lighter = saved("lighter")
    push_folder(lighter, "ann/panda", revision="lighter")  # in one file, where main has shards
    push_folder(lighter, "ann/panda", create_pr=True, commit_message="Lighter")

    base = AutoModelForImageTextToText.from_pretrained("ann/panda")
    config = peft.LoraConfig(target_modules=r".*\.language_model\..*q_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    logits["adapter"] = logits_of(adapted.eval(), processor)
    adapted.push_to_hub("ann/adapter")
    save_file(logits, FOLDER / "logits.safetensors")
    return {}


def pull():
    """Loads what was pushed, by id and nothing else."""
    import peft

    trust = {"trust_remote_code": True} if Missing.packages else {}
    if not trust:
        import video_panda_hf  # noqa: F401
    expected = load_file(FOLDER / "logits.safetensors")
    autos = [AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM]
    autos += [AutoProcessor, AutoVideoProcessor]
    loaded = {auto.__name__: auto.from_pretrained("ann/panda", **trust) for auto in autos}
    processor, model = loaded["AutoProcessor"], loaded["AutoModelForImageTextToText"]
    answer = model.generate(**inputs_of(processor), max_new_tokens=20, do_sample=False)[0]
    trusting = {auto.__name__: auto.from_pretrained("ann/panda", trust_remote_code=True) for auto in autos}
    secret = AutoModelForImageTextToText.from_pretrained("ann/secret", token="hf_ann", **trust)
    lighter = AutoModelForImageTextToText.from_pretrained("ann/panda", revision="lighter", **trust)
    pull_request = AutoModelForImageTextToText.from_pretrained("ann/panda", revision="refs/pr/1", **trust)
    adapted = peft.PeftModel.from_pretrained(model, "ann/adapter").eval()

    differences = {
        "main": (trusting["AutoModelForMultimodalLM"], expected["main"]),
        "secret": (secret, expected["main"]),
        "lighter": (lighter, expected["lighter"]),
        "pull request": (pull_request, expected["lighter"]),
        "adapter": (adapted, expected["adapter"]),
    }
    if trust:  # bob, who has no more than the model's own code, pushes it to a place of his own
        lighter.push_to_hub("bob/panda", token="hf_bob")
        processor.push_to_hub("bob/panda", token="hf_bob")
    return {
        "modules": {name: type(thing).__module__ for name, thing in loaded.items()},
        "trusting": {name: type(thing).__module__ for name, thing in trusting.items()},
        "answer": processor.decode(answer, skip_special_tokens=True),
        "card": run_card() if trust else None,
        "differences": {
            name: (logits_of(model, processor) - logits).abs().max().item()
            for name, (model, logits) in differences.items()
        },
    }


def refused():
    """The errors without permission, without trust, without PyAV and without code."""
    attempts = {
        "private": lambda: AutoConfig.from_pretrained("ann/secret"),
        "not trusted": lambda: AutoConfig.from_pretrained("ann/panda", trust_remote_code=False),
        "no av": lambda: AutoProcessor.from_pretrained("ann/panda", trust_remote_code=True),
        "no code": lambda: AutoConfig.from_pretrained("ann/no-code", trust_remote_code=True),
    }
    errors = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ImportError, OSError, ValueError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def run_card() -> str:
    """What the Python code of a model card prints."""
    text = Path(HfApi().hf_hub_download("ann/panda", "README.md")).read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue()


def commands():
    """Runs `video-panda push` with the arguments of every line of `commands.json`."""
    from video_panda_hf.cli import main

    results = []
    for arguments in json.loads((FOLDER / "commands.json").read_text()):
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = main(["push", *arguments])
        results.append({"status": status, "output": output.getvalue(), "errors": errors.getvalue()})
    return results


def train():
    """Trains with `push_to_hub=True`: ours, also where someone wrote a card, and plain `Trainer`."""
    from transformers import Trainer

    from helpers.training import make_trainer
    from video_panda_hf import SHIPPED_MODEL, VideoPandaProcessor

    processor = VideoPandaProcessor.from_pretrained(SHIPPED_MODEL)
    seen = {}
    for repo_id in ("ann/trained", "ann/trained-edited"):
        trainer = make_trainer(
            FOLDER / repo_id, push_to_hub=True, hub_model_id=repo_id, save_strategy="steps", save_steps=1, max_steps=1
        )
        trainer.processing_class = processor
        trainer.train()
        trainer._finish_current_push()
        seen[repo_id] = HfApi().list_repo_files(repo_id)
        trainer.evaluate()
        trainer.push_to_hub(dataset="ann/clips", license="mit")
    options = {"push_to_hub": True, "hub_model_id": "ann/plain", "remove_unused_columns": False, "max_steps": 1}
    trainer = make_trainer(FOLDER / "plain", trainer_class=Trainer, **options)
    trainer.processing_class = processor
    trainer.train()
    trainer.push_to_hub()
    return seen


if __name__ == "__main__":
    tasks = {task.__name__: task for task in (push, pull, refused, commands, train)}
    print(json.dumps(tasks[sys.argv[1]]()))
