"""`examples/train.py` as a user runs it: recipes, a run that is killed, several processes; and that it learns."""

import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, CLIPImageProcessor, set_seed

from helpers.processes import free_port
from helpers.tiny_models import TEXT_CONFIGS, tiny_config
from helpers.tiny_tokenizers import chatml_tokenizer
from helpers.training import tiny_teacher
from helpers.video_files import VideoSpec
from video_panda_hf import VideoPandaConfig, VideoPandaForConditionalGeneration, VideoPandaProcessor
from video_panda_hf.training import VideoPandaDataCollator, VideoPandaTrainer, VideoPandaTrainingArguments


EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT |= {"PET_START_METHOD": "fork", "PET_RUN_PATH": "1"}  # torch's launcher forks: its workers need no imports


def new_model(processor: VideoPandaProcessor, **text) -> VideoPandaForConditionalGeneration:
    sizes = {**tiny_config().text_config.to_dict(), **TEXT_CONFIGS["llama"], "vocab_size": len(processor.tokenizer)}
    sizes |= {"pad_token_id": processor.tokenizer.pad_token_id, "eos_token_id": processor.tokenizer.eos_token_id}
    config = VideoPandaConfig(
        vision_config={"hidden_size": 24, "num_attention_heads": 4, "patch_size": 2, "image_size": 16},
        text_config={**sizes, **text},
        video_token_id=processor.video_token_id,
        row_token_id=processor.row_token_id,
    )
    set_seed(0)
    return VideoPandaForConditionalGeneration(config)


def new_processor() -> VideoPandaProcessor:
    return VideoPandaProcessor.from_text_pretrained(chatml_tokenizer(), image_size=16, patch_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`model`, `teacher` and `data.json`: a tiny checkpoint, a tiny CLIP, conversations about small videos."""
    folder = tmp_path_factory.mktemp("train")
    processor = new_processor()
    processor.save_pretrained(folder / "model")
    new_model(processor).save_pretrained(folder / "model")
    tiny_teacher("clip", image_size=8, patch_size=2).save_pretrained(folder / "teacher")
    CLIPImageProcessor().save_pretrained(folder / "teacher")
    rows = []
    for number, (width, height) in enumerate([(48, 32), (32, 48), (32, 32), (64, 32)]):
        VideoSpec(f"{number}.mp4", "libx264", width=width, height=height, frames=16).write(folder)
        for turn in range(4):
            question = {"from": "human", "value": f"<video>\nWhat is shown in this video, {turn}?"}
            answer = {"from": "gpt", "value": f"lower {'longer ' * turn}string {number}"}
            rows.append({"id": len(rows), "video": f"{number}.mp4", "conversations": [question, answer]})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def command(folder: Path, recipe: str, output: Path, *options: str, strategy: str | None = None) -> list[str]:
    """What follows `python`. `strategy`: a file of examples/accelerate, for two processes on the CPU; `None`: one."""
    launcher, device = [], ["--use_cpu"]
    if strategy is not None:
        config = EXAMPLES / "accelerate" / f"{strategy}.yaml"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes=2"]
        launcher += ["--mixed_precision=no", f"--main_process_port={free_port()}"]
    if strategy == "fsdp2":
        launcher.append(Path(__file__).parents[1] / "helpers" / "fsdp_on_cpu.py")
    if strategy is not None and "deepspeed" in strategy:  # which is not used at all with --use_cpu
        device = ["--ddp_backend", "gloo"]
    options = [*device, *"--bf16 false --dataloader_num_workers 0 --logging_steps 1 --seed 1".split(), *options]
    script = [EXAMPLES / "train.py", "--config", EXAMPLES / "recipes" / f"{recipe}.yaml", "--output_dir", output]
    return list(map(str, [*launcher, *script, "--model", folder / "model", "--data", folder / "data.json", *options]))


def run(forks, *arguments, **options) -> None:
    done = forks.run(command(*arguments, **options), env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]


def logs(checkpoint: Path) -> list[dict]:
    """The log of each step without the speeds."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in entry.items() if "_per_second" not in key} for entry in history]


@pytest.mark.slow
def test_stage_1_runs_by_its_recipe_and_goes_on_where_it_was_killed(forks, folder, tmp_path):
    """SIGKILL after the first checkpoint; the same command again ends with the losses of an unbroken run."""
    options = ["--distillation_teacher", folder / "teacher", "--max_steps", "24", "--save_steps", "3"]
    options += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    run(forks, folder, "stage1", tmp_path / "unbroken", *options)
    expected = logs(tmp_path / "unbroken" / "checkpoint-24")
    assert len(expected) == 24 and {"loss", "language_loss", "distillation_loss"} <= set(expected[0])
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "unbroken"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("language_model" in name or "lm_head" in name for name in changed)
    assert (tmp_path / "unbroken" / "distillation_head.safetensors").is_file()

    killed = tmp_path / "killed"
    process = forks.start(command(folder, "stage1", killed, *options), env=ENVIRONMENT)
    while not (killed / "checkpoint-3" / "trainer_state.json").is_file():
        assert forks.status(timeout=0.005) is None
    os.kill(process, signal.SIGKILL)
    assert forks.status(timeout=30) == -signal.SIGKILL
    assert not (killed / "checkpoint-24").exists()
    run(forks, folder, "stage1", killed, *options)
    assert logs(killed / "checkpoint-24") == expected


def parse(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / "train.py"))["parse_arguments"]()


@pytest.mark.parametrize(
    ("recipe", "rate", "batch"), [("stage1", 4e-4, 2048), ("stage2", 4e-5, 2048), ("stage3", 2e-5, 1024)]
)
def test_recipes_are_the_papers(monkeypatch, recipe, rate, batch):
    arguments = ["--config", EXAMPLES / "recipes" / f"{recipe}.yaml", "--model", "model", "--data", "data.json"]
    _, args = parse(monkeypatch, *arguments, "--bf16", "false", "--use_cpu")
    assert (args.learning_rate, args.weight_decay, args.num_train_epochs) == (rate, 0, 1)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == batch
    assert args.get_warmup_steps(1000) == (30 if recipe == "stage1" else 10)
    assert args.train_vision and args.train_language == (recipe != "stage1")


def test_the_stages_are_as_released(monkeypatch):
    """Each goes on from the model and the head of the one before, with the paper's teacher; stage 1 takes half."""
    runs = {}
    for stage in (1, 2, 3):
        given = ["--model", "model"] if stage == 1 else []
        recipe = ["--config", EXAMPLES / "recipes" / f"stage{stage}.yaml", "--data", "data.json"]
        runs[stage] = parse(monkeypatch, *recipe, *given, "--bf16", "false", "--use_cpu")
    assert [script.first_half for script, _ in runs.values()] == [True, False, False]
    assert {args.distillation_teacher for _, args in runs.values()} == {"LanguageBind/LanguageBind_Video_merge"}
    for stage in (2, 3):
        script, args = runs[stage]
        assert script.model == args.distillation_head == runs[stage - 1][1].output_dir == f"runs/stage{stage - 1}"


def test_a_teacher_of_pictures_is_set_on_the_command_line(monkeypatch):
    given = ["--config", EXAMPLES / "recipes" / "stage2.yaml", "--data", "data.json", "--bf16", "false", "--use_cpu"]
    _, args = parse(monkeypatch, *given, "--picture_teacher", "clip", "--picture_distillation_head", "runs/stage1")
    assert (args.picture_teacher, args.picture_distillation_head) == ("clip", "runs/stage1")
    _, args = parse(monkeypatch, *given, "--picture_teacher", "", "--picture_distillation_head", "")
    assert args.picture_teacher is args.picture_distillation_head is None


@pytest.mark.parametrize(
    ("options", "rows"),
    [([], 5), (["--first_half", "true"], 3), (["--max_samples", "2"], 2), (["--max_samples", "9"], 5)],
)
def test_the_first_rows_are_trained_on(monkeypatch, options, rows):
    given = ["--model", "model", "--data", "data.json", "--output_dir", "out", "--use_cpu", *options]
    script, _ = parse(monkeypatch, *given)
    first_rows = runpy.run_path(str(EXAMPLES / "train.py"))["first_rows"]
    assert first_rows(Dataset.from_dict({"id": list("abcde")}), script)["id"] == list("abcde")[:rows]


def test_no_row_at_all_is_an_error(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, *"--model m --data d.json --output_dir out --use_cpu --max_samples 0".split())
    assert "--max_samples 0" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["lora", "qlora"])
def test_the_command_line_goes_before_the_recipe(monkeypatch, recipe):
    arguments = ["--config", EXAMPLES / "recipes" / f"{recipe}.yaml", "--model", "model", "--data", "data.json"]
    script, args = parse(monkeypatch, *arguments, "--bf16", "false", "--use_cpu", "--lora_rank", "8")
    assert (script.lora_rank, script.lora_alpha, script.load_in_4bit) == (8, 128, recipe == "qlora")
    assert (args.learning_rate, args.vision_learning_rate) == (2e-4, 2e-5)


def test_a_recipe_with_a_setting_that_does_not_exist_is_an_error(monkeypatch, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("learning_rte: 1e-4\n")
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--config", tmp_path / "recipe.yaml")
    assert "settings that do not exist: learning_rte" in capsys.readouterr().err


def test_evaluation_data_that_would_never_be_looked_at_are_an_error(monkeypatch, capsys):
    arguments = [
        "--model",
        "model",
        "--data",
        "data.json",
        "--eval_data",
        "eval.json",
        "--output_dir",
        "out",
        "--use_cpu",
    ]
    with pytest.raises(SystemExit):
        parse(monkeypatch, *arguments)
    assert "--eval_strategy" in capsys.readouterr().err
    assert parse(monkeypatch, *arguments, "--eval_strategy", "epoch")[0].eval_data == ["eval.json"]


def assert_same_run(one: Path, other: Path) -> None:
    """Compares the losses of each step and the final weights, to 1e-5."""
    expected, got = logs(one / "checkpoint-4"), logs(other / "checkpoint-4")
    for key in set(expected[0]) & {"loss", "language_loss", "distillation_loss", "learning_rate"}:
        assert [entry[key] for entry in got] == pytest.approx([entry[key] for entry in expected], abs=1e-5)
    files = {path.name for path in one.glob("*.safetensors")}
    assert files == {path.name for path in other.glob("*.safetensors")}
    for file in files:
        torch.testing.assert_close(load_file(other / file), load_file(one / file), atol=1e-5, rtol=1e-5)


# Four steps on the same global batches. STAB is frozen, for each process' batch norm sees its own part of the batch
# (torch's SyncBatchNorm would see all).
STEPS = "--max_steps 4 --save_steps 2 --learning_rate 1e-3 --train_vision false --gradient_accumulation_steps 2"
STEPS = [*STEPS.split(), "--distillation_head", ""]
BATCH_OF_ONE, BATCH_OF_TWO = (["--per_device_train_batch_size", size] for size in "42")


@pytest.fixture(scope="module")
def one_process(forks, folder, tmp_path_factory) -> Path:
    """The output folder of a run in one process, with distillation."""
    output = tmp_path_factory.mktemp("one") / "process"
    run(forks, folder, "stage3", output, *STEPS, *BATCH_OF_ONE, "--distillation_teacher", folder / "teacher")
    return output


TORCH_2_6 = Version(torch.__version__) < Version("2.7")


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_each_others_checkpoint(forks, folder, tmp_path, one_process):
    options = [*STEPS, "--distillation_teacher", folder / "teacher"]
    two, to_one, to_two = tmp_path / "two", tmp_path / "to_one", tmp_path / "to_two"
    run(forks, folder, "stage3", two, *options, *BATCH_OF_TWO, strategy="ddp")
    assert_same_run(one_process, two)
    shutil.copytree(two / "checkpoint-2", to_one / "checkpoint-2")
    run(forks, folder, "stage3", to_one, *options, *BATCH_OF_ONE)
    assert_same_run(one_process, to_one)
    if not TORCH_2_6:  # which cannot load an optimizer's state onto "cpu:0", the device of two processes
        shutil.copytree(one_process / "checkpoint-2", to_two / "checkpoint-2")
        run(forks, folder, "stage3", to_two, *options, *BATCH_OF_TWO, strategy="ddp")
        assert_same_run(one_process, to_two)


FSDP2_ON_CPU = pytest.mark.skipif(TORCH_2_6, reason="FSDP2 of torch 2.6 asks for streams that a CPU does not have")


@FSDP2_ON_CPU
@pytest.mark.slow
def test_fsdp2_trains_as_one_process(forks, folder, tmp_path, one_process):
    """It also resumes: the run is stopped after its first checkpoint and started again."""
    options = [*STEPS, *BATCH_OF_TWO, "--distillation_teacher", folder / "teacher"]
    run(forks, folder, "stage3", tmp_path, *options, strategy="fsdp2")
    assert (tmp_path / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()
    assert_same_run(one_process, tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    run(forks, folder, "stage3", tmp_path, *options, strategy="fsdp2")
    assert_same_run(one_process, tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.slow
def test_deepspeed_trains_as_one_process(forks, folder, tmp_path, stage):
    """The losses of four steps are equal, and so is the saved model."""
    pytest.importorskip("deepspeed")
    options = [*STEPS, "--distillation_teacher", ""]  # ZeRO-3 has none
    run(forks, folder, "stage3", tmp_path / "one", *options, *BATCH_OF_ONE)
    run(forks, folder, "stage3", tmp_path / "two", *options, *BATCH_OF_TWO, strategy=f"deepspeed_zero{stage}")
    losses = [[entry["loss"] for entry in logs(tmp_path / name / "checkpoint-4")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    one, two = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(two.state_dict(), one.state_dict(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("stage", "devices"), [(2, ("cpu", "none")), (3, ("cpu", "cpu"))])
def test_offloading_is_all_that_its_configuration_adds(stage, devices):
    plain, offload = (
        load_config_from_file(str(EXAMPLES / "accelerate" / f"deepspeed_zero{stage}{name}.yaml")).to_dict()
        for name in ("", "_offload")
    )
    settings = offload["deepspeed_config"]
    assert (settings["offload_optimizer_device"], settings["offload_param_device"]) == devices
    settings |= {"offload_optimizer_device": "none", "offload_param_device": "none"}
    assert offload == plain and settings["zero_stage"] == stage


@pytest.mark.parametrize(
    "strategy",
    ["ddp", pytest.param("fsdp2", marks=FSDP2_ON_CPU), pytest.param("fsdp2_stab", marks=FSDP2_ON_CPU), "zero3"],
)
@pytest.mark.slow
def test_processes_with_and_without_videos_keep_in_step(forks, strategy):
    """Fifty random batches have the gradients of one process."""
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    script = Path(__file__).parents[1] / "helpers" / "mixed_batches.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = forks.run([*launcher, script, strategy], env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]


def train_adapters(monkeypatch, folder, output, recipe: str, *options: str):
    pytest.importorskip("peft")
    options = ["--max_steps", "2", "--gradient_accumulation_steps", "1", *options]
    arguments = command(folder, recipe, output, *options)[1:]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    runpy.run_path(str(EXAMPLES / "train.py"))["main"]()
    weights = load_file(output / "adapter_model.safetensors")
    assert {name.split(".")[4] for name in weights if "lora_" in name} == {"layers"}
    kinds = ("lora_", "vision_tower", "multi_modal_projector")
    assert all(any(kind in name for name in weights) for kind in kinds)
    assert all(any(kind in name for kind in kinds) for name in weights)
    assert {weight.dtype for weight in weights.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("recipe", ["lora", "lora_24gb"])
def test_lora_runs_by_its_recipe(monkeypatch, folder, tmp_path, recipe):
    train_adapters(monkeypatch, folder, tmp_path, recipe, "--bf16", "true")


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_qlora_runs_by_its_recipe(monkeypatch, folder, tmp_path, device):
    pytest.importorskip("bitsandbytes")
    use_cpu = str(device == "cpu").lower()
    train_adapters(monkeypatch, folder, tmp_path, "qlora", "--bf16", "true", "--use_cpu", use_cpu)


def start(monkeypatch, folder, recipe: str, *options) -> list[dict]:
    """Two steps by a recipe, in its own output folder. Returns what was logged."""
    arguments = ["--config", EXAMPLES / "recipes" / f"{recipe}.yaml", "--data", folder / "data.json"]
    arguments += "--use_cpu --bf16 false --dataloader_num_workers 0 --logging_steps 1 --max_steps 2".split()
    arguments += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, *options]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / "train.py"))["main"]()
    output = Path("runs") / recipe
    assert (output / "model.safetensors").is_file()
    return logs(output / "checkpoint-2")


def test_each_stage_starts_from_what_the_one_before_has_saved(monkeypatch, folder, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = {"stage1": ["--model", folder / "model"], "stage2": [], "stage3": []}
    for stage, options in given.items():
        history = start(monkeypatch, folder, stage, "--distillation_teacher", folder / "teacher", *options)
        losses = [entry["distillation_loss"] for entry in history if "distillation_loss" in entry]
        assert len(losses) == 2 and all(0 < loss < 2 for loss in losses)
        assert (Path("runs") / stage / "distillation_head.safetensors").is_file()


def test_a_small_model_starts_by_its_recipe(monkeypatch, folder, tmp_path):
    monkeypatch.chdir(tmp_path)
    history = start(monkeypatch, folder, "full_1b", "--model", folder / "model")
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "runs/full_1b"))
    changed = " ".join(name for name in before if not torch.equal(before[name], after[name]))
    assert all(part in changed for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head"))


def test_each_recipe_is_started_by_a_test():
    tested = {"stage1", "stage2", "stage3", "full_1b", "lora", "lora_24gb", "qlora"}
    assert {file.stem for file in (EXAMPLES / "recipes").iterdir()} == tested


# It learns


@pytest.mark.slow
def test_eight_clips_are_learned_to_the_letter(tmp_path):
    """A model trained from scratch generates every answer exactly. An answer names the brightness of the clip and the
    direction of its bar, which a single frame does not show."""
    processor = new_processor()
    rows = []
    for brightness, level in {"dark": 60, "grey": 120, "light": 190, "white": 255}.items():
        for direction in ("left", "right"):
            clip = np.zeros((8, 16, 16, 3), np.uint8)
            for time_step in range(8):
                column = 2 * (time_step if direction == "right" else 7 - time_step)
                clip[time_step, :, column : column + 2] = level
            question = [{"type": "video", "video": clip}, {"type": "text", "text": "What is shown?"}]
            answer = {"role": "assistant", "content": f"A {brightness} bar moves to the {direction}."}
            rows.append({"messages": [{"role": "user", "content": question}, answer]})

    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.08}
    model = new_model(processor, **sizes)
    arguments = VideoPandaTrainingArguments(
        str(tmp_path),
        max_steps=120,
        activation_checkpointing=False,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=25,
    )
    VideoPandaTrainer(model, arguments, train_dataset=rows, data_collator=VideoPandaDataCollator(processor)).train()

    model.eval()
    for row in rows:
        prompt = processor.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**prompt, max_new_tokens=60, do_sample=False, use_cache=True)
        answer = processor.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == row["messages"][1]["content"]
