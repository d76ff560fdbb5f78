"""STAB computes what the reference computes, and what the paper's equations say when written down naively."""

import pytest
import torch
from torch import nn

from helpers.reference_checkpoint import golden, to_patches, write_reference
from helpers.textbook_stab import assert_same, small_model, small_videos
from video_panda_hf import VideoPandaForConditionalGeneration
from video_panda_hf.conversion import convert_checkpoint


TENSORS, CASES = golden()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    converted = convert_checkpoint(write_reference(folder / "reference"), folder / "converted", quiet=True)
    return VideoPandaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32)


@torch.no_grad()
def run(model, names: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """All stages of the cases, computed in one call, in the shapes of the golden tensors."""
    tower, seen = model.model.vision_tower, {}

    def watch(stage: str, module: nn.Module):
        def keep(module, inputs, output):
            seen[stage] = output[0] if isinstance(output, tuple) else output

        return module.register_forward_hook(keep)

    modules = {"lste": tower.dpe, "gstra": tower.gstra, "lsd": tower.lsd, "fsra": tower.fsra, "context": tower.fusion}
    hooks = [watch(stage, module) for stage, module in modules.items()]
    patches, grids = zip(*(to_patches(TENSORS[f"{name}.pixels"]) for name in names), strict=True)
    features = model.get_video_features(torch.cat(patches), torch.tensor(grids)).pooler_output
    for hook in hooks:
        hook.remove()
    if "lste" in seen:
        seen["lste"] = seen["lste"].movedim(-1, 1)

    stages = {name: {"features": video} for name, video in zip(names, features, strict=True)}
    frames = [CASES[name]["frames"] for name in names]
    clips = [count // 4 for count in frames]
    windows = [CASES[name]["frames"] * CASES[name]["rows"] * CASES[name]["cols"] // 4 for name in names]
    for stage, values in seen.items():
        sizes = {"lste": clips, "gstra": clips, "lsd": windows, "fsra": frames, "context": frames}[stage]
        for name, part in zip(names, values.split(sizes), strict=True):
            stages[name][stage] = part
    return stages


def assert_golden(name: str, stages: dict[str, torch.Tensor]):
    recorded = [key.split(".")[1] for key in TENSORS if key.startswith(f"{name}.") and key != f"{name}.pixels"]
    assert len(recorded) >= 3
    for stage in recorded:
        expected = TENSORS[f"{name}.{stage}"]
        error = (stages[stage].reshape(expected.shape) - expected).abs().max().item()
        assert error <= 1e-5, f"{name}, {stage}: {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_a_video_alone_gets_the_references_numbers(model, name):
    assert_golden(name, run(model, [name])[name])


def test_all_videos_packed_in_one_call_get_the_references_numbers(model):
    for name, stages in run(model, list(CASES)).items():
        assert_golden(name, stages)


def test_the_background_is_the_references(model):
    background = torch.tensor(model.config.vision_config.background)
    torch.testing.assert_close(background, TENSORS["background"], rtol=0, atol=1e-7)


# --- The textbook form: what the equations say, one video and one frame at a time, keys and values projected ---


@pytest.mark.parametrize("pad_to_square", [True, False])
def test_the_cheap_form_is_the_textbook_form(pad_to_square):
    assert_same(small_model(pad_to_square), small_videos())


def test_in_training_batch_norm_takes_its_statistics_over_all_clips():
    model = small_model(pad_to_square=True).train()
    norm = model.model.vision_tower.lste.norm
    before = norm.running_mean.clone()
    assert_same(model, small_videos())
    assert not torch.equal(norm.running_mean, before)
