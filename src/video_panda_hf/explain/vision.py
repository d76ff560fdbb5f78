"""What GSTRA, FSRA and LSD looked at. Each pools by a single attention, so its weights are the map as it is."""

import torch

from video_panda_hf.modeling import VideoPandaConfig, lay_out


def parts_of(model):
    """The model itself (without adapters around it) and its STAB."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model, model.model.vision_tower


@torch.no_grad()
def encode(model, inputs):
    """
    STAB's and the projector's output for one video, with the maps.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model, in evaluation mode.
        inputs (`Mapping`):
            `pixel_values_videos` and `video_grid_thw` of one video.

    Returns:
        The output of `get_video_features`, and a dictionary with `fsra` (T, h, w), `gstra` (T, H, W),
        `gstra_background` (clips,), `lsd` (T, h, w, 4), `alpha` (D,), `frame_share_of_channels` (T, D) and
        `frame_share` (T,), float32 on the CPU. A picture's of GSTRA are `None`.

    Raises:
        ValueError: for a variant of the model, whose parts may look at other things.
    """
    model, stab = parts_of(model)
    if model.config.model_type != VideoPandaConfig.model_type:
        raise ValueError(f"maps are of the model as published, this one is a {model.config.model_type!r}")
    given = {}

    def note(module, args):
        given["frames"], given["summaries"], given["clip_of_frame"], _ = args

    hook = stab.fusion.register_forward_pre_hook(note)
    try:
        pixels = inputs["pixel_values_videos"].to(model.device)
        encoded = model.get_video_features(pixels, inputs["video_grid_thw"], output_attentions=True, return_dict=True)
    finally:
        hook.remove()

    config = model.config.vision_config
    merge = config.spatial_merge_size
    ((frames, rows, columns),) = inputs["video_grid_thw"].tolist()
    height, width = rows // merge, columns // merge
    # Those of GSTRA, which a picture does not have, LSD and FSRA.
    *of_gstra, lsd, fsra = (of_part.float().mean(1).cpu() for of_part in encoded.attentions)
    maps = dict.fromkeys(["gstra", "gstra_background"])
    if of_gstra:
        maps["gstra"], maps["gstra_background"] = on_the_picture(*of_gstra, (frames, rows, columns), config)
    maps["lsd"] = lsd.view(frames, height, width, merge**2)
    maps["fsra"] = fsra.view(frames, height, width)
    return encoded, {**maps, **shares(stab.fusion, **given)}


def on_the_picture(weights: torch.Tensor, grid: tuple[int, int, int], config) -> tuple[torch.Tensor, torch.Tensor]:
    """
    GSTRA's weights on the picture's own patches.

    Args:
        weights (`torch.Tensor` of shape `(clips, cells)`):
            Those of all cells of the canvas.
        grid (`tuple[int, int, int]`):
            Frames, rows and columns of the picture, in patches.
        config (`VideoPandaVisionConfig`):
            It tells the canvas.

    Returns:
        The map (T, H, W), whose sum over a clip is 1, and the share of each clip's weights that lay on the canvas'
        background, (clips,).
    """
    side = config.image_size // config.patch_size if config.pad_to_square else None
    layout = lay_out((grid,), side, config.spatial_merge_size, config.frames_per_clip)
    (group,) = layout.groups
    inside = weights.flatten() if group.cells is None else weights.flatten()[group.cells]
    inside = inside.view(len(weights), -1)
    total = inside.sum(1, keepdim=True)
    return (inside / total).view(grid), 1 - total.squeeze(1)


def shares(fusion, frames: torch.Tensor, summaries: list[torch.Tensor], clip_of_frame: torch.Tensor) -> dict:
    """How much of each context token comes from its frame, the rest being the clip's: by the addends α·f, (1-α)·g."""
    if not summaries:  # the context of a picture is FSRA's summary itself
        ones = torch.ones(frames.shape)
        return {"alpha": ones[0], "frame_share_of_channels": ones, "frame_share": ones[:, 0]}
    alpha = torch.sigmoid(fusion.balance.float())
    of_frame = (alpha * frames.float()).abs()
    of_clip = ((1 - alpha) * torch.cat(summaries)[clip_of_frame].float()).abs()
    lengths = [addend.norm(dim=1) for addend in (of_frame, of_clip)]
    found = {
        "alpha": alpha,
        "frame_share_of_channels": of_frame / (of_frame + of_clip).clamp_min(torch.finfo(torch.float32).tiny),
        "frame_share": lengths[0] / sum(lengths).clamp_min(torch.finfo(torch.float32).tiny),
    }
    return {name: value.cpu() for name, value in found.items()}
