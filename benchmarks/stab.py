"""Operations, parameters, time and memory of STAB, compared with its textbook form and with other models' encoders.

    python benchmarks/stab.py                      # on the CPU
    python benchmarks/stab.py --device cuda --dtype bfloat16

In one process: 8 frames of 448 × 448 pixels through STAB and projector at the released size, with random weights,
compared with
* the same model in its textbook form: keys and values projected, a 3D convolution, ROW projected after every row;
* the vision part of Video-LLaVA: CLIP ViT-L/14 over 8 frames of 224 × 224, and its projector;
* the vision part of Video-ChatGPT: CLIP ViT-L/14 over 100 frames of 224 × 224 (batches of 10).
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, VideoLlavaConfig, VideoLlavaModel

from tables import finish
from video_panda_hf.modeling import VideoPandaConfig, VideoPandaModel
from video_panda_hf.modeling.modeling_video_panda_vision import DynamicPositionEncoding, FewQueryPooling


GRID = (8, 32, 32)
LLM_SIZE = 4096


def textbook_pooling(self, queries, keys, mask=None):
    """`FewQueryPooling.forward` as in the paper: all keys and values are projected."""

    def heads(tensor):
        return tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    query = heads(self.query(queries)[:, None])
    key, value = heads(F.linear(keys, self.key_weight)), heads(F.linear(keys, self.value_weight, self.value_bias))
    scores = query @ key.transpose(2, 3) * self.scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return self.output((weights @ value).transpose(1, 2).flatten(1)), weights.squeeze(2)


def textbook_dpe(self, cells):
    """`DynamicPositionEncoding.forward` as one depthwise 3D convolution."""
    return cells + F.conv3d(
        cells.permute(0, 4, 1, 2, 3), self.weight, self.bias, padding=1, groups=self.groups
    ).permute(0, 2, 3, 4, 1)


class Textbook(torch.nn.Module):
    """The same weights, computed literally as in the equations."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_video_features(self, pixels, grid):
        cheap = FewQueryPooling.forward, DynamicPositionEncoding.forward
        FewQueryPooling.forward, DynamicPositionEncoding.forward = textbook_pooling, textbook_dpe
        try:
            outputs = self.model.vision_tower(pixels, grid)
        finally:
            FewQueryPooling.forward, DynamicPositionEncoding.forward = cheap
        outputs.pooler_output = self.model.multi_modal_projector(outputs.tokens[outputs.token_order])[None]
        return outputs


def small_llm(hidden_size):
    """A stand-in for the language model. The measurements do not include it."""
    return {"model_type": "llama", "hidden_size": hidden_size, "num_hidden_layers": 1, "intermediate_size": 8}


def video_panda():
    text = {**small_llm(LLM_SIZE), "vocab_size": 64}
    return VideoPandaModel(VideoPandaConfig(text_config=text, video_token_id=62, row_token_id=63))


def video_llava():
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
        projection_dim=768,
    )
    text = {**small_llm(LLM_SIZE), "vocab_size": 64}
    model = VideoLlavaModel(VideoLlavaConfig(vision_config=vision, text_config=text))
    del model.image_tower
    return model, vision


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_bytes(function, device):
    """Peak memory of torch's allocator during one call, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def seconds(functions, device, rounds):
    """Median seconds of each function. The functions take turns. Each must have run before."""

    def timed(function):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times = [{name: timed(function) for name, function in functions.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in times) for name in functions}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that a time is the median of (default: 3)")
    parser.add_argument("--skip-peers", action="store_true", help="only STAB and its textbook form")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE, for tables.py")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)

    model = video_panda().to(device, dtype).eval()
    textbook = Textbook(model)
    frames, rows, columns = GRID
    pixels = torch.randn(frames * rows * columns, 588, device=device, dtype=dtype)
    grid = torch.tensor([GRID])  # stays on the CPU
    ours = {
        "STAB + projector, as in this package": lambda: model.get_video_features(pixels, grid),
        "STAB + projector, textbook form": lambda: textbook.get_video_features(pixels, grid),
    }
    peers = {}
    if not arguments.skip_peers:
        llava, vision = video_llava()
        llava = llava.to(device, dtype).eval()
        clip = CLIPVisionModel(vision).to(device, dtype).eval()
        clips = torch.randn(1, 8, 3, 224, 224, device=device, dtype=dtype)
        pictures = torch.randn(10, 3, 224, 224, device=device, dtype=dtype)
        peers = {
            "Video-LLaVA's vision part (8 frames)": lambda: llava.get_video_features(pixel_values_videos=clips),
            "CLIP ViT-L/14 x 100 frames (Video-ChatGPT)": lambda: [clip(pictures) for _ in range(10)],
        }
    everything = {**ours, **peers}

    a, b = (function().pooler_output for function in ours.values())
    print(f"largest difference between both forms: {(torch.cat(list(a)) - b[0]).abs().max().item():.1e}")
    parameters = sum(weight.numel() for weight in model.vision_tower.parameters())
    projector = sum(weight.numel() for weight in model.multi_modal_projector.parameters())

    operations = {name: flops(function) for name, function in everything.items()}
    times = seconds(everything, device, arguments.rounds)
    unit = times[next(iter(everything))]
    token_tensor = pixels.element_size() * frames * rows * columns * model.config.vision_config.hidden_size
    rows = [
        {
            "name": name,
            "gflop": operations[name] / 1e9,
            "time": times[name] / unit,
            "token_tensors": peak_bytes(function, device) / token_tensor,
        }
        for name, function in everything.items()
    ]
    result = {
        "setting": f"{device.type}, {arguments.dtype}, {torch.get_num_threads()} threads",
        "rows": rows,
        "first_row_ms": unit * 1e3,
        "token_tensor_mb": token_tensor / 1e6,
        "stab_token_tensors": peak_bytes(lambda: model.vision_tower(pixels, grid), device) / token_tensor,
        "stab_parameters": parameters,
        "projector_parameters": projector,
    }
    finish("stab", result, arguments.json)


if __name__ == "__main__":
    main()
