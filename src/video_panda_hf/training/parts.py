"""The parts of a model in training: STAB, projector, language model, distillation head."""

import re
from collections import namedtuple
from dataclasses import fields

import torch
from torch import nn


# For `target_modules` of a PEFT configuration: every linear layer of the LLM, none of STAB, projector or heads. Works
# for LLMs with layers named q_proj, …, down_proj: Llama, Qwen, SmolLM, Mistral, Gemma, Phi.
LANGUAGE_MODEL_LINEARS = r".*\.language_model\..*_proj"
# For `modules_to_save` of a PEFT configuration: trained in full, and saved with the adapters.
STAB_AND_PROJECTOR = ["vision_tower", "multi_modal_projector"]

PART = re.compile(r"(?:^|\.)(?:picture_)?(vision_tower|multi_modal_projector|distillation_head)\.")


def freeze_parts(
    model: nn.Module, *, train_vision: bool = False, train_projector: bool = False, train_language: bool = False
) -> None:
    """
    Freezes the parts that are not trained. `VideoPandaTrainer` does so.

    A frozen STAB stays in eval mode, even after `train()`, so that its batch norm statistics do not change and its
    dropout stays off.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model, or a PEFT model around one. It is changed in place.
        train_vision, train_projector, train_language (`bool`, *optional*, default to `False`):
            Whether to leave STAB, the projector, or the language model and its head as they are.
    """
    trained = {
        "vision_tower": train_vision,
        "multi_modal_projector": train_projector,
        "distillation_head": True,
        None: train_language,
    }
    for name, parameter in model.named_parameters():
        if not trained[module_of(name)]:
            parameter.requires_grad_(False)
    tower = base_model(model).model.vision_tower
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.register_forward_pre_hook(lambda tower, _: tower.eval() and None)


def keep_in_step(model: nn.Module, sharded: bool = False) -> None:
    """
    Makes every forward use all of STAB and the projector. `VideoPandaTrainer` does so for several processes.

    Text needs neither of them, and a picture no temporal layer. But processes exchange gradients, and weights if these
    are sharded. Without this, a process with videos and one without would wait for each other for ever. Where a batch
    has no moving video, a clip of one window, all zeros, is encoded with its pictures. The clip's tokens go nowhere:
    the loss is the same, and what only the clip used gets gradients of zero. The statistics of batch norm stay.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model, or a PEFT model around one. It is changed in place.
        sharded (`bool`, *optional*, defaults to `False`):
            Whether the weights are sharded (FSDP, ZeRO-3). This is then done in eval mode, too.
    """

    def encode(inner, args, inputs: dict):
        is_encoded = any(inputs.get(name) is not None for name in ("mm_encoder_outputs", "input_features"))
        if is_encoded or not (sharded or inner.training):
            return None
        tower, adds_clip = inner.vision_tower, not has_moving_video(inputs)
        pixels, grids = with_clip(inner.config.vision_config, inputs) if adds_clip else videos_of(inputs)
        if sharded and torch.is_grad_enabled() and any(weight.requires_grad for weight in tower.parameters()):
            # DeepSpeed takes the backward of STAB for done when its input has a gradient, or at once if it needs none.
            pixels = pixels.detach().requires_grad_()
        norms = [part for part in tower.modules() if isinstance(part, nn.BatchNorm1d) and part.training and adds_clip]
        for norm in norms:  # which sees moving videos alone
            norm.eval()
        # Processes have to gather weights in one order: videos, too, are encoded here, before the text is embedded.
        features = inner.get_video_features(pixels, grids, return_dict=True)
        for norm in norms:
            norm.train()
        if adds_clip:
            *of_pictures, of_clip = features.pooler_output
            features.pooler_output = (*of_pictures, of_clip[:0])
        return args, {**inputs, "mm_encoder_outputs": {"video": features}}

    def as_tuple(tower, args, outputs):
        names = [field.name for field in fields(outputs)]
        return namedtuple("Outputs", names)(*(getattr(outputs, name) for name in names))

    model = base_model(model).model
    model.register_forward_pre_hook(encode, with_kwargs=True)
    if sharded:  # torch calls backward hooks, by which DeepSpeed reduces gradients, for tuples alone
        model.vision_tower.register_forward_hook(as_tuple)


def with_clip(config, inputs: dict) -> tuple[torch.Tensor, torch.LongTensor]:
    """The pixels and grids of pictures, if any, and of a clip of zeros after them."""
    pixels, grids = videos_of(inputs)
    clip_grid = torch.tensor([[config.frames_per_clip, config.spatial_merge_size, config.spatial_merge_size]])
    clip = torch.zeros(int(clip_grid.prod()), config.num_channels * config.patch_size**2)
    if pixels is None:
        device = next(value.device for value in inputs.values() if isinstance(value, torch.Tensor))
        return clip.to(device), clip_grid
    return torch.cat([pixels, clip.to(pixels)]), torch.cat([grids, clip_grid.to(grids)])


def videos_of(inputs: dict) -> tuple[torch.Tensor | None, torch.LongTensor | None]:
    return inputs.get("pixel_values_videos"), inputs.get("video_grid_thw")


def has_moving_video(inputs: dict) -> bool:
    """Whether any video has more than one frame."""
    return inputs.get("pixel_values_videos") is not None and bool((inputs["video_grid_thw"][:, 0] > 1).any())


def module_of(parameter_name: str) -> str | None:
    """`vision_tower`, `multi_modal_projector` or `distillation_head`; `None` for the language model and its head."""
    match = PART.search(parameter_name)
    return match and match[1]


def part_of(parameter_name: str) -> str:
    """The part whose learning rate a parameter has: `vision`, `language` or `distillation`."""
    parts = {"vision_tower": "vision", "multi_modal_projector": "vision", "distillation_head": "distillation"}
    return parts.get(module_of(parameter_name), "language")


def base_model(model: nn.Module) -> nn.Module:
    """The model without a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
