"""Tiny models with random weights, and prompts for them, built where a test needs them."""

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from video_panda_hf import VideoPandaConfig, VideoPandaForConditionalGeneration, VideoPandaProcessor


PATCH_DIM = 3 * 2 * 2
VIDEO, ROW, EOS, PAD = 3, 4, 1, 2

# The cache of the language model, as an argument and in outputs. transformers renamed it in 5.24.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

TEXT_CONFIGS = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True},
}


def tiny_config(text: str = "llama", **vision) -> VideoPandaConfig:
    """A canvas of 8 × 8 patches of 2 × 2 pixels, 24 wide, before a language model of two layers, 32 wide."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return VideoPandaConfig(
        vision_config={"hidden_size": 24, "num_attention_heads": 4, "patch_size": 2, "image_size": 16, **vision},
        text_config={**sizes, **TEXT_CONFIGS[text]},
        video_token_id=VIDEO,
        row_token_id=ROW,
    )


def tiny_model(text: str = "llama", dtype=torch.float32, **vision) -> VideoPandaForConditionalGeneration:
    """The model in eval mode. No weight is zero, so that every branch counts."""
    return model_of(tiny_config(text, **vision), dtype)


def model_with_processor(tokenizer, text: str = "llama", **vision):
    """A tiny model, and the processor that goes with it, made of this tokenizer."""
    processor = VideoPandaProcessor.from_text_pretrained(tokenizer, image_size=16, patch_size=2)
    config = tiny_config(text, **vision)
    config.text_config.vocab_size = len(processor.tokenizer)
    config.text_config.eos_token_id = processor.tokenizer.eos_token_id
    config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    config.video_token_id, config.row_token_id = processor.video_token_ids
    return model_of(config), processor


def model_of(config: VideoPandaConfig, dtype=torch.float32) -> VideoPandaForConditionalGeneration:
    torch.manual_seed(0)
    model = VideoPandaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.add_(0.2 * noise) if "running_var" not in name else value.copy_(1 + noise.abs())
    return model.to(dtype).eval()


def checkpoint_activations(model: torch.nn.Module, **options) -> None:
    """`activation_checkpointing_enable`, under whichever name the installed transformers has it."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
    enable(options or None)


def placeholders(frames: int, rows: int, columns: int) -> list[int]:
    """The tokens of a video of so many frames of rows × columns patches."""
    return ([VIDEO] + ([VIDEO] * (columns // 2) + [ROW]) * (rows // 2)) * frames


def tiny_batch(prompts: list[list[tuple[int, int, int]]], seed: int = 0) -> dict[str, torch.Tensor]:
    """
    A left-padded batch: each prompt a list of grids (frames, rows, columns), its videos, among a few random words.
    What a prompt holds depends on its own grids alone, not on its company.
    """
    ids, pixels, grids = [], [], []
    for grids_of_prompt in prompts:
        generator = torch.Generator().manual_seed(seed + hash(tuple(grids_of_prompt)) % 1000)
        words = torch.randint(5, 99, (2 + len(grids_of_prompt),), generator=generator).tolist()
        prompt = words[:1]
        for grid, word in zip(grids_of_prompt, words[1:], strict=False):
            prompt += [*placeholders(*grid), word]
            frames, rows, columns = grid
            pixels.append(torch.randn(frames * rows * columns, PATCH_DIM, generator=generator))
            grids.append(grid)
        ids.append([*prompt, words[-1]])
    longest = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
    }
    if pixels:
        batch["pixel_values_videos"], batch["video_grid_thw"] = torch.cat(pixels), torch.tensor(grids)
    return batch
