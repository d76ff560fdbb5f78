"""Memory of one GPU for weights, gradients and optimizer by each recipe, by arithmetic, as docs/training.md has it.

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py --teacher runs/teacher

Each model is built on the `meta` device, with adapters and frozen parts as `examples/train.py` makes them, and its
weights are counted in their dtypes. A trained weight has a gradient and AdamW's two moments, 4 bytes each, beside its
own 4. Activations come on top. Needs `peft`.

`--teacher` makes up a folder in the layout of LanguageBind's repository, its video tower of the real sizes, with 1 GB
beside it that is not of the tower, and random weights in float16. It measures memory and time of loading in float32
and of eight frames of 224 pixels. Needs Linux.
"""

import argparse
import json
import runpy
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config

from tables import markdown
from video_panda_hf import VideoPandaConfig, VideoPandaForConditionalGeneration
from video_panda_hf.training import LanguageBindVideoTower, VideoPandaDistillationHead
from video_panda_hf.training.languagebind import name_in_checkpoint
from video_panda_hf.training.parts import freeze_parts


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
GIGABYTE = 1e9
STATE_BYTES = 12  # of a trained weight: gradient and two moments in float32
FOUR_BIT_BYTES = 0.5 + 4 / 64  # bitsandbytes' nf4: half a byte, and a scale in float32 for 64 weights


def qwen(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


LANGUAGE_MODELS = {
    "Qwen2.5-0.5B": qwen(896, 4864, 24, 14),
    "Llama-3.2-1B": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B": qwen(1536, 8960, 28, 12),
    "Qwen2.5-3B": qwen(2048, 11008, 36, 16),
    "7B": LlamaConfig(),  # Llama-7B's sizes
}
RECIPES = {
    "stage1": ["7B"],
    "stage2": ["7B"],
    "stage3": ["7B"],
    "full_1b": ["Qwen2.5-0.5B", "Llama-3.2-1B"],
    "lora_24gb": ["Llama-3.2-1B", "Qwen2.5-1.5B", "Qwen2.5-3B"],
    "lora": ["7B"],
    "qlora": ["7B"],
}
# LanguageBind's video tower, as its repository's configuration has it
TEACHER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEACHER |= {"image_size": 224, "patch_size": 14}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, metavar="FOLDER", help="measure a teacher that is made up here")
    args = parser.parse_args()
    print(table() if args.teacher is None else measured_teacher(args.teacher))


def measured_teacher(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        tower = tower_of_languagebind()
    weights = {
        name_in_checkpoint(name): torch.randn(value.shape).mul_(0.02).half()
        for name, value in tower.state_dict().items()
    }
    save_file({**weights, "text_model.embeddings": torch.ones(500_000_000).half()}, folder / "model.safetensors")
    config = {"vision_config": {**TEACHER, "add_time_attn": True, "num_frames": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    del weights

    before = reset_peak()
    start = time.process_time()
    tower = LanguageBindVideoTower.from_pretrained(folder)
    loaded, seconds = peak(), time.process_time() - start
    size = sum(weight.nbytes for weight in tower.parameters())
    reset_peak()
    start = time.process_time()
    with torch.no_grad():
        shape = tuple(tower.features(torch.randn(8, 3, 224, 224)).shape)
    file_size = (folder / "model.safetensors").stat().st_size
    return (
        f"{size / GIGABYTE:.2f} GB of weights, of a file of {file_size / GIGABYTE:.2f} GB; peak in loading "
        f"{(loaded - before) / GIGABYTE:.2f} GB, {seconds:.0f} s; in running {(peak() - before) / GIGABYTE:.2f} GB, "
        f"{time.process_time() - start:.0f} s; features {shape}"
    )


def peak() -> int:
    """The most bytes that were resident since `reset_peak`."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def reset_peak() -> int:
    """Returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def tower_of_languagebind() -> LanguageBindVideoTower:
    return LanguageBindVideoTower(CLIPVisionConfig(**TEACHER, attn_implementation="sdpa"), num_frames=8)


def table() -> str:
    lines = [["file", "weights, gradients, optimizer", "of it, the teacher"]]
    for recipe, names in RECIPES.items():
        found = {name: memory(recipe, LANGUAGE_MODELS[name]) for name in names}
        whole = ", ".join(f"{sum(parts) / GIGABYTE:.1f} GB ({name})" for name, parts in found.items())
        teacher = next(iter(found.values()))[1]
        line = [f"`examples/recipes/{recipe}.yaml`", whole, f"{teacher / GIGABYTE:.1f} GB" if teacher else "none"]
        lines.append(line)
    return markdown(lines)


def memory(recipe: str, text_config) -> tuple[float, float]:
    """Bytes of the model with what its training needs, and of the teacher."""
    train = runpy.run_path(str(EXAMPLES / "train.py"))
    given = [
        "train.py",
        "--config",
        str(EXAMPLES / "recipes" / f"{recipe}.yaml"),
        "--data",
        "data.json",
        "--model",
        "any",
    ]
    with patch.object(sys, "argv", [*given, "--bf16", "false", "--use_cpu"]):
        script, args = train["parse_arguments"]()
    # Of a quantised model, `meta` holds the frozen weights as PEFT leaves them: float32 where they are not in 4 bits.
    is_4_bit, script.load_in_4bit = script.load_in_4bit, False
    config = VideoPandaConfig(text_config=text_config.to_dict())
    with torch.device("meta"):
        model = VideoPandaForConditionalGeneration(config).to(
            torch.float32 if is_4_bit else getattr(torch, script.dtype)
        )
        if script.lora_rank:
            model = train["add_adapters"](model, script, args)
        else:
            freeze_parts(
                model,
                train_vision=args.train_vision,
                train_projector=args.train_projector,
                train_language=args.train_language,
            )
        teacher = head = None
        if args.distillation_teacher is not None:
            # Its last layer is not loaded. Trained in mixed precision, a teacher is in bfloat16.
            teacher = LanguageBindVideoTower(CLIPVisionConfig(**TEACHER, attn_implementation="sdpa"), num_frames=8).to(
                torch.bfloat16
            )
            head = VideoPandaDistillationHead(
                text_config.hidden_size, TEACHER["hidden_size"], text_config.num_hidden_layers
            )
    total = 0.0
    for part in filter(None, (model, head)):
        for name, weight in part.named_parameters():
            in_4_bits = is_4_bit and not weight.requires_grad and ".language_model." in name and "_proj." in name
            total += weight.numel() * FOUR_BIT_BYTES if in_4_bits and weight.dim() == 2 else weight.nbytes
            total += STATE_BYTES * weight.numel() * weight.requires_grad
    teacher_bytes = sum(weight.nbytes for weight in teacher.parameters()) if teacher is not None else 0
    return total + teacher_bytes, teacher_bytes


if __name__ == "__main__":
    main()
