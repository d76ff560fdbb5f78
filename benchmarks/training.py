"""Peak memory and time of a training step on one long video, with more and more memory savings.

    python benchmarks/training.py                      # on the CPU
    python benchmarks/training.py --device cuda --dtype bfloat16

Each line of the table runs in its own process: forward and backward of the Trainer's step on a video of 2,184 tokens
and an answer of 20, with STAB at the released size, a small language model and random weights. Each line adds one
saving to the line above:
* logits of every position, as in plain `Trainer`;
* logits only for positions with a label, as in `VideoPandaTrainer`;
* gradient checkpointing of the language model's layers;
* gradient checkpointing of STAB too, as with `activation_checkpointing=True`.

Memory is the peak of torch's allocator beyond weights and gradients. It is exact and the same in each run. Optimizer
states are not included.
"""

import argparse
import multiprocessing
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Trainer, set_seed

from stab import peak_bytes
from tables import finish
from video_panda_hf import VideoPandaConfig, VideoPandaForConditionalGeneration
from video_panda_hf.training import VideoPandaTrainer, VideoPandaTrainingArguments


GRID = (8, 32, 32)
ANSWER = 20
VOCABULARY = 32_000
LINES = [
    "all logits, nothing computed twice",
    "logits only at labels (what `VideoPandaTrainer` does)",
    "+ LLM checkpointed",
    "+ STAB checkpointed (both by `activation_checkpointing`)",
]


def example(model, device, dtype) -> dict:
    """A prompt of only the video, and the answer."""
    frames, rows, columns = (size // merge for size, merge in zip(GRID, (1, 2, 2), strict=True))
    row = [model.config.video_token_id] * columns + [model.config.row_token_id]
    video = ([model.config.video_token_id] + row * rows) * frames
    answer = torch.randint(VOCABULARY, (ANSWER,)).tolist()
    batch = {
        "input_ids": torch.tensor([video + answer]),
        "labels": torch.tensor([[-100] * len(video) + answer]),
        "attention_mask": torch.ones(1, len(video) + ANSWER, dtype=torch.long),
        "pixel_values_videos": torch.randn(frames * GRID[1] * GRID[2], 588, dtype=dtype),
    }
    return {**{name: value.to(device) for name, value in batch.items()}, "video_grid_thw": torch.tensor([GRID])}


def measure(line: int, options: argparse.Namespace) -> tuple[int, float]:
    """Bytes and seconds of a step with the first `line` memory savings."""
    set_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    text = {
        "model_type": "llama",
        "hidden_size": options.hidden_size,
        "intermediate_size": 11 * options.hidden_size // 4,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden_size // 64,
        "num_key_value_heads": options.hidden_size // 64,
        "vocab_size": VOCABULARY + 2,
    }
    config = VideoPandaConfig(text_config=text, video_token_id=VOCABULARY, row_token_id=VOCABULARY + 1)
    model = VideoPandaForConditionalGeneration(config).to(device, dtype).train()
    for part in [model.model.language_model, model.model.vision_tower][: max(0, line - 1)]:
        # transformers 5.16 has only the second name. Later releases deprecate it.
        getattr(part, "activation_checkpointing_enable", part.gradient_checkpointing_enable)()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    with tempfile.TemporaryDirectory() as folder:
        arguments = VideoPandaTrainingArguments(folder, use_cpu=device.type == "cpu", report_to="none")
        trainer = (VideoPandaTrainer if line else Trainer)(model, arguments)
        batch = example(model, device, dtype)

        def step():
            trainer.training_step(model, batch, num_items_in_batch=torch.tensor(ANSWER, device=device))

        if device.type == "cuda":
            step()  # warm-up: libraries load and choose their kernels
        peak, times = peak_bytes(step, device), []
        for _ in range(options.rounds):
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return peak, min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden-size", type=int, default=1024, help="of the language model (default: 1024)")
    parser.add_argument("--layers", type=int, default=4, help="of the language model (default: 4)")
    parser.add_argument("--rounds", type=int, default=2, help="steps that a time is the fastest of (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE, for tables.py")
    options = parser.parse_args()

    # One process per line, so that caches and memory fragments of one line do not affect the next.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        results = list(tqdm(pool.imap(partial(measure, options=options), range(len(LINES))), total=len(LINES)))

    (_, slowest), *_ = results
    rows = [
        {"name": name, "megabytes": peak / 1e6, "time": seconds / slowest}
        for name, (peak, seconds) in zip(LINES, results, strict=True)
    ]
    setting = f"{options.device}, {options.dtype}, {torch.get_num_threads()} threads"
    finish("training", {"setting": setting, "rows": rows, "first_row_seconds": slowest}, options.json)


if __name__ == "__main__":
    main()
