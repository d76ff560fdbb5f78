"""Train the shipped small model from scratch on videos of moving shapes, with the paper's recipe.

    python examples/moving_shapes/train.py --output runs/moving-shapes
    python examples/moving_shapes/train.py --output runs/moving-shapes --variant without_lste

First, two models that the recipe needs are trained: a language model, which answers questions about a description in
words, and a vision model to distil from, which names what is in a picture. Then come the three stages: alignment, with
a frozen language model; integration, with captions; instruction tuning, with questions. Pictures come before videos:
they teach colours, shapes and numbers at an eighth of the cost.

`--variant` trains a variant of the model (`examples/ablations`), or distils by MSE or not at all. It uses the language
and vision models that are in the output folder, and writes its result to a subfolder.

The seed is fixed. Takes about 35 minutes on one CPU core with bfloat16 instructions. To resume an interrupted run,
repeat the command.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from data import COLOURS, SAMPLED, SHAPES, Clip, ask, make_clips
from held_out import COUNT, accuracy, print_table


sys.path.append(str(Path(__file__).parents[1]))
from ablations.variants import VARIANTS, VariantForConditionalGeneration, processor_class, variant_config
from video_panda_hf import VideoPandaForConditionalGeneration, VideoPandaProcessor, VideoPandaVisionConfig
from video_panda_hf.hub import remove_code
from video_panda_hf.training import (
    VideoPandaDataCollator,
    VideoPandaTeacher,
    VideoPandaTrainer,
    VideoPandaTrainingArguments,
    last_complete_checkpoint,
)


CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' ~ message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ASSISTANT:' -}}{%- generation -%}{{- ' ' ~ message['content'] | trim ~ eos_token -}}{%- endgeneration -%}
  {%- elif message['role'] == 'system' and loop.first -%}
    {{- message['content'] ~ ' ' -}}
  {%- else -%}
    {{- raise_exception('role ' ~ message['role'] ~ ': take user, assistant, and system for the first message') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"""
IMAGE_SIZE, PATCH_SIZE = 64, 8
VISION = {"hidden_size": 128, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "initializer_range": 0.08}
THINGS = [*COLOURS, *SHAPES]  # what the teacher names
PICTURES_PER_CLIP = 4


@dataclass
class Stage:
    steps: int
    batch_size: int
    data: list[str]
    train_language: bool = True


LANGUAGE = Stage(300, 32, ["texts"])
TEACHER = Stage(400, 128, ["pictures"])
STAGES = {
    "stage1": Stage(100, 128, ["pictures"], train_language=False),
    "stage2-pictures": Stage(400, 128, ["pictures"]),
    "stage2-videos": Stage(200, 32, ["captions"]),
    "stage3": Stage(1300, 32, ["questions", "questions", "captions"]),
}
OTHER_LOSSES = ["without_distillation", "mse"]


def main():
    args = parse()
    output = args.output / args.variant if args.variant else args.output
    vision_config = VideoPandaVisionConfig(**VISION)
    model_type, processor_type = VideoPandaForConditionalGeneration, VideoPandaProcessor
    if args.variant in VARIANTS:
        vision_config = variant_config(args.variant, vision_config)
        model_type, processor_type = VariantForConditionalGeneration, processor_class(vision_config)

    set_seed(args.seed)
    tokenizer = new_tokenizer()
    processor = processor_type.from_text_pretrained(
        tokenizer, vision_config.image_size, PATCH_SIZE, merge_size=vision_config.spatial_merge_size
    )
    data = make_datasets(processor, args.clips, args.seed)
    language, teacher = args.output / "language", args.output / "teacher"
    if not is_finished(language):
        train_language(language, tokenizer, data["texts"], args.seed)
    if not is_finished(teacher):
        train_teacher(teacher, data["pictures"], args.seed)

    previous = None
    for name, stage in STAGES.items():
        if not is_finished(output / name):
            set_seed(args.seed)
            if previous is None:
                model = model_type.from_text_pretrained(str(language), vision_config)
            else:
                model = AutoModelForImageTextToText.from_pretrained(previous)
            distillation = {"distillation_teacher": str(teacher), "distillation_head": previous and str(previous)}
            if args.variant == "mse":
                distillation["distillation_distance"] = "mse"
            elif args.variant == "without_distillation":
                distillation = {}
            train_stage(stage, output / name, model, processor, data, args, distillation)
        previous = output / name

    model = AutoModelForImageTextToText.from_pretrained(previous)
    model.config.text_config.use_cache = True  # training turns it off
    model.save_pretrained(output)
    processor.save_pretrained(output)
    remove_code(output)
    clips = list(make_clips(COUNT, 0, held_out=True))
    print_table({f"{COUNT} held-out clips": accuracy(model, processor, clips, 0)})


def train_stage(stage: Stage, folder: Path, model, processor, data, args, distillation: dict) -> None:
    trainer = VideoPandaTrainer(
        model,
        VideoPandaTrainingArguments(
            **arguments_of(stage, folder, args.seed), train_language=stage.train_language, **distillation
        ),
        train_dataset=[example for part in stage.data for example in data[part]],
        data_collator=pack,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    trainer.save_model()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/moving-shapes"))
    parser.add_argument("--variant", choices=[*VARIANTS, *OTHER_LOSSES], help="train this in place of the model")
    parser.add_argument("--clips", type=int, default=7000, help="number of training clips")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def is_finished(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def arguments_of(stage: Stage, folder: Path, seed: int) -> dict:
    """Settings of all trainings. Such a narrow network learns best at a high rate, even with small batches."""
    return {
        "output_dir": folder,
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch_size,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.05,
        "adam_beta2": 0.99,
        "bf16": True,
        "use_cpu": True,
        "logging_steps": 25,
        "save_steps": 100,
        "save_total_limit": 1,
        "report_to": "none",
        "seed": seed,
        "remove_unused_columns": False,
    }


# Tokenizer, language model and teacher


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: it encodes any text, and the words of this data are single tokens."""
    rng = np.random.default_rng(0)
    sentences = [ask(kind, clip, rng) for clip in make_clips(1000, 0, frames=1) for kind in clip.questions]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"USER: {question} ASSISTANT: {answer}" for question, answer in sentences], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


def train_language(folder: Path, tokenizer: PreTrainedTokenizerFast, texts: list[dict], seed: int) -> None:
    """Trains a small Llama to answer questions about a description. Later, a video's tokens replace the description.
    Such a narrow network learns far faster with an initializer range of 0.08 than with the usual 0.02."""
    config = LlamaConfig(
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
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(**arguments_of(LANGUAGE, folder, seed))
    trainer = Trainer(model, arguments, train_dataset=texts, data_collator=pack, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    trainer.save_model()


def train_teacher(folder: Path, pictures: list[dict], seed: int) -> None:
    """Trains a small ViT to name the colours and shapes in a picture, at the size that the teacher will see."""
    side, patch_size = IMAGE_SIZE // 2, PATCH_SIZE // 2
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch_size,
        num_labels=len(THINGS),
        problem_type="multi_label_classification",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,
    )
    model = ViTForImageClassification(config)
    image_processor = ViTImageProcessor(size={"height": side, "width": side})
    view = VideoPandaTeacher(
        ViTForImageClassification(config).vit,
        VideoPandaVisionConfig(**VISION),
        image_processor.image_mean,
        image_processor.image_std,
    )

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = pack(examples)
        labels = torch.from_numpy(np.stack([example["things"] for example in examples]))
        return {
            "pixel_values": view.frames(batch["pixel_values_videos"], batch["video_grid_thw"]),
            "labels": labels.float(),
        }

    trainer = Trainer(
        model,
        TrainingArguments(**arguments_of(TEACHER, folder, seed)),
        train_dataset=pictures,
        data_collator=collate,
        processing_class=image_processor,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    trainer.save_model()


# Data


def make_datasets(processor: VideoPandaProcessor, count: int, seed: int) -> dict[str, list[dict]]:
    """The examples of each part of the training. Pixels are in half precision: 2 GB for 5000 clips."""
    datasets = {}
    with Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        clips = enumerate(make_clips(count, seed, frames=SAMPLED))
        for examples in tqdm(pool.imap(partial(make_examples, processor), clips, 16), "clips", count, mininterval=5):
            for part, of_clip in examples.items():
                datasets.setdefault(part, []).extend(of_clip)
    return datasets


def make_examples(processor: VideoPandaProcessor, numbered_clip: tuple[int, Clip]) -> dict[str, list[dict]]:
    number, clip = numbered_clip
    rng = np.random.default_rng(number)
    alike = len(set(clip.things)) == 1  # otherwise there is no question about a single frame
    pictures = [clip.frames[i][None] for i in rng.integers(SAMPLED, size=PICTURES_PER_CLIP * alike)]
    story = "\n".join([clip.description] * rng.integers(1, 6))
    return {
        "texts": [
            make_example(processor, {"type": "text", "text": story + "\n"}, clip, kinds, rng)
            for kinds in (video_questions(clip, rng), video_questions(clip, rng), ["description"])
        ],
        "pictures": [
            make_example(processor, {"type": "video", "video": picture}, clip, picture_questions(clip, rng), rng)
            for picture in pictures
        ],
        "captions": [make_example(processor, {"type": "video", "video": clip.frames}, clip, ["description"], rng)],
        "questions": [
            make_example(processor, {"type": "video", "video": clip.frames}, clip, video_questions(clip, rng), rng)
        ],
    }


def picture_questions(clip: Clip, rng: np.random.Generator) -> list[str]:
    """The kinds of questions that a single frame answers."""
    return list(rng.permutation([kind for kind in clip.questions if kind in ("colour", "shape", "count")]))


def video_questions(clip: Clip, rng: np.random.Generator) -> list[str]:
    """Some of a clip's questions, chosen so that no answer contains the answer to another one."""
    if clip.kind == "order":
        return [str(rng.choice(["first", "last"]))]
    own = [kind for kind in clip.questions if kind in ("direction", "pace", "count")]
    return list(rng.permutation([*own, str(rng.choice(["colour", "shape"]))]))


def make_example(processor, part: dict, clip: Clip, kinds: list[str], rng: np.random.Generator) -> dict:
    """A conversation with these kinds of questions about a video, picture or description."""
    messages = []
    for kind in kinds:
        question, answer = ask(kind, clip, rng)
        content = [{"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    messages[0]["content"].insert(0, part)
    batch = VideoPandaDataCollator(processor, do_sample_frames=False)([{"messages": messages}])
    # Arrays, because sending a tensor from a worker process keeps a file open.
    example = {"input_ids": batch["input_ids"][0].numpy(), "labels": batch["labels"][0].numpy()}
    if part["type"] == "video":
        example["pixel_values_videos"] = batch["pixel_values_videos"].half().numpy()
        example["video_grid_thw"] = batch["video_grid_thw"].numpy()
        example["things"] = np.array([any(name in thing for thing in clip.things) for name in THINGS])
    return example


def pack(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Packs examples that `VideoPandaDataCollator` made one by one. Videos are thus processed once, not every step."""
    of = {name: [torch.from_numpy(example[name]) for example in examples] for name in examples[0]}
    batch = {
        "input_ids": pad_sequence(of["input_ids"], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in of["input_ids"]], batch_first=True),
        "labels": pad_sequence(of["labels"], batch_first=True, padding_value=-100),
    }
    if "video_grid_thw" in of:
        batch["pixel_values_videos"] = torch.cat(of["pixel_values_videos"]).float()
        batch["video_grid_thw"] = torch.cat(of["video_grid_thw"])
    return batch


if __name__ == "__main__":
    main()
