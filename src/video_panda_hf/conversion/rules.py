"""One rule per kind of key of a reference checkpoint. A key without a rule is an error.

The reference release stores STAB as `video_tower` and the projector as `video_projector`, and copies of both as
`vision_tower` and `mm_projector`. EVE-7B, where training starts, has only the latter two, with the layers that it
shares with STAB.
"""

import re
from collections.abc import Callable, Iterable

import torch


DROP = None  # rule of a known key that is not needed

TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."


def plain(target: str) -> Callable:
    """Only renames the tensor."""
    return lambda tensor: {target: tensor}


def row(target: str) -> Callable:
    """A (1, 1, D) parameter as (1, D)."""
    return lambda tensor: {target: without_axes(tensor, 3, (0, 1))[None]}


def patch(target: str) -> Callable:
    """A patch embedding convolution (D, channels, p, p) as a linear map (D, channels · p²)."""
    return lambda tensor: {target: tensor.flatten(1)}


def pointwise(target: str) -> Callable:
    """A 1×1×1 convolution as a linear map (out, in)."""
    return lambda tensor: {target: without_axes(tensor, 5, (2, 3, 4))}


def temporal(target: str) -> Callable:
    """A (channels, 1, 3, 1, 1) kernel over time, without its last axis."""
    return lambda tensor: {target: without_axes(tensor, 5, (4,))}


def key_value(target: str) -> Callable:
    """Splits keys and values that are stacked on the first axis."""

    def split(tensor):
        key, value = parts(tensor, 2)
        return {f"{target}.key_weight": key, f"{target}.value_weight": value}

    return split


def query_key_value_weight(target: str) -> Callable:
    def split(tensor):
        query, key, value = parts(tensor, 3)
        return {f"{target}.query.weight": query, f"{target}.key_weight": key, f"{target}.value_weight": value}

    return split


def query_key_value_bias(target: str) -> Callable:
    """Drops the keys' bias: it adds the same to all scores of a query, so the softmax cancels it."""

    def split(tensor):
        query, _, value = parts(tensor, 3)
        return {f"{target}.query.bias": query, f"{target}.value_bias": value}

    return split


def without_axes(tensor: torch.Tensor, ndim: int, axes: tuple[int, ...]) -> torch.Tensor:
    if tensor.ndim != ndim or any(tensor.shape[axis] != 1 for axis in axes):
        raise ValueError(f"{ndim} axes are expected, of length 1 at {list(axes)}")
    return tensor.squeeze(axes)


def parts(tensor: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    if tensor.ndim == 0 or tensor.shape[0] % count:
        raise ValueError(f"the first axis stacks {count} tensors of one length")
    return tensor.chunk(count)


# Keys of STAB after `video_tower.` → their rules.
STAB_RULES = {
    "patch_embedding.weight": patch(TOWER + "patch_embedding.weight"),
    **{
        f"lmhra1.pos_embed.0.{name}": plain(TOWER + f"lste.norm.{name}")
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
    "lmhra1.pos_embed.1.weight": pointwise(TOWER + "lste.reduce.weight"),
    "lmhra1.pos_embed.1.bias": plain(TOWER + "lste.reduce.bias"),
    "lmhra1.pos_embed.2.weight": temporal(TOWER + "lste.mix.weight"),
    "lmhra1.pos_embed.2.bias": plain(TOWER + "lste.mix.bias"),
    "lmhra1.pos_embed.3.weight": pointwise(TOWER + "lste.expand.weight"),
    "lmhra1.pos_embed.3.bias": plain(TOWER + "lste.expand.bias"),
    **{
        f"lmhra2.pos_embed.{layer}.{name}": DROP  # built by the reference, never used
        for layer in range(4)
        for name in ("weight", "bias", *(("running_mean", "running_var", "num_batches_tracked") if layer == 0 else ()))
    },
    "dpe.weight": plain(TOWER + "dpe.weight"),
    "dpe.bias": plain(TOWER + "dpe.bias"),
    "temporal_cls_token": row(TOWER + "gstra.query"),
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

STAB_AND_PROJECTOR_RULES = {
    **{f"model.video_tower.{name}": rule for name, rule in STAB_RULES.items()},
    **{f"model.video_projector.{name}": rule for name, rule in PROJECTOR_RULES.items()},
}

# Patterns of whole keys: the language model, and what is dropped.
LANGUAGE_MODEL = re.compile(r"model\.((?:embed_tokens|layers|norm)\..+)")
ROTARY_BUFFER = re.compile(r"model\.layers\.\d+\..*rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")
TEACHER = re.compile(
    r"model\.(?:video_teacher|vision_teacher)\..+"
    r"|model\.(?:video_tower_compressor|vision_tower_compressor)\..*teacher_layer.*"
    r"|model\.vision_(?=.*clip).+"  # EVE's `vision_clip`, and its parts in `vision_tower_compressor`
)
DISTILLATION_HEAD = re.compile(
    r"model\.(?:video_tower_compressor|vision_tower_compressor)\."
    r"(norm_layer\.\d+\.[01]\.(?:weight|bias)|(?:input_layer|output_layer)\.(?:weight|bias))"
)

# Keys without a counterpart in EVE-7B: all temporal layers, and the fusion.
NOT_IN_EVE = re.compile(r"model\.video_tower\.(?:(?:lmhra1|dpe|dec|proj)\..+|temporal_cls_token|balance)")


def find_rule(key: str) -> Callable | None:
    """
    The rule for a key of a reference checkpoint, or `DROP`.

    A rule is a function from the tensor to `{name in this model: view of the tensor}`. It raises `ValueError` for a
    tensor of a wrong shape.

    Raises:
        KeyError: if there is no rule for the key.
    """
    if any(pattern.fullmatch(key) for pattern in (ROTARY_BUFFER, TEACHER, DISTILLATION_HEAD)):
        return DROP
    if key == "lm_head.weight":
        return plain(key)
    if match := LANGUAGE_MODEL.fullmatch(key):
        return plain(f"model.language_model.{match[1]}")
    return STAB_AND_PROJECTOR_RULES[canonical_key(key)]


def canonical_key(key: str) -> str:
    """One name for a tensor that the release stores twice: `video_tower` for `vision_tower`, and so on."""
    key = re.sub(r"^model\.vision_tower\.", "model.video_tower.", key)
    return re.sub(r"^model\.mm_projector\.", "model.video_projector.", key)


def required_keys(names: Iterable[str]) -> set[str]:
    """The canonical keys that a checkpoint needs for a model with tensors of these names."""
    text = {re.sub(r"^model\.language_model\.", "model.", name) for name in names if "language_model." in name}
    head = {name for name in names if name == "lm_head.weight"}
    return text | head | {key for key, rule in STAB_AND_PROJECTOR_RULES.items() if rule is not DROP}
