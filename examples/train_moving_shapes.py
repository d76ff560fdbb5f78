"""Train the small model that ships with the package, from nothing, on videos of moving shapes.

    python examples/train_moving_shapes.py --output runs/moving-shapes

Two stages of plain `transformers.Trainer`: single pictures, from which colour and shape are learned at an eighth of a
video's cost, then videos. Fixed seed; takes under half an hour on two CPU cores. If it is interrupted, the same
command with `--resume` goes on from the last checkpoint.
"""

import argparse
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from moving_shapes import COLOURS, DIRECTIONS, QUESTIONS, SHAPES, Clip, ask, make_clips, mp4
from video_panda_hf import (
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaProcessor,
    VideoPandaVisionConfig,
)


CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' ~ message['content'] -}}
  {%- else -%}
    {{- ' ASSISTANT:' -}}{%- generation -%}{{- ' ' ~ message['content'] ~ eos_token -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"""
IMAGE_SIZE, PATCH_SIZE = 64, 8
STAGES = {  # steps, examples per step
    "pictures": (550, 128),
    "videos": (1000, 32),
}
PICTURES_PER_CLIP = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/moving-shapes"))
    parser.add_argument("--clips", type=int, default=5000, help="number of training clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    args = parser.parse_args()
    if args.output.exists() and any(args.output.iterdir()) and not args.resume:
        parser.error(f"{args.output} is not empty: choose another --output, or --resume an interrupted training")

    set_seed(args.seed)
    processor = new_processor()
    model = new_model(processor)
    datasets = make_datasets(processor, args.clips, args.seed)
    for stage, (steps, batch_size) in STAGES.items():
        folder = args.output / "checkpoints" / stage
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 10,
                weight_decay=0.05,
                adam_beta2=0.99,
                logging_steps=25,
                save_steps=100,
                save_total_limit=1,
                report_to="none",
                seed=args.seed,
                remove_unused_columns=False,
            ),
            train_dataset=datasets[stage],
            data_collator=partial(collate, pad_token_id=processor.tokenizer.pad_token_id),
        )
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)


def new_processor() -> VideoPandaProcessor:
    """A byte-level tokenizer, which no text is foreign to, with whole words for the sentences of this data."""
    things = [*SHAPES, "shape", "object"]
    sentences = [question.format(thing=thing) for kind in QUESTIONS.values() for question in kind for thing in things]
    for colour, shape, direction in zip(COLOURS, [*SHAPES, "circle"], [*DIRECTIONS, *DIRECTIONS], strict=False):
        sentences += Clip(colour, shape, direction, None).answers.values()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        text for sentence in sentences for text in (sentence, sentence.lower(), sentence.replace("colour", "color"))
    ]
    tokenizer.train_from_iterator([f"USER: {text} ASSISTANT: {text}" for text in texts], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=1024
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return VideoPandaProcessor.from_text_pretrained(tokenizer, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)


def new_model(processor: VideoPandaProcessor) -> VideoPandaForConditionalGeneration:
    """1.8 M parameters. So narrow a network learns far faster from weights of 0.08 than from the usual 0.02."""
    tokenizer = processor.tokenizer
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=tokenizer.model_max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # wavelengths of a frame to a whole video
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision_config = VideoPandaVisionConfig(
        hidden_size=128, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, initializer_range=0.08
    )
    config = VideoPandaConfig(
        vision_config=vision_config,
        text_config=text_config,
        video_token_id=processor.video_token_id,
        row_token_id=processor.row_token_id,
    )
    return VideoPandaForConditionalGeneration(config)


def make_datasets(processor: VideoPandaProcessor, count: int, seed: int) -> dict[str, list[dict]]:
    """The examples of each stage. Pixels in half precision: 1.2 GB for 5000 clips."""
    datasets = {stage: [] for stage in STAGES}
    with Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        clips = enumerate(make_clips(count, seed))
        for examples in tqdm(pool.imap(partial(make_examples, processor), clips, 16), "clips", count):
            for stage, of_clip in examples.items():
                datasets[stage] += of_clip
    return datasets


def make_examples(processor: VideoPandaProcessor, numbered_clip: tuple[int, Clip]) -> dict[str, list[dict]]:
    number, clip = numbered_clip
    rng = np.random.default_rng(number)
    pictures = clip.frames[rng.integers(len(clip.frames), size=PICTURES_PER_CLIP)]
    return {
        "pictures": [make_example(processor, picture[None], clip, ["colour", "shape"], rng) for picture in pictures],
        "videos": [make_example(processor, mp4(clip.frames), clip, video_questions(rng), rng)],
    }


def video_questions(rng: np.random.Generator) -> list[str]:
    """A description alone, or all that it is made of: not both, or one answer could be copied from the other."""
    return ["description"] if rng.random() < 0.5 else ["colour", "shape", "direction"]


def make_example(processor, video, clip: Clip, kinds: list[str], rng: np.random.Generator) -> dict:
    """A conversation on one video that asks these kinds of questions, in any order; its answers are the labels."""
    conversation = []
    for kind in rng.permutation(kinds):
        content = [{"type": "text", "text": ask(kind, clip, rng)}]
        if not conversation:
            content.insert(0, {"type": "video", "video": video})
        conversation += [{"role": "user", "content": content}, {"role": "assistant", "content": clip.answers[kind]}]
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    labels = inputs["input_ids"].masked_fill(inputs["assistant_masks"] == 0, -100)
    # As arrays, for a tensor would hold a file open on its way back from the worker process.
    return {
        "input_ids": inputs["input_ids"][0].numpy(),
        "labels": labels[0].numpy(),
        "pixel_values_videos": inputs["pixel_values_videos"].half().numpy(),
        "video_grid_thw": inputs["video_grid_thw"].numpy(),
    }


def collate(examples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Texts padded on the right; pixels packed, for videos need no padding."""
    of = {name: [torch.from_numpy(example[name]) for example in examples] for name in examples[0]}
    return {
        "input_ids": pad_sequence(of["input_ids"], batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in of["input_ids"]], batch_first=True),
        "labels": pad_sequence(of["labels"], batch_first=True, padding_value=-100),
        "pixel_values_videos": torch.cat(of["pixel_values_videos"]).float(),
        "video_grid_thw": torch.cat(of["video_grid_thw"]),
    }


if __name__ == "__main__":
    main()
