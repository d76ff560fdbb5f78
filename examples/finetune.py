"""Fine-tune a Video-Panda checkpoint on videos of your own, then ask it about one of them.

    python examples/finetune.py --data videos/data.jsonl --output runs/mine \\
        --ask videos/kitchen.mp4 "What is being cooked?"

Each line of data.jsonl is one conversation (wrapped here). Paths are relative to the file's folder:

    {"video": "kitchen.mp4", "messages": [{"role": "user", "content": "<video>What is being cooked?"},
                                          {"role": "assistant", "content": "Pancakes."}]}

The JSON of Video-LLaVA, Valley and Video-ChatGPT works too. By default all weights are trained. `--lora` trains STAB,
the projector and adapters of the language model; the adapters are merged at the end. In both cases `--output` is an
ordinary checkpoint. To resume a killed run, repeat the command.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from video_panda_hf import SHIPPED_MODEL
from video_panda_hf.training import (
    LANGUAGE_MODEL_LINEARS,
    STAB_AND_PROJECTOR,
    VideoPandaDataCollator,
    VideoPandaTrainer,
    VideoPandaTrainingArguments,
    last_complete_checkpoint,
    load_conversations,
)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    set_seed(args.seed)
    processor = AutoProcessor.from_pretrained(args.model)
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    # Trained weights stay in float32: the optimizer needs it. Mixed precision computes in bfloat16.
    dtype = torch.bfloat16 if args.lora and bf16 else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype)
    if args.lora:
        model = with_adapters(model)

    checkpoints = args.output / "checkpoints"
    dataset = load_conversations(args.data, args.videos)
    collator = VideoPandaDataCollator(
        processor, args.max_length, on_error="skip", skip_log=args.output / "skipped.jsonl", num_frames=args.num_frames
    )
    training = VideoPandaTrainingArguments(
        checkpoints,
        num_train_epochs=args.epochs,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate or (2e-4 if args.lora else 2e-5),
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        bf16=bf16,
        activation_checkpointing=True,  # recomputes layers in the backward pass: slower, but fits far more tokens
        dataloader_num_workers=args.workers,
        dataloader_persistent_workers=args.workers > 0,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_total_limit=1,
        report_to="none",
        seed=args.seed,
    )
    trainer = VideoPandaTrainer(
        model, training, train_dataset=dataset, data_collator=collator, processing_class=processor
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(checkpoints))

    if args.lora:
        model = model.merge_and_unload()
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    shutil.rmtree(checkpoints, ignore_errors=True)  # only an interrupted run needs them
    print(f"The tuned model is in {args.output}")
    if args.ask:
        print(answer(args.output, *args.ask, num_frames=args.num_frames))


def with_adapters(model):
    from peft import LoraConfig, get_peft_model

    for name in STAB_AND_PROJECTOR:
        getattr(model.model, name).float()
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LANGUAGE_MODEL_LINEARS, modules_to_save=STAB_AND_PROJECTOR)
    return get_peft_model(model, config)


def answer(checkpoint: Path, video: str, question: str, num_frames: int | None) -> str:
    """Loads a checkpoint as any user would, and asks it."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, device_map="auto")
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={} if num_frames is None else {"num_frames": num_frames},
    ).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=128, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="conversations: .jsonl, .json or .parquet")
    parser.add_argument("--videos", type=Path, help="the folder of the videos (default: that of --data)")
    parser.add_argument("--model", default=str(SHIPPED_MODEL), help="folder or Hub id (default: the shipped one)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tuned model")
    parser.add_argument("--ask", nargs=2, metavar=("VIDEO", "QUESTION"), help="ask the tuned model")
    parser.add_argument("--lora", action="store_true", help="adapters for the language model (needs peft)")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--steps", type=int, default=-1, help="end after so many steps, whatever --epochs says")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, help="default: 2e-5, with --lora 2e-4")
    parser.add_argument(
        "--num-frames", type=int, help="frames of a video: 1 or a multiple of 4 (default: the model's)"
    )
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of a conversation with its videos")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode videos")
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--save-steps", type=int, default=500, help="so often, what a killed run goes on from")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
