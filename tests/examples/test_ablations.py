"""Variants of the model: each computes what its formula says, is trained by a recipe, and is saved and loaded."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor, LlamaForCausalLM

from helpers.textbook_stab import (
    HEADS,
    VIDEOS,
    assert_same,
    fast,
    small_config,
    small_model,
    small_videos,
    textbook,
    tokens_of_windows,
    without_zeros,
)
from helpers.tiny_models import model_with_processor, tiny_config
from helpers.tiny_tokenizers import chatml_tokenizer
from helpers.training import tiny_teacher
from helpers.video_files import VideoSpec
from video_panda_hf import VideoPandaConfig, VideoPandaProcessor, VideoPandaSession, VideoPandaVisionConfig
from video_panda_hf.explain import explain


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from ablations.variants import (
    VARIANTS,
    VariantConfig,
    VariantForConditionalGeneration,
    VariantVisionConfig,
    WithoutRowProcessor,
    load_variant,
    variant_config,
)


EXAMPLES = Path(__file__).parents[2] / "examples"


def variant_of(name: str, config) -> VariantForConditionalGeneration:
    """The variant of a model with this configuration."""
    ids = {"video_token_id": config.video_token_id, "row_token_id": config.row_token_id}
    vision = variant_config(name, config.vision_config)
    return VariantForConditionalGeneration(VariantConfig(vision_config=vision, text_config=config.text_config, **ids))


# What they compute

# The last linear maps of each learned branch: with zeros there, the full model computes what one without it does.
LAST = {
    "without_lste": ["lste.expand.", "dpe."],
    "without_gstra": ["gstra.attention.output.", "gstra.mlp_out."],
    "without_fsra": ["fsra.attention.output."],
    "without_lsd": ["lsd.attention.output."],
    "without_row": [],
}
LAST["without_lste_and_gstra"] = LAST["without_lste"] + LAST["without_gstra"]


def without(name: str, pad_to_square: bool = True):
    """A float64 model without a block, and the full one of these weights, but zeros where the block ends."""
    full = small_model(pad_to_square)
    with torch.no_grad():
        for parameter_name, parameter in full.model.vision_tower.named_parameters():
            if any(parameter_name.startswith(last) for last in LAST[name]):
                parameter.zero_()
    model = variant_of(name, full.config).double().eval()
    assert model.load_state_dict(full.state_dict(), strict=False).missing_keys == []
    return model, full


@pytest.mark.parametrize("pad_to_square", [True, False])
@pytest.mark.parametrize("name", LAST)
def test_without_a_block_its_residual_stays(name, pad_to_square):
    model, full = without(name, pad_to_square)
    expected = textbook(full, small_videos())
    if name == "without_row":
        is_row = [torch.tensor(([False] + ([False] * (w // 2) + [True]) * (h // 2)) * t) for t, h, w in VIDEOS]
        expected = [tokens[~row] for tokens, row in zip(expected, is_row, strict=True)]
    else:
        assert len(list(model.parameters())) < len(list(full.parameters()))
    for got, tokens in zip(fast(model, small_videos()), expected, strict=True):
        torch.testing.assert_close(got, tokens, rtol=0, atol=1e-10)


def latents_of_frame(stab, frame: torch.Tensor) -> torch.Tensor:
    """The resampler, head by head: of a frame (h, w, D), tokens (h/2, w/2, D)."""
    resampler, (h, w, size) = stab.resampler, frame.shape
    attention, patches = resampler.attention, resampler.key_norm(frame.flatten(0, 1))
    latents = resampler.latents[: h * w // 4]
    inputs = (resampler.query_norm(latents), patches, patches)
    weights, biases = attention.in_proj_weight.split(size), attention.in_proj_bias.split(size)
    query, key, value = (
        (x @ weight.T + bias).unflatten(-1, (HEADS, -1))
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
    )
    heads = [
        torch.softmax(query[:, head] @ key[:, head].T / (size // HEADS) ** 0.5, -1) @ value[:, head]
        for head in range(HEADS)
    ]
    tokens = latents + attention.out_proj(torch.cat(heads, -1))
    hidden = resampler.mlp_in(resampler.mlp_norm(tokens))
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return (tokens + resampler.mlp_out(hidden)).view(h // 2, w // 2, size)


def as_it_is(stab, frame: torch.Tensor) -> torch.Tensor:
    return frame


STEPS = {  # of the textbook form that differ
    "lsd_first": {"of_patches": tokens_of_windows, "tokens_of_frame": as_it_is},
    "resampler": {"tokens_of_frame": latents_of_frame},
    "half_resolution": {"tokens_of_frame": as_it_is},
}


@pytest.mark.parametrize("pad_to_square", [True, False])
@pytest.mark.parametrize("name", STEPS)
def test_a_variant_and_its_gradients_are_the_textbook_form(name, pad_to_square):
    config = small_config(pad_to_square)
    if name == "half_resolution":
        config.vision_config.image_size *= 2
    model = without_zeros(variant_of(name, config))
    assert_same(model, small_videos(), lambda model, videos: textbook(model, videos, **STEPS[name]))


def test_each_variant_is_compared_with_a_formula():
    assert VARIANTS.keys() == LAST.keys() | STEPS.keys()


def test_lsd_first_shows_lste_and_gstra_a_quarter_of_the_cells():
    cells = {}
    for name in ("without_lsd", "lsd_first"):
        model = variant_of(name, tiny_config()).eval()
        stab = model.model.vision_tower
        stab.lste.register_forward_pre_hook(lambda _, args, name=name: cells.update({name: args[0].shape[:4]}))
        stab(torch.zeros(4 * 8 * 8, 12), torch.tensor([[4, 8, 8]]))
    assert cells == {"without_lsd": (1, 4, 8, 8), "lsd_first": (1, 4, 4, 4)}


def test_half_resolution_has_as_many_tokens_as_the_model():
    """The processor shrinks frames to half the side, of which each patch is a token."""
    config = variant_config("half_resolution")
    assert (config.image_size, config.patch_size, config.spatial_merge_size) == (224, 14, 1)
    video = np.zeros((4, 90, 160, 3), np.uint8)
    tokens = [
        VideoPandaProcessor.from_text_pretrained(chatml_tokenizer(), size, 14, merge_size=merge)(
            text="<video>", videos=video
        )["input_ids"]
        for size, merge in ((448, 2), (config.image_size, config.spatial_merge_size))
    ]
    assert tokens[0] == tokens[1]


# Settings


SWITCHES = [
    "use_lste",
    "use_gstra",
    "use_fsra",
    "use_lsd",
    "use_row_tokens",
]  # of the model's own in earlier checkpoints


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_of_an_earlier_checkpoint_is_an_error_unless_it_is_on(switch, tmp_path):
    config = tiny_config().to_dict()
    config["vision_config"] |= dict.fromkeys(SWITCHES, True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    loaded = VideoPandaConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == tiny_config().to_dict() | {"transformers_version": loaded.transformers_version}
    assert not any(switch in loaded.to_json_string() for switch in SWITCHES)
    config["vision_config"][switch] = False
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"`{switch}=False`.* examples/ablations"):
        VideoPandaConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"`{switch}=False`.* examples/ablations"):
        VideoPandaVisionConfig(**{switch: False})
    assert not getattr(VariantConfig.from_pretrained(tmp_path).vision_config, switch)


def test_a_processor_of_an_earlier_checkpoint_loads_if_it_has_rows(checkpoint, tmp_path):
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"use_row_tokens": True}))
    assert AutoProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    file.write_text(json.dumps(settings | {"use_row_tokens": False}))
    with pytest.raises(ValueError, match=r"`use_row_tokens=False`.* examples/ablations"):
        AutoProcessor.from_pretrained(tmp_path)
    without_row = WithoutRowProcessor.from_pretrained(tmp_path)
    assert without_row(text="<video>", videos=np.zeros((8, 8, 8, 3), np.uint8))["input_ids"] == [
        [processor.video_token_id] * 8 * (1 + 4 * 4)
    ]


@pytest.mark.parametrize(
    "switches", [{"lsd_first": True, "use_lsd": False}, {"lsd_first": True, "use_resampler": True}]
)
def test_parts_that_exclude_each_other_are_an_error(switches):
    with pytest.raises(ValueError, match="exclude each other"):
        VariantVisionConfig(**switches)


def test_another_name_is_an_error_that_has_the_names():
    with pytest.raises(ValueError, match=f"{', '.join(VARIANTS)}, not 'without'"):
        variant_config("without")


# Saved, loaded, started from a checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model of the model's own class, with its processor."""
    folder = tmp_path_factory.mktemp("model")
    for part in model_with_processor(chatml_tokenizer()):
        part.save_pretrained(folder)
    return folder


def answer(model, processor) -> list[int]:
    inputs = processor(text="<video> What?", videos=np.zeros((8, 16, 12, 3), np.uint8), return_tensors="pt")
    return model.eval().generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)[0].tolist()


GONE = {
    "without_lste": ["lste", "dpe"],
    "without_gstra": ["gstra"],
    "without_lste_and_gstra": ["lste", "dpe", "gstra"],
}
GONE |= {"without_fsra": ["fsra"], "without_lsd": ["lsd"], "resampler": ["lsd"], "half_resolution": ["lsd"]}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_starts_from_the_weights_of_a_checkpoint_and_new_ones(checkpoint, name):
    model, _ = load_variant(name, str(checkpoint))
    own, weights = AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict(), model.state_dict()
    assert all(torch.equal(weights[key], own[key]) for key in weights.keys() & own.keys())
    assert {key.split(".")[2] for key in own.keys() - weights.keys()} == set(GONE.get(name, []))
    new = weights.keys() - own.keys()
    assert {key.split(".")[2] for key in new} == ({"resampler"} if name == "resampler" else set())
    for stab in (model, variant_of(name, tiny_config())) if new else ():
        resampler = stab.model.vision_tower.resampler
        spreads = [weight.std().item() for weight in (resampler.latents, resampler.mlp_in.weight)]
        assert spreads == pytest.approx([24**-0.5, 0.02], rel=0.1)
        assert resampler.attention.in_proj_weight.std() > 0.01


@pytest.mark.parametrize("name", ["lsd_first", "without_lste", "without_fsra"])
def test_new_weights_start_as_the_models_own(name):
    stab = variant_of(name, tiny_config()).model.vision_tower
    assert stab.row_embedding.std() > 0.1 and stab.fsra.class_embedding.std() > 0.1
    assert (stab.gstra.query == 0).all() and (stab.gstra.mlp_out.weight == 0).all()
    assert name == "without_lste" or (stab.lste.expand.weight == 0).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_it_is_the_same(checkpoint, tmp_path, name):
    model, processor = load_variant(name, str(checkpoint))
    assert model._no_split_modules <= {type(module).__name__ for module in model.modules()}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    again = load_variant(name, str(tmp_path))
    expected = answer(model, processor)
    for other, its_processor in (loaded, again):
        assert type(other) is VariantForConditionalGeneration and type(its_processor) is type(processor)
        torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert answer(other, its_processor) == expected
    with pytest.raises(ValueError, match=f"is the variant '{name}', not 'x'"):
        load_variant("x", str(tmp_path))


# Trained


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with `data.json`, about two small videos, and a teacher."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number, (width, height) in enumerate([(48, 32), (32, 32)]):
        VideoSpec(f"{number}.mp4", "libx264", width=width, height=height, frames=8).write(folder)
        question = {"from": "human", "value": "<video>\nWhat is shown in this video?"}
        answer = {"from": "gpt", "value": f"longer string {number}"}
        rows += [{"id": number, "video": f"{number}.mp4", "conversations": [question, answer]}] * 2
    (folder / "data.json").write_text(json.dumps(rows))
    tiny_teacher("clip", image_size=8, patch_size=2).save_pretrained(folder / "teacher")
    CLIPImageProcessor().save_pretrained(folder / "teacher")
    return folder


def train(monkeypatch, data: Path, output: Path, recipe: str, *options) -> list[dict]:
    """Six steps of `examples/train.py`, at a high rate. Returns what was logged of each step."""
    arguments = f"--config {EXAMPLES}/recipes/{recipe}.yaml --data {data}/data.json --output_dir {output}".split()
    arguments += f"--distillation_teacher {data}/teacher --use_cpu --bf16 false --dataloader_num_workers 0".split()
    arguments += "--max_steps 6 --num_frames 4 --per_device_train_batch_size 4 --gradient_accumulation_steps 1".split()
    arguments += (
        "--on_error raise --learning_rate 1e-2 --first_half false --train_language true --warmup_steps 0".split()
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *map(str, options)])
    runpy.run_path(str(EXAMPLES / "train.py"))["main"]()
    history = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_trained_by_a_recipe_and_the_losses_fall(monkeypatch, checkpoint, data, tmp_path, name):
    history = train(monkeypatch, data, tmp_path, "stage1", "--model", checkpoint, "--variant", name)
    for loss in ("language_loss", "distillation_loss"):
        assert history[-1][loss] < 0.9 * history[0][loss]
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(trained) is VariantForConditionalGeneration and trained.config.vision_config.variant == name


# Used


@pytest.mark.parametrize("name", ["without_row", "half_resolution", "lsd_first"])
def test_a_session_gives_the_answer_of_the_whole_prompt(checkpoint, name):
    model, processor = load_variant(name, str(checkpoint))
    model.eval()
    video = np.random.default_rng(0).integers(0, 256, (8, 16, 12, 3), np.uint8)
    session = VideoPandaSession(model, processor)
    session.add(video, rate=1)
    content = [{"type": "video", "video": video}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        do_sample_frames=False,
    )
    assert session.inputs_for("What?")["input_ids"].tolist() == inputs["input_ids"].tolist()
    whole = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    answer = processor.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert session.ask("What?", max_new_tokens=8, min_new_tokens=8, do_sample=False) == answer.strip()
    with pytest.warns(UserWarning, match="It has 8 frames of video"):  # counted by the variant's own tokens
        processor.tokenizer.model_max_length = 9
        processor(text="<video>", videos=video, do_sample_frames=False)


@pytest.mark.slow
def test_video_panda_knows_the_variants_when_started_by_their_module(forks, checkpoint, data, tmp_path):
    for part in load_variant("without_row", str(checkpoint)):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "task.jsonl").write_text(json.dumps({"video": "0.mp4", "question": "What?", "answer": "yes"}) + "\n")
    arguments = ["eval", "predict", "--task", tmp_path / "task.jsonl", "--videos", data, "--model", tmp_path / "model"]
    arguments += ["--output", tmp_path / "run", "--max-new-tokens", 2, "--device", "cpu"]
    done = forks.run(["-m", "video_panda_cli", *arguments])
    assert done.returncode == 2 and "is no Video-Panda checkpoint" in done.stderr
    done = forks.run([EXAMPLES / "ablations" / "variants.py", *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "predictions.jsonl").read_text().count("\n") == 1


def test_maps_are_of_the_model_alone(checkpoint):
    with pytest.raises(ValueError, match="maps are of the model as published, this one is a 'video_panda_variant'"):
        explain(*load_variant("resampler", str(checkpoint)), np.zeros((4, 16, 16, 3), np.uint8))


def test_a_language_model_is_what_a_new_variant_is_built_on(checkpoint, tmp_path):
    language_model = AutoModelForImageTextToText.from_pretrained(checkpoint).model.language_model
    LlamaForCausalLM(language_model.config).save_pretrained(tmp_path)
    chatml_tokenizer().save_pretrained(tmp_path)
    model, processor = load_variant("half_resolution", llm=str(tmp_path))
    assert model.config.vision_config.variant == "half_resolution"
    video = np.zeros((8, 90, 160, 3), np.uint8)
    inputs = processor(text="<video>", videos=video, return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[8, 9, 16]]
