"""STAB as the paper writes it, one video and one clip at a time, for comparison with the packed form."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.reference_checkpoint import to_patches
from video_panda_hf import VideoPandaConfig, VideoPandaForConditionalGeneration


FRAMES_PER_CLIP, HEADS, SIDE, SMALL_PATCH = 4, 4, 6, 2
BACKGROUND = [0.5, -0.25, 0.125]


VIDEOS = [(8, 6, 4), (1, 4, 2), (4, 2, 6), (4, 6, 6), (1, 6, 6), (8, 4, 4), (4, 2, 6)]  # frames, rows, columns


def small_config(pad_to_square: bool) -> VideoPandaConfig:
    return VideoPandaConfig(
        vision_config={
            "hidden_size": 48,
            "num_attention_heads": HEADS,
            "patch_size": SMALL_PATCH,
            "image_size": SIDE * SMALL_PATCH,
            "frames_per_clip": FRAMES_PER_CLIP,
            "pad_to_square": pad_to_square,
            "background": BACKGROUND,
            "dropout": 0.0,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 20,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 10,
        },
        video_token_id=8,
        row_token_id=9,
    )


def small_model(pad_to_square: bool) -> VideoPandaForConditionalGeneration:
    """A float64 model without dropout, none of whose weights is zero or one."""
    return without_zeros(VideoPandaForConditionalGeneration(small_config(pad_to_square)))


def without_zeros(model):
    """The model in float64 and eval mode, with random weights, none of them zero or one."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) / 3)
                if "norm.weight" in name or "running_var" in name:
                    value.abs_().add_(0.5)
    return model


def small_videos() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(t, 3, h * SMALL_PATCH, w * SMALL_PATCH, generator=generator, dtype=torch.float64)
        for t, h, w in VIDEOS
    ]


def tokens_of_windows(stab, frame: torch.Tensor) -> torch.Tensor:
    """LSD of each window of a frame (h, w, D): (h/2, w/2, D)."""
    rows = [pair_of_rows.split(2, dim=1) for pair_of_rows in frame.split(2)]
    return torch.stack([torch.stack([textbook_lsd(stab.lsd, w.reshape(4, -1)) for w in row]) for row in rows])


def textbook(model, videos, tokens_of_frame=tokens_of_windows, of_patches=None) -> list[torch.Tensor]:
    """
    STAB and projector of videos (T, 3, H, W): one tensor of tokens for each. Two steps may be others than the model's:
    `tokens_of_frame(stab, frame)` makes tokens (h/2, w/2, D) of Z of a frame (h, w, D), by LSD; `of_patches(stab,
    frame)` makes what LSTE sees of the embeddings of a canvas (h, w, D), by default the same.
    """
    stab = model.model.vision_tower
    pad, merge = model.config.vision_config.pad_to_square, model.config.vision_config.spatial_merge_size
    canvases, boxes = [], []
    for video in videos:
        rows, columns = (side // SMALL_PATCH for side in video.shape[2:])
        top, left = (merge * ((SIDE - side) // (2 * merge)) if pad else 0 for side in (rows, columns))
        if pad:
            pixel = torch.tensor(BACKGROUND, dtype=video.dtype)[:, None, None]
            canvas = pixel.expand(len(video), 3, SIDE * SMALL_PATCH, SIDE * SMALL_PATCH).clone()
            y, x = top * SMALL_PATCH, left * SMALL_PATCH
            canvas[:, :, y : y + video.shape[2], x : x + video.shape[3]] = video
        else:
            canvas = video
        canvases.append(canvas)
        by = merge if of_patches is not None else 1
        boxes.append((slice(top // by, (top + rows) // by), slice(left // by, (left + columns) // by)))

    kernel = stab.patch_embedding.weight.view(-1, 3, SMALL_PATCH, SMALL_PATCH)
    embedded = [F.conv2d(canvas, kernel, stride=SMALL_PATCH) for canvas in canvases]  # (T, D, H, W)
    if of_patches is not None:
        of_frames = [[of_patches(stab, frame.permute(1, 2, 0)).permute(2, 0, 1) for frame in e] for e in embedded]
        embedded = [torch.stack(frames) for frames in of_frames]
    clips = [  # of each video, (D, F, H, W)
        [clip.movedim(0, 1) for clip in e.split(FRAMES_PER_CLIP)] if len(e) > 1 else [] for e in embedded
    ]
    all_clips = [clip for video_clips in clips for clip in video_clips]
    if stab.training:  # batch norm takes its statistics over all clips
        normed = iter(batch_norm(stab.lste.norm, torch.stack(all_clips)))
    else:
        normed = (batch_norm(stab.lste.norm, clip[None])[0] for clip in all_clips)

    tokens = []
    for embedding, video_clips, box in zip(embedded, clips, boxes, strict=True):
        aligned, summaries = embedding, []
        if video_clips:
            encoded = []
            for clip in video_clips:
                local = clip + textbook_lste(stab.lste, next(normed))
                kernel = stab.dpe.weight
                local = local + F.conv3d(local[None], kernel, stab.dpe.bias, padding=1, groups=len(local))[0]
                summaries.append(textbook_gstra(stab.gstra, local.flatten(1).T))
                encoded.append(local.movedim(0, 1))
            aligned = torch.cat(encoded) + embedding
        rows = []
        for t, frame in enumerate(aligned):
            frame = frame[:, box[0], box[1]].permute(1, 2, 0)  # (h, w, D)
            windows = tokens_of_frame(stab, frame)
            context = textbook_fsra(stab.fsra, windows.flatten(0, 1))
            if summaries:
                alpha = torch.sigmoid(stab.fusion.balance)
                fused = (1 - alpha) * summaries[t // FRAMES_PER_CLIP] + alpha * context
                context = stab.fusion.output(stab.fusion.norm(fused))
            rows.append(context[None])
            for row in windows:
                rows.append(torch.cat([row, stab.row_embedding[None]]))
        projector = model.model.multi_modal_projector
        tokens.append(projector.linear_2(F.gelu(projector.linear_1(torch.cat(rows)))))
    return tokens


def batch_norm(norm: nn.BatchNorm1d, clips: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(
        clips,
        None if norm.training else norm.running_mean,
        None if norm.training else norm.running_var,
        norm.weight,
        norm.bias,
        training=norm.training,
        eps=1e-5,
    )


def textbook_lste(lste, normed: torch.Tensor) -> torch.Tensor:
    """C3(C2(C1(x))) with 3D convolutions."""
    hidden = F.conv3d(normed[None], lste.reduce.weight[:, :, None, None, None], lste.reduce.bias)
    kernel = lste.mix.weight[..., None]  # (channels, 1, 3, 1, 1)
    hidden = F.conv3d(hidden, kernel, lste.mix.bias, padding=(1, 0, 0), groups=len(kernel))
    return F.conv3d(hidden, lste.expand.weight[:, :, None, None, None], lste.expand.bias)[0]


def attend(attention, query, keys, scale: float) -> torch.Tensor:
    """Multi-head attention of one query (D,), with keys and values (K, D) projected."""
    query = attention.query(query).view(HEADS, -1)
    key = (keys @ attention.key_weight.T).unflatten(-1, (HEADS, -1))
    value = keys @ attention.value_weight.T
    if attention.value_bias is not None:
        value = value + attention.value_bias
    value = value.unflatten(-1, (HEADS, -1))
    heads = [torch.softmax(key[:, h] @ query[h] * scale, 0) @ value[:, h] for h in range(HEADS)]
    return attention.output(torch.cat(heads))


def textbook_gstra(gstra, cells: torch.Tensor) -> torch.Tensor:
    query = gstra.query[0]
    scale = (len(query) // HEADS) ** -0.5
    x = query + attend(gstra.attention, gstra.query_norm(query), gstra.key_norm(cells), scale)
    hidden = gstra.mlp_in(gstra.mlp_norm(x))
    return x + gstra.mlp_out(hidden * torch.sigmoid(1.702 * hidden))


def textbook_lsd(lsd, window: torch.Tensor) -> torch.Tensor:
    mean = window.mean(0)
    return mean + attend(lsd.attention, lsd.query_norm(mean), lsd.key_norm(window), len(mean) ** -0.5)


def textbook_fsra(fsra, tokens: torch.Tensor) -> torch.Tensor:
    query = fsra.class_embedding
    return query + attend(fsra.attention, fsra.query_norm(query), fsra.key_norm(tokens), len(query) ** -0.5)


def fast(model, videos: list[torch.Tensor]) -> list[torch.Tensor]:
    patches, grids = zip(*(to_patches(video, SMALL_PATCH) for video in videos), strict=True)
    return list(model.get_video_features(torch.cat(patches), torch.tensor(grids)).pooler_output)


def outputs_and_gradients(compute, model, videos):
    """The tokens of all videos, and the gradients of a random weighting of them in every parameter and pixel."""
    videos = [video.clone().requires_grad_() for video in videos]
    tokens = compute(model, videos)
    generator = torch.Generator().manual_seed(2)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tokens)
    parameters = {
        **dict(model.model.vision_tower.named_parameters()),
        **dict(model.model.multi_modal_projector.named_parameters(prefix="projector")),
        **{f"pixels of video {i}": video for i, video in enumerate(videos)},
    }
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return tokens, dict(zip(parameters, gradients, strict=True))


def assert_same(model, videos, textbook=textbook):
    tokens, gradients = outputs_and_gradients(fast, model, videos)
    expected_tokens, expected_gradients = outputs_and_gradients(textbook, model, videos)
    for got, expected in zip(tokens, expected_tokens, strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-9 * expected.abs().max()
    for name, expected in expected_gradients.items():
        assert expected.abs().max() > 0, name
        assert (gradients[name] - expected).abs().max() <= 1e-9 * expected.abs().max(), name
