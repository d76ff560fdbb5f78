"""The parts of a model in training: STAB, projector, language model, distillation head."""

import re

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from .arguments import VideoPandaTrainingArguments


# `target_modules` of a PEFT configuration: every linear map of the LLM, none of STAB, projector, heads. For LLMs that
# call their maps q_proj, …, down_proj, as Llama, Qwen, SmolLM, Mistral, Gemma and Phi do.
LANGUAGE_MODEL_LINEARS = r".*\.language_model\..*_proj"
# `modules_to_save` of a PEFT configuration: what is trained in full beside the adapters, and saved with them.
STAB_AND_PROJECTOR = ["vision_tower", "multi_modal_projector"]

PART = re.compile(r"(?:^|\.)(vision_tower|multi_modal_projector|distillation_head)\.")


def freeze_parts(model: nn.Module, args: VideoPandaTrainingArguments) -> None:
    """
    Freezes what `args` says is not to be trained. A STAB that is frozen, by whomever, stays in evaluation mode, also
    after `train()`: else batch norm's statistics would go on changing, and dropout blur what it gives.
    """
    trained = {
        "vision_tower": args.train_vision,
        "multi_modal_projector": args.train_projector,
        "distillation_head": True,
        None: args.train_language,
    }
    for name, parameter in model.named_parameters():
        if not trained[module_of(name)]:
            parameter.requires_grad_(False)
    tower = base_model(model).model.vision_tower
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.register_forward_pre_hook(lambda tower, _: tower.eval() and None)


def keep_in_step(model: nn.Module, alone: bool = False) -> None:
    """
    Gives STAB and projector gradients of zero, where a part of a batch gives them none: that has no video, or nothing
    but pictures, which leave alone what looks across time.

    Processes exchange the gradients that they have: FSDP fails, and DDP may wait for ever, where one has fewer. One
    that is `alone` needs this for text only, where nothing else may have any: the language model may be frozen.
    """

    def touch(model, _, inputs: dict, outputs):
        lacks_some = inputs.get("pixel_values_videos") is None if alone else not has_moving_video(inputs)
        # ZeRO-3 has taken the parameters apart here; `compute_loss` sees to it that all processes need the same.
        if model.training and lacks_some and not is_deepspeed_zero3_enabled():
            unused = [*model.vision_tower.parameters(), *model.multi_modal_projector.parameters()]
            zero = sum(parameter.sum() for parameter in unused if parameter.requires_grad) * 0.0
            outputs["last_hidden_state"] = outputs["last_hidden_state"] + zero
        return outputs

    model.model.register_forward_hook(touch, with_kwargs=True)


def has_moving_video(inputs: dict) -> bool:
    """Whether any video has more than one frame."""
    return inputs.get("pixel_values_videos") is not None and bool((inputs["video_grid_thw"][:, 0] > 1).any())


def module_of(parameter_name: str) -> str | None:
    """`vision_tower`, `multi_modal_projector` or `distillation_head`; `None` for the language model and its head."""
    match = PART.search(parameter_name)
    return match and match[1]


def part_of(parameter_name: str) -> str:
    """Which learning rate a parameter has: `vision`, `language` or `distillation`."""
    parts = {"vision_tower": "vision", "multi_modal_projector": "vision", "distillation_head": "distillation"}
    return parts.get(module_of(parameter_name), "language")


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, out of the PEFT model around it if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
