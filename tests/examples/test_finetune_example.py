"""From a folder of videos and a jsonl to an answer of the tuned model, as the README has it."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from video_panda_hf.assets import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.training import VideoPandaTrainer


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from finetune import main


pytest.importorskip("datasets")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_commands_of_the_readme_end_with_the_answer_it_promises(tmp_path):
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- finetune -->.*?```bash\n(.*?)```.*?The last line it prints is `(.*?)`", readme, re.DOTALL)
    assert found, "README.md has no commands after <!-- finetune -->"
    install, commands = found[1].split("\n", 1)
    assert install.startswith("pip install")
    for name in ("src", "examples"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().splitlines()[-1] == found[2]


def test_a_killed_run_goes_on_and_a_finished_one_leaves_no_checkpoints(tmp_path, monkeypatch):
    clip = next(SHIPPED_CLIPS.glob("*.mp4"))
    turns = [{"role": "user", "content": "<video>Who is this?"}, {"role": "assistant", "content": "This is Max."}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"video": str(clip), "messages": turns}), encoding="utf-8")
    weights = []
    for output, dies in ((tmp_path / "unbroken", False), (tmp_path / "killed", True), (tmp_path / "killed", False)):
        with monkeypatch.context() as patch:
            if dies:
                patch.setattr(VideoPandaTrainer, "log", lambda *_: sys.exit("killed"))
            arguments = ["--data", tmp_path / "data.jsonl", "--output", output, "--steps", "4", "--workers", "0"]
            with pytest.raises(SystemExit) if dies else contextlib.nullcontext():
                main([*map(str, arguments), "--save-steps", "2", "--logging-steps", "3", "--num-frames", "4"])
        assert (output / "checkpoints" / "checkpoint-2").is_dir() == (output / "checkpoints").exists() == dies
        weights.append(load_file(output / "model.safetensors") if not dies else None)
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_lora_leaves_an_ordinary_checkpoint_and_a_log_of_what_was_skipped(tmp_path, capsys):
    pytest.importorskip("peft")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    clip = next(SHIPPED_CLIPS.glob("*.mp4"))
    turns = [{"role": "user", "content": "<video>Who is this?"}, {"role": "assistant", "content": "This is Max."}]
    rows = [{"id": name, "video": str(name), "messages": turns} for name in (str(clip), "broken.mp4")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    output = tmp_path / "tuned"
    options = ["--lora", "--steps", "2", "--workers", "0", "--learning-rate", "1e-3"]
    main(
        ["--data", str(tmp_path / "data.jsonl"), "--output", str(output), *options, "--ask", str(clip), "Who is this?"]
    )

    assert "The tuned model is in" in capsys.readouterr().out
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in skipped] == ["broken.mp4"] * 2
    before, after = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (SHIPPED_MODEL, output))
    after = dict(after.named_parameters())
    unchanged = {name for name, weight in before.named_parameters() if torch.equal(weight, after[name])}
    assert after.keys() == dict(before.named_parameters()).keys()
    language_model = {name for name in unchanged if ".language_model." in name}
    assert language_model and not any(name.endswith("_proj.weight") for name in language_model)
    assert not any("patch_embedding" in name or "multi_modal_projector" in name for name in unchanged)
