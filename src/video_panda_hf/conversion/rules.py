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
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


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


def stacked(*targets: str | None) -> Callable:
    """Splits tensors that are stacked on the first axis. One whose target is `None` is dropped."""

    def split(tensor):
        if tensor.ndim == 0 or tensor.shape[0] % len(targets):
            raise ValueError(f"the first axis stacks {len(targets)} tensors of one length")
        parts = tensor.chunk(len(targets))
        return {target: part for target, part in zip(targets, parts, strict=True) if target is not None}

    return split


def without_axes(tensor: torch.Tensor, ndim: int, axes: tuple[int, ...]) -> torch.Tensor:
    if tensor.ndim != ndim or any(tensor.shape[axis] != 1 for axis in axes):
        raise ValueError(f"{ndim} axes are expected, of length 1 at {list(axes)}")
    return tensor.squeeze(axes)


def layer(theirs: str, ours: str, names: Iterable[str] = ("weight", "bias")) -> dict[str, Callable]:
    """The rules of a layer whose tensors are only renamed."""
    return {f"{theirs}.{name}": plain(f"{ours}.{name}") for name in names}


def attention(theirs: str, ours: str) -> dict[str, Callable]:
    """The rules of an attention layer without biases, and of the norms before it."""
    return {
        **layer(f"{theirs}.q.0", f"{ours}.query_norm"),
        **layer(f"{theirs}.q.1", f"{ours}.attention.query", ["weight"]),
        **layer(f"{theirs}.kv.0", f"{ours}.key_norm"),
        f"{theirs}.kv.1.weight": stacked(f"{ours}.attention.key_weight", f"{ours}.attention.value_weight"),
        **layer(f"{theirs}.proj", f"{ours}.attention.output"),
    }


LSTE, GSTRA, FUSION = TOWER + "lste.", TOWER + "gstra.", TOWER + "fusion."

# Keys of STAB after `video_tower.` → their rules.
STAB_RULES = {
    "patch_embedding.weight": patch(TOWER + "patch_embedding.weight"),
    **layer("lmhra1.pos_embed.0", LSTE + "norm", BATCH_NORM),
    "lmhra1.pos_embed.1.weight": pointwise(LSTE + "reduce.weight"),
    "lmhra1.pos_embed.1.bias": plain(LSTE + "reduce.bias"),
    "lmhra1.pos_embed.2.weight": temporal(LSTE + "mix.weight"),
    "lmhra1.pos_embed.2.bias": plain(LSTE + "mix.bias"),
    "lmhra1.pos_embed.3.weight": pointwise(LSTE + "expand.weight"),
    "lmhra1.pos_embed.3.bias": plain(LSTE + "expand.bias"),
    **layer("dpe", TOWER + "dpe"),
    "temporal_cls_token": row(GSTRA + "query"),
    "dec.attn.in_proj_weight": stacked(
        GSTRA + "attention.query.weight", GSTRA + "attention.key_weight", GSTRA + "attention.value_weight"
    ),
    # The keys' bias is dropped: it adds the same to all scores of a query, so the softmax cancels it.
    "dec.attn.in_proj_bias": stacked(GSTRA + "attention.query.bias", None, GSTRA + "attention.value_bias"),
    **layer("dec.attn.out_proj", GSTRA + "attention.output"),
    **layer("dec.ln_1", GSTRA + "query_norm"),
    **layer("dec.ln_2", GSTRA + "mlp_norm"),
    **layer("dec.ln_3", GSTRA + "key_norm"),
    **layer("dec.mlp.c_fc", GSTRA + "mlp_in"),
    **layer("dec.mlp.c_proj", GSTRA + "mlp_out"),
    **attention("local_attention", TOWER + "lsd"),
    **attention("global_attention", TOWER + "fsra"),
    "class_embedding": plain(TOWER + "fsra.class_embedding"),
    "balance": plain(FUSION + "balance"),
    **layer("proj.0", FUSION + "norm"),
    **layer("proj.2", FUSION + "output"),
    "split_embedding": plain(TOWER + "row_embedding"),
}

STAB_AND_PROJECTOR_RULES = {
    **{f"model.video_tower.{name}": rule for name, rule in STAB_RULES.items()},
    **layer("model.video_projector.0", PROJECTOR + "linear_1"),
    **layer("model.video_projector.2", PROJECTOR + "linear_2"),
}

# Patterns of whole keys: the language model, and what is dropped.
LANGUAGE_MODEL = re.compile(r"model\.((?:embed_tokens|layers|norm)\..+)")
ROTARY_BUFFER = re.compile(r"model\.layers\.\d+\..*rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")
UNUSED = re.compile(  # built by the reference, never used
    r"model\.(?:video_tower|vision_tower)\.lmhra2\.pos_embed\."
    r"(?:[0-3]\.(?:weight|bias)|0\.(?:running_mean|running_var|num_batches_tracked))"
)
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
    if any(pattern.fullmatch(key) for pattern in (ROTARY_BUFFER, UNUSED, TEACHER, DISTILLATION_HEAD)):
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
    return text | ({"lm_head.weight"} & set(names)) | set(STAB_AND_PROJECTOR_RULES)
