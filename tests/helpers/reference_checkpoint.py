"""Small checkpoints as the reference writes them: golden STAB weights, a made-up Llama, a flat config, a tokenizer."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


GOLDEN = Path(__file__).parents[1] / "golden" / "stab_tiny.safetensors"
CANVAS, PATCH = 64, 4

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def golden() -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """The golden tensors, and what the cases are."""
    with safe_open(GOLDEN, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, json.loads(opened.metadata()["golden"])["cases"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's kind of tokenizer (a space before the text, bytes for unknown characters) that has only letters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


VOCAB_SIZE = len(tiny_tokenizer())


def reference_llm(dtype=torch.float32, **changes) -> LlamaForCausalLM:
    """The synthetic Llama before video training."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA, "vocab_size": VOCAB_SIZE, **changes})
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def reference_tensors(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A whole checkpoint with the reference's names, including copies, training-only and unused tensors."""
    tensors = {key: value for key, value in golden()[0].items() if key.startswith("model.")}
    for key in list(tensors):
        copy = key.replace("video_tower", "vision_tower").replace("video_projector", "mm_projector")
        tensors[copy] = tensors[key].clone()
    tensors |= reference_llm().state_dict()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["model.video_tower_compressor.norm_layer.0.0.weight"] = torch.ones(32)
    tensors["model.video_tower_compressor.teacher_layer.encoder.weight"] = torch.ones(3)
    tensors["model.video_teacher.vision_model.embeddings.weight"] = torch.ones(3)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def eve_tensors() -> dict[str, torch.Tensor]:
    """The tensors of an EVE-7B checkpoint: no temporal layers, no fusion, the older names, its own teacher."""
    of_time = ("lmhra1", "lmhra2", "dpe", "dec.", "temporal_cls_token", "balance", "vision_tower.proj.")
    tensors = {
        key: value
        for key, value in reference_tensors().items()
        if "video_" not in key and not any(part in key for part in of_time)
    }
    tensors["model.vision_clip.vision_model.weight"] = torch.ones(3)
    tensors["model.vision_tower_compressor.clip_layer.weight"] = torch.ones(3)
    return tensors


def flat_config(**changes) -> dict:
    return {
        **LLAMA,
        "architectures": ["EVELlamaForCausalLM"],
        "model_type": "videopanda",
        "mm_hidden_size": 64,
        "mm_projector_type": "mlp2x_gelu",
        "rope_scaling": None,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "video_hidden_size": 64,
        "image_size": CANVAS,
        "vocab_size": VOCAB_SIZE,
        **changes,
    }


def write_reference(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, kind: str = "bin", shards: int = 1, **config
) -> Path:
    """A checkpoint folder as the reference releases it; more than one shard come with an index."""
    folder.mkdir()
    tensors = reference_tensors() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(flat_config(**config)))
    tiny_tokenizer().save_pretrained(folder)

    keys = sorted(tensors)
    stem, suffix = ("pytorch_model", ".bin") if kind == "bin" else ("model", ".safetensors")
    places = {}
    for i in range(shards):
        name = f"{stem}{suffix}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}"
        shard = {key: tensors[key] for key in keys[i::shards]}
        places |= dict.fromkeys(shard, name)
        if kind == "bin":
            torch.save(shard, folder / name)
        else:
            save_file({key: value.contiguous() for key, value in shard.items()}, folder / name, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


def to_patches(pixels: torch.Tensor, patch: int = PATCH) -> tuple[torch.Tensor, list[int]]:
    """Pictures (T, 3, H, W) → patches (T·h·w, 3·patch²) and the grid [T, h, w]."""
    frames, channels, height, width = pixels.shape
    grid = [frames, height // patch, width // patch]
    patches = pixels.view(frames, channels, grid[1], patch, grid[2], patch).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(-1, channels * patch**2), grid
