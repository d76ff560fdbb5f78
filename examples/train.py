"""Train Video-Panda by a recipe, on one GPU or many.

    python examples/train.py --config examples/recipes/stage3.yaml --model path/to/checkpoint --data data.json
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train.py --config …

A recipe is a YAML file with any of the arguments below. The command line overrides it. To resume a killed run from its
last checkpoint, repeat the command.
"""

from dataclasses import dataclass, field

import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, HfArgumentParser, set_seed

from video_panda_hf import VideoPandaForConditionalGeneration, VideoPandaProcessor
from video_panda_hf.training import (
    LANGUAGE_MODEL_LINEARS,
    STAB_AND_PROJECTOR,
    VideoPandaDataCollator,
    VideoPandaTrainer,
    VideoPandaTrainingArguments,
    last_complete_checkpoint,
    load_conversations,
)


@dataclass
class ScriptArguments:
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of the Video-Panda to train."})
    llm: str | None = field(default=None, metadata={"help": "Instead of --model: a causal LM to build a new one on."})
    variant: str | None = field(default=None, metadata={"help": "A variant of the model, see examples/ablations."})
    dtype: str = field(default="float32", metadata={"help": "Type of the weights. What is trained needs float32."})
    data: list[str] = field(default_factory=list, metadata={"help": "JSON, JSONL or Parquet file(s), or a Hub id."})
    eval_data: list[str] = field(default_factory=list, metadata={"help": "The same for evaluation. Default: none."})
    video_folder: str | None = field(
        default=None, metadata={"help": "Where relative paths start. Default: the file's."}
    )
    first_half: bool = field(default=False, metadata={"help": "Train on the first half of the good rows."})
    max_samples: int | None = field(default=None, metadata={"help": "Train on so many rows at most, the first ones."})
    max_length: int = field(default=4096, metadata={"help": "The most tokens of a conversation."})
    on_error: str = field(default="raise", metadata={"help": "At a bad row or video: 'raise', or 'skip' and log it."})
    max_skipped_share: float = field(default=0.01, metadata={"help": "End the run when more of the videos are bad."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video. Default: the processor's."})
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank in place of the LLM. 0: none."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapters' scale, times their rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Keep the frozen LLM in 4 bits (QLoRA)."})


def main() -> None:
    script, args = parse_arguments()
    set_seed(args.seed)
    model, processor = load_model(script)
    if script.lora_rank:
        model = add_adapters(model, script, args)

    checkpoint = args.resume_from_checkpoint or last_complete_checkpoint(args.output_dir)
    skip_log = f"{args.output_dir}/skipped.jsonl"
    load = {"video_folder": script.video_folder, "on_error": script.on_error}
    if args.process_index == 0 and checkpoint is None:  # log bad rows once: all processes and resumed runs find them
        load["skip_log"] = skip_log
    frames = {} if script.num_frames is None else {"num_frames": script.num_frames}
    trainer = VideoPandaTrainer(
        model,
        args,
        train_dataset=first_rows(load_conversations(one_or_all(script.data), **load), script),
        eval_dataset=load_conversations(one_or_all(script.eval_data), **load) if script.eval_data else None,
        data_collator=VideoPandaDataCollator(
            processor,
            script.max_length,
            on_error=script.on_error,
            skip_log=skip_log,
            max_skipped_share=script.max_skipped_share,
            **frames,
        ),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


def parse_arguments() -> tuple[ScriptArguments, VideoPandaTrainingArguments]:
    parser = HfArgumentParser((ScriptArguments, VideoPandaTrainingArguments), description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="a recipe: YAML file of any of these arguments")
    if config := parser.parse_known_args()[0].config:
        with open(config) as file:
            recipe = yaml.safe_load(file)
        if unknown := set(recipe) - {action.dest for action in parser._actions}:
            parser.error(f"{config} has settings that do not exist: {', '.join(sorted(unknown))}")
        parser.set_defaults(**recipe)
    script, args, _ = parser.parse_args_into_dataclasses()
    if (script.model is None) == (script.llm is None) or not script.data:
        parser.error("give --data, and either --model or --llm")
    if script.max_samples is not None and script.max_samples < 1:
        parser.error(f"--max_samples {script.max_samples}: there is nothing to train on without a row")
    if script.eval_data and args.eval_strategy == "no":
        parser.error("--eval_data is never looked at without --eval_strategy steps or epoch")
    return script, args


def first_rows(dataset, script: ScriptArguments):
    count = (len(dataset) + 1) // 2 if script.first_half else len(dataset)
    return dataset.select(range(min(count, script.max_samples or count)))


def one_or_all(sources: list[str]) -> str | list[str]:
    return sources[0] if len(sources) == 1 else sources


def load_model(script: ScriptArguments):
    options = {"dtype": script.dtype}
    if script.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if script.variant is not None:
        from ablations.variants import load_variant

        return load_variant(script.variant, script.model, script.llm, **options)
    if script.llm is not None:
        model = VideoPandaForConditionalGeneration.from_text_pretrained(script.llm, **options)
        return model, VideoPandaProcessor.from_text_pretrained(script.llm)
    return AutoModelForImageTextToText.from_pretrained(script.model, **options), AutoProcessor.from_pretrained(
        script.model
    )


def add_adapters(model, script: ScriptArguments, args: VideoPandaTrainingArguments):
    """Adds LoRA to every linear layer of the LLM. STAB and projector, if trained, are trained and saved in full."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if script.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer enables it
    trained = dict(zip(STAB_AND_PROJECTOR, (args.train_vision, args.train_projector), strict=True))
    config = LoraConfig(
        r=script.lora_rank,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=LANGUAGE_MODEL_LINEARS,
        modules_to_save=[name for name, is_trained in trained.items() if is_trained] or None,
    )
    for name in config.modules_to_save or ():
        getattr(model.model, name).float()  # trained weights are in float32, like PEFT's adapters
    return get_peft_model(model, config)


if __name__ == "__main__":
    main()
