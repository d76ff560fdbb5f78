"""Teach a Video-Panda checkpoint which of two answers is better, by TRL's DPO (`pip install trl peft`).

    python examples/dpo.py --data videos/preferences.jsonl --output runs/dpo

Each line of preferences.jsonl has a prompt and two answers (wrapped here). Paths are relative to the file's folder:

    {"video": "kitchen.mp4", "prompt": "<video>What is being cooked?",
     "chosen": "Pancakes, in a black pan.", "rejected": "Food."}

`prompt`, `chosen` and `rejected` may also be lists of messages, as in TRL. Adapters of the language model are trained:
without them the model is its own reference. They are merged at the end, so `--output` is an ordinary checkpoint. With
several GPUs: `accelerate launch --config_file examples/accelerate/ddp.yaml examples/dpo.py …`.
"""

import argparse
import os
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from trl import DPOConfig, DPOTrainer

from video_panda_hf import SHIPPED_MODEL
from video_panda_hf.training import (
    LANGUAGE_MODEL_LINEARS,
    VideoPandaPreferenceCollator,
    freeze_parts,
    keep_in_step,
    load_preferences,
)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    set_seed(args.seed)
    processor = AutoProcessor.from_pretrained(args.model)
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.bfloat16 if bf16 else torch.float32)
    freeze_parts(model)  # also in training, batch norm of STAB uses its saved statistics
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        keep_in_step(model, sharded=True)

    config = DPOConfig(
        str(args.output / "checkpoints"),
        beta=args.beta,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        max_length=None,  # that of the collator counts
        remove_unused_columns=False,
        bf16=bf16,
        dataloader_num_workers=args.workers,
        logging_steps=args.logging_steps,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=load_preferences(args.data, args.videos),
        data_collator=VideoPandaPreferenceCollator(processor, args.max_length, num_frames=args.num_frames),
        processing_class=processor,
        peft_config=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=LANGUAGE_MODEL_LINEARS),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        trainer.model.merge_and_unload().save_pretrained(args.output)
        processor.save_pretrained(args.output)
        print(f"The tuned model is in {args.output}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="pairs of answers: .jsonl, .json or .parquet")
    parser.add_argument("--videos", type=Path, help="the folder of the videos (default: that of --data)")
    parser.add_argument("--model", default=str(SHIPPED_MODEL), help="folder or Hub id (default: the shipped one)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tuned model")
    parser.add_argument("--beta", type=float, default=0.1, help="how much it costs to leave the reference model")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=2, help="pairs for each process")
    parser.add_argument("--accumulate", type=int, default=4, help="batches for each step")
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--num-frames", type=int, help="frames of a video (default: the model's)")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of a conversation with its videos")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode videos")
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
