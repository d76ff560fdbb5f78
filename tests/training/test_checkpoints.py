"""Which checkpoint a run goes on from, and that it goes on as if nothing had been."""

import json
import shutil

import pytest
import torch
from transformers import set_seed

from helpers.training import make_examples, make_trainer
from video_panda_hf.training import checkpoints, last_complete_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, save_strategy="steps", save_steps=1).train()
    return folder


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])


def other_step(file):
    file.write_text(json.dumps({**json.loads(file.read_text()), "global_step": 0}))


DAMAGES = {
    "cut weights": ("model.safetensors", cut),
    "empty weights": ("model.safetensors", lambda file: file.write_bytes(b"")),
    "no weights": ("model.safetensors", lambda file: file.unlink()),
    "weights of zeros": ("model.safetensors", lambda file: file.write_bytes(bytes(file.stat().st_size))),
    "cut optimizer": ("optimizer.pt", cut),
    "empty optimizer": ("optimizer.pt", lambda file: file.write_bytes(b"")),
    "cut random state": ("rng_state.pth", cut),
    "cut state": ("trainer_state.json", cut),
    "empty state": ("trainer_state.json", lambda file: file.write_bytes(b"")),
    "state of nothing": ("trainer_state.json", lambda file: file.write_text("{}")),
    "state that is a list": ("trainer_state.json", lambda file: file.write_text("[]")),
    "state of another step": ("trainer_state.json", other_step),
    "no state": ("trainer_state.json", lambda file: file.unlink()),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, tmp_path, monkeypatch, name, damage):
    warnings = []
    monkeypatch.setattr(checkpoints.logger, "warning", warnings.append)
    folder = shutil.copytree(run, tmp_path / "run")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2") and not warnings
    damage(folder / "checkpoint-2" / name)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-1")
    (warning,) = warnings
    assert str(folder / "checkpoint-2") in warning and (name in warning or "no weights" in warning)


def test_a_run_goes_on_from_the_newest_complete_checkpoint(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    cut(folder / "checkpoint-2" / "optimizer.pt")
    trainer = make_trainer(folder)
    trainer.train(resume_from_checkpoint=True)
    expected = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [e["loss"] for e in expected]
    cut(folder / "checkpoint-1" / "optimizer.pt")
    with pytest.raises(ValueError, match="No valid checkpoint"):
        make_trainer(folder).train(resume_from_checkpoint=True)


def test_shards_that_are_missing_are_noticed(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    trainer = make_trainer(folder)
    weights = folder / "checkpoint-2" / "model.safetensors"
    weights.unlink()
    trainer.model.save_pretrained(weights.parent, max_shard_size="20KB")
    shards = sorted(weights.parent.glob("model-*.safetensors"))
    assert len(shards) > 1 and last_complete_checkpoint(folder) == str(weights.parent)
    shards[1].unlink()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-1")


def test_the_last_complete_checkpoint_is_not_the_last_folder(run, tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-12-kept")
    for step in (9, 10):
        folder = shutil.copytree(run / "checkpoint-2", tmp_path / f"checkpoint-{step}", dirs_exist_ok=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_run_with_a_worker_goes_on_with_the_losses_of_an_unbroken_one(tmp_path):
    """Persistent workers start once in an unbroken run, and again in one that goes on, in training and evaluation.
    Four steps are an epoch: it goes on from the middle of one, and from its end."""
    options = {
        "max_steps": 5,
        "train_sampling_strategy": "random",
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    runs = []
    for checkpoint in (None, 3, 4):
        set_seed(0)
        trainer = make_trainer(tmp_path / str(checkpoint), examples=make_examples(), **options)
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / "None" / f"checkpoint-{checkpoint}"))
        runs.append((trainer.state.log_history, trainer.model.state_dict()))
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history, _ in runs]
    assert len(losses[0]) == 5 and losses[1:] == losses[:1] * 2
    for _, weights in runs[1:]:
        assert all(torch.equal(value, weights[name]) for name, value in runs[0][1].items())
