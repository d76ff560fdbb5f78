"""Where every tensor of a reference checkpoint goes: one rule per kind of key, and nothing that no rule names.

The reference release keeps STAB under `video_tower` and the projector under `video_projector`, and once more under
`vision_tower` and `mm_projector`. EVE-7B, where training starts, has only the latter, for what it shares with STAB.
"""

import re
from collections.abc import Callable

import torch


DROP = None  # a key that is known and not needed

TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."


def plain(target: str) -> Callable:
    """The tensor as it is, under another name."""
    return lambda tensor: {target: tensor}


def flat(target: str) -> Callable:
    """A (1, 1, D) parameter as (1, D)."""
    return lambda tensor: {target: tensor.flatten(0, -2)}


def linear(target: str) -> Callable:
    """A convolution whose kernel covers its input, (out, in, …), as the linear map it is: (out, in · …)."""
    return lambda tensor: {target: tensor.flatten(1)}


def temporal(target: str) -> Callable:
    """A (channels, 1, 3, 1, 1) kernel over time, without its last axis."""
    return lambda tensor: {target: tensor.squeeze(-1)}


def key_value(target: str) -> Callable:
    """Keys and values stacked on the first axis."""

    def split(tensor):
        key, value = tensor.chunk(2)
        return {f"{target}.key_weight": key, f"{target}.value_weight": value}

    return split


def query_key_value_weight(target: str) -> Callable:
    def split(tensor):
        query, key, value = tensor.chunk(3)
        return {f"{target}.query.weight": query, f"{target}.key_weight": key, f"{target}.value_weight": value}

    return split


def query_key_value_bias(target: str) -> Callable:
    """The keys' bias shifts all scores of a query alike: softmax takes it out again, so it has no place to go."""

    def split(tensor):
        query, _, value = tensor.chunk(3)
        return {f"{target}.query.bias": query, f"{target}.value_bias": value}

    return split


# Keys of STAB after `video_tower.` → what becomes of them.
STAB_RULES = {
    "patch_embedding.weight": linear(TOWER + "patch_embedding.weight"),
    **{
        f"lmhra1.pos_embed.0.{name}": plain(TOWER + f"lste.norm.{name}")
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
    "lmhra1.pos_embed.1.weight": linear(TOWER + "lste.reduce.weight"),
    "lmhra1.pos_embed.1.bias": plain(TOWER + "lste.reduce.bias"),
    "lmhra1.pos_embed.2.weight": temporal(TOWER + "lste.mix.weight"),
    "lmhra1.pos_embed.2.bias": plain(TOWER + "lste.mix.bias"),
    "lmhra1.pos_embed.3.weight": linear(TOWER + "lste.expand.weight"),
    "lmhra1.pos_embed.3.bias": plain(TOWER + "lste.expand.bias"),
    **{
        f"lmhra2.pos_embed.{layer}.{name}": DROP  # built by the reference, never used
        for layer in range(4)
        for name in ("weight", "bias", *(("running_mean", "running_var", "num_batches_tracked") if layer == 0 else ()))
    },
    "dpe.weight": plain(TOWER + "dpe.weight"),
    "dpe.bias": plain(TOWER + "dpe.bias"),
    "temporal_cls_token": flat(TOWER + "gstra.query"),
    "dec.attn.in_proj_weight": query_key_value_weight(TOWER + "gstra.attention"),
    "dec.attn.in_proj_bias": query_key_value_bias(TOWER + "gstra.attention"),
    "dec.attn.out_proj.weight": plain(TOWER + "gstra.attention.output.weight"),
    "dec.attn.out_proj.bias": plain(TOWER + "gstra.attention.output.bias"),
    **{
        f"dec.{theirs}.{name}": plain(TOWER + f"gstra.{ours}.{name}")
        for theirs, ours in {
            "ln_1": "query_norm",
            "ln_2": "mlp_norm",
            "ln_3": "key_norm",
            "mlp.c_fc": "mlp_in",
            "mlp.c_proj": "mlp_out",
        }.items()
        for name in ("weight", "bias")
    },
    **{
        key: rule
        for theirs, ours in {"local_attention": "lsd", "global_attention": "fsra"}.items()
        for key, rule in {
            f"{theirs}.q.0.weight": plain(TOWER + f"{ours}.query_norm.weight"),
            f"{theirs}.q.0.bias": plain(TOWER + f"{ours}.query_norm.bias"),
            f"{theirs}.q.1.weight": plain(TOWER + f"{ours}.attention.query.weight"),
            f"{theirs}.kv.0.weight": plain(TOWER + f"{ours}.key_norm.weight"),
            f"{theirs}.kv.0.bias": plain(TOWER + f"{ours}.key_norm.bias"),
            f"{theirs}.kv.1.weight": key_value(TOWER + f"{ours}.attention"),
            f"{theirs}.proj.weight": plain(TOWER + f"{ours}.attention.output.weight"),
            f"{theirs}.proj.bias": plain(TOWER + f"{ours}.attention.output.bias"),
        }.items()
    },
    "class_embedding": plain(TOWER + "fsra.class_embedding"),
    "balance": plain(TOWER + "fusion.balance"),
    "proj.0.weight": plain(TOWER + "fusion.norm.weight"),
    "proj.0.bias": plain(TOWER + "fusion.norm.bias"),
    "proj.2.weight": plain(TOWER + "fusion.output.weight"),
    "proj.2.bias": plain(TOWER + "fusion.output.bias"),
    "split_embedding": plain(TOWER + "row_embedding"),
}

PROJECTOR_RULES = {
    f"{theirs}.{name}": plain(PROJECTOR + f"{ours}.{name}")
    for theirs, ours in {"0": "linear_1", "2": "linear_2"}.items()
    for name in ("weight", "bias")
}

# The language model and what is dropped, as (pattern of the whole key, what becomes of it).
LANGUAGE_MODEL = re.compile(r"model\.((?:embed_tokens|layers|norm)\..+)")
ROTARY_BUFFER = re.compile(r"model\.layers\.\d+\..*rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")
TEACHER = re.compile(
    r"model\.(?:video_teacher|vision_teacher)\..+"
    r"|model\.(?:video_tower_compressor|vision_tower_compressor)\..*teacher_layer.*"
    r"|model\.vision_tower(?:_compressor)?\..*clip.*"
)
DISTILLATION_HEAD = re.compile(
    r"model\.(?:video_tower_compressor|vision_tower_compressor)\."
    r"(?:norm_layer\.\d+\.[01]\.(?:weight|bias)|(?:input_layer|output_layer)\.(?:weight|bias))"
)


def convert_tensor(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    One tensor of a reference checkpoint as the tensors of this model that it holds; an empty dict for one to drop.

    Raises:
        KeyError: if no rule names the key.
    """
    if ROTARY_BUFFER.fullmatch(key) or TEACHER.fullmatch(key) or DISTILLATION_HEAD.fullmatch(key):
        return {}
    if key == "lm_head.weight":
        return {key: tensor}
    if match := LANGUAGE_MODEL.fullmatch(key):
        return {f"model.language_model.{match[1]}": tensor}
    _, _, rest = key.partition("model.")
    part, _, name = rest.partition(".")
    rules = {
        "video_tower": STAB_RULES,
        "vision_tower": STAB_RULES,
        "video_projector": PROJECTOR_RULES,
        "mm_projector": PROJECTOR_RULES,
    }.get(part, {})
    if not key.startswith("model.") or name not in rules:
        raise KeyError(key)
    rule = rules[name]
    return {} if rule is DROP else rule(tensor)
