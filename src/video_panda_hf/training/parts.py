"""The parts of a model in training: STAB, projector, language model, distillation head."""

import re

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from .arguments import VideoPandaTrainingArguments


# For `target_modules` of a PEFT configuration: every linear layer of the LLM, none of STAB, projector or heads. Works
# for LLMs with layers named q_proj, …, down_proj: Llama, Qwen, SmolLM, Mistral, Gemma, Phi.
LANGUAGE_MODEL_LINEARS = r".*\.language_model\..*_proj"
# For `modules_to_save` of a PEFT configuration: trained in full, and saved with the adapters.
STAB_AND_PROJECTOR = ["vision_tower", "multi_modal_projector"]

PART = re.compile(r"(?:^|\.)(vision_tower|multi_modal_projector|distillation_head)\.")


def freeze_parts(model: nn.Module, args: VideoPandaTrainingArguments) -> None:
    """
    Freezes the parts that `args` does not train.

    A frozen STAB stays in eval mode, even after `train()`, so that its batch norm statistics do not change and its
    dropout stays off.
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
    Gives STAB and projector zero gradients where a micro-batch gives them none.

    A micro-batch without videos uses neither of them. One with only pictures does not use the temporal layers.
    Processes exchange gradients: if one has fewer, FSDP fails and DDP may hang. A single process (`alone`) needs this
    only for text: with a frozen LLM, the loss would have no gradient at all.
    """

    def touch(model, _, inputs: dict, outputs):
        lacks_some = inputs.get("pixel_values_videos") is None if alone else not has_moving_video(inputs)
        # ZeRO-3 has partitioned the parameters; there, `compute_loss` checks that all processes use the same ones.
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
    """The part whose learning rate a parameter has: `vision`, `language` or `distillation`."""
    parts = {"vision_tower": "vision", "multi_modal_projector": "vision", "distillation_head": "distillation"}
    return parts.get(module_of(parameter_name), "language")


def base_model(model: nn.Module) -> nn.Module:
    """The model without a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
