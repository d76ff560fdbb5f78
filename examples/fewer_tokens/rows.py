"""Fewer tokens a frame: a model that works with all rows of tokens of a frame, with half of them, or with none.

A frame has its context token and h rows of tokens. `RowDropoutTrainer` leaves rows out at random, so that a model
learns to answer with any number of them; the context token stays. At inference `fewer_rows` chooses:

    inputs = processor.apply_chat_template(messages, …, return_dict=True, return_tensors="pt")
    model.generate(**fewer_rows(model, inputs, "half"))

STAB sees the whole video in any case: only the language model gets fewer tokens.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from video_panda_hf.training import VideoPandaTrainer


ROWS = ("none", "half", "all")


class RowDropoutTrainer(VideoPandaTrainer):
    """
    `VideoPandaTrainer`, which leaves rows of tokens out: of each video all, half (each row by chance), or none, as the
    dice fall. The global seed of torch decides.

    Raises:
        ValueError: with several processes, whose gradients would not be exchanged, or with a teacher, whose features
            are of all rows.
    """

    def __init__(self, *positional, **keywords):
        super().__init__(*positional, **keywords)
        if self.args.world_size > 1:
            raise ValueError(f"Row dropout works in one process, not in {self.args.world_size}.")
        if self.teacher is not None:
            raise ValueError("Row dropout works without distillation: set distillation_teacher to None.")

    def compute_loss(self, model, inputs, *positional, **keywords):
        """`VideoPandaTrainer`'s loss; in training, of what is left of the videos."""
        if model.training:
            inputs = fewer_rows(model, inputs, "random")
        return super().compute_loss(model, inputs, *positional, **keywords)


def fewer_rows(model, inputs: dict, rows: str) -> dict:
    """
    The inputs of a model without some of the videos' rows.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model, which encodes the videos.
        inputs (`dict`):
            What the processor or the collator returned, `input_ids`, `attention_mask`, `labels`, videos; padded on one
            side.
        rows (`str`):
            `"none"`, `"half"`: the even rows of even frames and the odd rows of odd ones, or `"all"`; `"random"`: what
            `RowDropoutTrainer` does.

    Returns:
        `dict`: the inputs with shorter rows of tokens, and the videos' features as `mm_encoder_outputs` in place of
        their pixels. For `forward` and `generate`.

    Raises:
        ValueError: for any other `rows`.
    """
    if rows not in (*ROWS, "random"):
        raise ValueError(f'rows is "none", "half", "all" or "random", not {rows!r}.')
    inputs = dict(inputs)
    if inputs.get("pixel_values_videos") is None:
        return inputs
    pixels, grids = inputs.pop("pixel_values_videos"), inputs.pop("video_grid_thw")
    kept = [kept_tokens(*grid, model.config.vision_config, rows) for grid in grids.tolist()]
    encoded = model.get_video_features(pixels, grids, return_dict=True)
    features = tuple(tokens[mask.to(tokens.device)] for tokens, mask in zip(encoded.pooler_output, kept, strict=True))

    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    stays = mask.bool()
    stays[model.model.find_placeholders(ids)] = torch.cat(kept).to(ids.device)
    side = "left" if not mask[:, 0].all() else "right"
    fillers = {"input_ids": model.config.get_text_config().pad_token_id or 0, "attention_mask": 0, "labels": -100}
    inputs["attention_mask"] = mask
    for name in fillers.keys() & inputs.keys():
        parts = [values[row] for values, row in zip(inputs[name], stays, strict=True)]
        inputs[name] = pad_sequence(parts, batch_first=True, padding_value=fillers[name], padding_side=side)
    return {**inputs, "mm_encoder_outputs": {"video": BaseModelOutputWithPooling(pooler_output=features)}}


def kept_tokens(frames: int, height: int, width: int, config, rows: str) -> torch.BoolTensor:
    """Which tokens of a video of `height` × `width` patches stay: (tokens,), frame by frame as in the prompt."""
    height, width = height // config.spatial_merge_size, width // config.spatial_merge_size
    if rows == "half":
        stays = (torch.arange(frames)[:, None] + torch.arange(height)) % 2 == 0
    elif rows == "random":
        stays = torch.rand(frames, height) < torch.randint(3, ()) / 2
    else:
        stays = torch.full((frames, height), rows == "all")
    stays = stays.repeat_interleave(width + 1, 1)
    return torch.cat([torch.ones(frames, 1, dtype=torch.bool), stays], 1).flatten()
