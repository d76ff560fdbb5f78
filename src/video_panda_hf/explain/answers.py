"""Which of the video's tokens the language model's answer comes from."""

from contextlib import contextmanager
from dataclasses import fields

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast


METHODS = ("attention", "gradient")
# transformers renamed the cache in 5.24.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def generate_ids(model, inputs, encoded, tokenizer, max_new_tokens: int) -> torch.Tensor:
    """The greedy answer's tokens, without special ones at its end."""
    output = model.generate(
        **prompt_of(model, inputs),
        mm_encoder_outputs={"video": encoded},
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    ids = output[0, inputs["input_ids"].shape[1] :]
    special = torch.isin(ids.cpu(), torch.tensor(tokenizer.all_special_ids))
    kept = int((~special).nonzero().max()) + 1 if (~special).any() else 1  # an empty answer is its end
    return ids[:kept]


def prompt_of(model, inputs) -> dict[str, torch.Tensor]:
    return {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}


def scores_by_attention(model, inputs, encoded, answer: torch.Tensor) -> torch.Tensor:
    """
    The attention of the language model to the video's tokens where it chose each token of the answer, as the mean over
    layers and heads, (answer tokens, video tokens).

    The prompt goes into a cache by the model's own attention. Only the last rows are computed with weights, so that
    no matrix of the whole prompt is made.
    """
    prompt = inputs["input_ids"].to(model.device)
    is_video = model.model.find_placeholders(prompt)[0]
    rows = torch.cat([prompt[0, -1:], answer[:-1]])[None]
    with torch.no_grad():
        before = model(
            input_ids=prompt[:, :-1], mm_encoder_outputs={"video": encoded}, use_cache=True, logits_to_keep=1
        )
        with eager_attention(model.model.language_model):
            output = model(
                input_ids=rows,
                use_cache=True,
                output_attentions=True,
                logits_to_keep=1,
                **{CACHE: getattr(before, CACHE)},
            )
    layers = [weights[0].float().mean(0) for weights in output.attentions or () if weights is not None]
    if not layers:
        raise ValueError(
            f"{type(model.model.language_model).__name__} gives no attention weights: use method='gradient'"
        )
    length = prompt.shape[1] + len(answer) - 1
    # A layer with a sliding window has the newest keys only.
    whole = [torch.nn.functional.pad(weights, (length - weights.shape[1], 0)) for weights in layers]
    return torch.stack(whole).mean(0)[:, : prompt.shape[1]][:, is_video].cpu()


@contextmanager
def eager_attention(language_model):
    """Within it, the language model computes attention in the way that gives weights."""
    former = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(former)


def scores_by_gradient(model, inputs, encoded, answer: torch.Tensor) -> torch.Tensor:
    """
    Gradient × input: for each token of the answer the derivative of its log-probability by the video's tokens, times
    these, without the sign, (answer tokens, video tokens).
    """
    features = torch.cat(list(encoded.pooler_output)).detach().clone().requires_grad_()
    ids = torch.cat([inputs["input_ids"].to(model.device)[0], answer])
    with torch.enable_grad():
        output = model(
            input_ids=ids[None, :-1],
            mm_encoder_outputs={"video": BaseModelOutputWithPooling(pooler_output=(features,))},
            use_cache=False,
            logits_to_keep=len(answer),
        )
        chosen = output.logits[0].float().log_softmax(-1).gather(1, answer[:, None]).squeeze(1)
        scores = []
        for number, value in enumerate(chosen):
            (gradient,) = torch.autograd.grad(value, features, retain_graph=number < len(chosen) - 1)
            scores.append((gradient.float() * features.detach().float()).sum(-1).abs().cpu())
    return torch.stack(scores)


SCORES = {"attention": scores_by_attention, "gradient": scores_by_gradient}


def answer_maps(model, inputs, encoded, answer: torch.Tensor, method: str) -> dict[str, torch.Tensor]:
    """
    The maps of an answer.

    Returns:
        `answer` (answer tokens, T, h, w), each token's sum 1 over the video; `temporal` (T,), each frame's share of
        all its tokens, context and ROW among them; `context` (T,), that of its context token.
    """
    config = model.config.vision_config
    ((frames, rows, columns),) = inputs["video_grid_thw"].tolist()
    height, width = rows // config.spatial_merge_size, columns // config.spatial_merge_size
    scores = SCORES[method](model, inputs, encoded, answer)
    tiny = torch.finfo(scores.dtype).tiny
    scores = scores / scores.sum(1, keepdim=True).clamp_min(tiny)
    by_frame = scores.unflatten(1, (frames, -1))
    windows = by_frame[:, :, 1:].unflatten(2, (height, width + 1))[..., :width]
    return {
        "answer": windows / windows.sum((1, 2, 3), keepdim=True).clamp_min(tiny),
        "temporal": by_frame.sum(2).mean(0),
        "context": by_frame[:, :, 0].mean(0),
    }
