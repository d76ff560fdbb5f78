"""A warning for prompts that are longer than the tokenizer's model was made for."""

import warnings

import numpy as np
from transformers import BatchFeature


def warn_if_too_long(inputs: BatchFeature, processor) -> None:
    """
    Warns of prompts that have more tokens than the tokenizer's `model_max_length`, and says how many frames would fit.
    `inputs` are what the processor made of the prompts.
    """
    longest = processor.tokenizer.model_max_length
    prompts = inputs.get("input_ids", [])
    if max(map(len, prompts), default=0) <= longest:
        return
    merge_size = processor.video_processor.merge_size
    grids = iter(inputs.get("video_grid_thw", []))
    for number, ids in enumerate(prompts):
        ids = np.asarray(ids)
        ids = ids[np.asarray(inputs["attention_mask"][number]) > 0] if "attention_mask" in inputs else ids
        of_videos = int(np.isin(ids, processor.video_token_ids).sum())
        frames = tokens = 0
        while tokens < of_videos:
            t, h, w = (int(n) for n in next(grids))
            frames += t
            tokens += t * len(processor.placeholders_of_frame(h // merge_size, w // merge_size))
        if len(ids) <= longest:
            continue
        advice = "Shorten it."
        if frames:
            fitting = max(0, frames * (longest - len(ids) + of_videos) // of_videos)
            fitting -= fitting % processor.video_processor.frames_per_clip
            advice = f"It has {frames} frames of video; about {fitting} would fit (`max_video_tokens` sees to it)."
        warnings.warn(
            f"prompt {number} has {len(ids)} tokens, and the tokenizer's `model_max_length` is {longest}: the model "
            f"may answer badly or not at all. {advice}",
            stacklevel=3,
        )
