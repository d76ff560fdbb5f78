"""The maps are the model's own attention and gradients, on the frames as they are."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.reference_checkpoint import to_patches
from helpers.textbook_stab import HEADS, SIDE, SMALL_PATCH, small_model
from helpers.tiny_models import model_with_processor
from helpers.tiny_tokenizers import chatml_tokenizer
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.decoding import decode_video
from video_panda_hf.explain import METHODS, answers_without, explain, without
from video_panda_hf.explain.answers import scores_by_gradient
from video_panda_hf.explain.vision import encode


RED = SHIPPED_CLIPS / "red_circle_left.mp4"
SHAPES = {"square": (12, 12), "landscape": (8, 16), "portrait": (16, 8)}  # height, width in pixels
NARROW = {"square": (4, 4), "landscape": (2, 4), "portrait": (4, 2)}  # in tokens: the canvas has 4 × 4


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL).eval()
    return model, AutoProcessor.from_pretrained(SHIPPED_MODEL)


def noise(frames: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


# The maps of STAB


def weights_of(attention, queries, keys, scale: float) -> torch.Tensor:
    """The attention of each query (B, D) to its keys (B, K, D) as the paper writes it, mean of heads: (B, K)."""
    query = attention.query(queries).unflatten(-1, (HEADS, -1))
    key = (keys @ attention.key_weight.T).unflatten(-1, (HEADS, -1))
    return (torch.einsum("bhd,bkhd->bhk", query, key) * scale).softmax(-1).mean(1)


@pytest.mark.parametrize("pad_to_square", [True, False])
@pytest.mark.parametrize("grid", [(4, 6, 6), (4, 2, 6), (8, 6, 4), (1, 4, 2)])
@torch.no_grad()
def test_each_map_is_the_attention_of_its_formula_in_float64(grid, pad_to_square):
    model = small_model(pad_to_square)
    stab, (frames, rows, columns) = model.model.vision_tower, grid
    generator = torch.Generator().manual_seed(3)
    size = (frames, 3, rows * SMALL_PATCH, columns * SMALL_PATCH)
    pixels, _ = to_patches(torch.randn(size, generator=generator, dtype=torch.float64), SMALL_PATCH)
    given = {}
    for name in ("gstra", "lsd", "fsra"):
        getattr(stab, name).register_forward_pre_hook(lambda _, args, name=name: given.setdefault(name, args))
    _, maps = encode(model, {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])})

    width = model.config.vision_config.hidden_size
    patches, windows = given["lsd"]
    window = patches[windows]
    query = stab.lsd.query_norm(window.mean(1))
    expected = weights_of(stab.lsd.attention, query, stab.lsd.key_norm(window), width**-0.5)
    torch.testing.assert_close(maps["lsd"].double(), expected.view(frames, rows // 2, columns // 2, 4))
    torch.testing.assert_close(maps["lsd"].sum(-1), torch.ones(frames, rows // 2, columns // 2))

    tokens = given["fsra"][0]
    query = stab.fsra.query_norm(stab.fsra.class_embedding).expand(frames, -1)
    expected = weights_of(stab.fsra.attention, query, stab.fsra.key_norm(tokens), width**-0.5)
    torch.testing.assert_close(maps["fsra"].double(), expected.view(frames, rows // 2, columns // 2))
    torch.testing.assert_close(maps["fsra"].sum((1, 2)), torch.ones(frames))

    if frames == 1:
        assert maps["gstra"] is None and maps["gstra_background"] is None
        return
    (cells,) = given["gstra"]
    query = stab.gstra.query_norm(stab.gstra.query).expand(frames // 4, -1)
    expected = weights_of(stab.gstra.attention, query, stab.gstra.key_norm(cells), (width / HEADS) ** -0.5)
    if pad_to_square:
        top, left = (2 * ((SIDE // 2 - side // 2) // 2) for side in (rows, columns))
        expected = expected.view(frames // 4, 4, SIDE, SIDE)[:, :, top : top + rows, left : left + columns]
    expected = expected.reshape(frames // 4, 4, rows, columns)
    total = expected.sum((1, 2, 3))
    assert (total < 0.999).all() == (pad_to_square and (rows, columns) != (SIDE, SIDE))
    torch.testing.assert_close(maps["gstra_background"].double(), 1 - total, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(maps["gstra"].double(), (expected / total[:, None, None, None]).view(grid))
    torch.testing.assert_close(maps["gstra"].view(frames // 4, -1).sum(1), torch.ones(frames // 4))


@torch.no_grad()
def test_the_shares_of_a_context_token_are_those_of_its_two_addends():
    model = small_model(pad_to_square=True)
    stab, given = model.model.vision_tower, {}
    stab.fsra.register_forward_hook(lambda _, args, output: given.update(f=output[0]))
    stab.gstra.register_forward_hook(lambda _, args, output: given.update(g=output[0]))
    pixels, _ = to_patches(torch.randn(8, 3, 12, 8, dtype=torch.float64), SMALL_PATCH)
    _, maps = encode(model, {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([(8, 6, 4)])})
    alpha = stab.fusion.balance.sigmoid()
    frame, clip = alpha * given["f"], (1 - alpha) * given["g"].repeat_interleave(4, 0)
    torch.testing.assert_close(maps["alpha"].double(), alpha)
    expected = frame.abs() / (frame.abs() + clip.abs())
    torch.testing.assert_close(maps["frame_share_of_channels"].double(), expected, atol=1e-6, rtol=1e-4)
    expected = frame.norm(dim=1) / (frame.norm(dim=1) + clip.norm(dim=1))
    torch.testing.assert_close(maps["frame_share"].double(), expected, atol=1e-6, rtol=1e-5)


def test_what_a_picture_has_no_map_of_is_an_error():
    explanation = explain(*model_with_processor(chatml_tokenizer()), noise(1, (12, 12)))
    assert explanation.gstra is None and explanation.maps == ["fsra"]
    with pytest.raises(ValueError, match="no map 'gstra'"):
        explanation.map("gstra")
    with pytest.raises(ValueError, match="no question was asked"):
        explanation.map("answer")


@pytest.mark.parametrize(
    ("shape", "frames", "pad_to_square"),
    [
        ("square", 4, True),
        ("landscape", 8, True),
        ("portrait", 8, False),
        ("portrait", 4, True),
        ("landscape", 1, True),
        ("square", 1, False),
    ],
)
def test_maps_have_the_shape_of_the_frames_and_sums_of_one(shape, frames, pad_to_square):
    model, processor = model_with_processor(chatml_tokenizer(), pad_to_square=pad_to_square)
    video, (h, w) = noise(frames, SHAPES[shape]), NARROW[shape]
    sampling = {} if frames == 1 else {"num_frames": frames}
    for method in METHODS:
        found = explain(model, processor, video, "What?", method=method, max_new_tokens=3, **sampling)
        assert found.frames.shape == video.shape and found.fsra.shape == (frames, h, w)
        assert found.lsd.shape == (frames, h, w, 4) and found.map("lsd").shape == (frames, 2 * h, 2 * w)
        assert found.gstra is None if frames == 1 else found.gstra.shape == (frames, 2 * h, 2 * w)
        assert found.answer.shape == (len(found.tokens), frames, h, w) and 1 <= len(found.tokens) <= 3
        torch.testing.assert_close(found.answer.sum((1, 2, 3)), torch.ones(len(found.tokens)))
        torch.testing.assert_close(found.temporal.sum(), torch.tensor(1.0))
        assert found.temporal.shape == found.context.shape == (frames,) and (found.context < found.temporal).all()
    assert frames > 1 or found.frame_share.tolist() == [1.0]


def test_the_map_of_lsd_puts_each_weight_on_its_own_patch():
    model, processor = model_with_processor(chatml_tokenizer())
    found = explain(model, processor, noise(4, (8, 16)), num_frames=4)
    patches = found.map("lsd")
    for row, column, y, x in [(0, 0, 0, 0), (1, 2, 0, 1), (0, 3, 1, 0), (1, 1, 1, 1)]:
        assert torch.equal(patches[:, 2 * row + y, 2 * column + x], found.lsd[:, row, column, 2 * y + x])


# The maps of answers


def whole_prompt(model, processor, video, explanation) -> tuple[dict, int]:
    """The inputs of prompt and answer together, and the length of the prompt."""
    content = [{"type": "video", "video": video}, {"type": "text", "text": explanation.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_sample_frames": False},
    )
    return inputs, inputs["input_ids"].shape[1]


@pytest.mark.parametrize("text", ["llama", "qwen3", "smollm3"])
def test_by_attention_it_is_that_of_one_whole_forward(text):
    model, processor = model_with_processor(chatml_tokenizer(), text)
    video = noise(4, (8, 16))
    found = explain(model, processor, video, "What?", method="attention", max_new_tokens=3, num_frames=4)
    inputs, length = whole_prompt(model, processor, video, found)
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    answer = output[:, length : length + len(found.tokens)]
    model.set_attn_implementation("eager")
    ids = torch.cat([inputs["input_ids"], answer], 1)
    videos = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    with torch.no_grad():
        weights = torch.stack(model(ids, output_attentions=True, **videos).attentions)[:, 0].mean((0, 1))
    is_video = model.model.find_placeholders(inputs["input_ids"])[0]
    rows = weights[length - 1 : length - 1 + len(found.tokens), :length][:, is_video]
    rows = rows.unflatten(1, (4, 1 + 2 * 5))  # per frame: context, two rows of four tokens and ROW
    rows = rows / rows.sum((1, 2), keepdim=True)
    torch.testing.assert_close(found.temporal, rows.sum(2).mean(0))
    torch.testing.assert_close(found.context, rows[..., 0].mean(0))
    windows = torch.cat([rows[..., 1:5], rows[..., 6:10]], -1).view(-1, 4, 2, 4)
    torch.testing.assert_close(found.answer, windows / windows.sum((1, 2, 3), keepdim=True))


def test_by_gradient_it_is_the_slope_when_a_token_is_scaled():
    model, processor = model_with_processor(chatml_tokenizer())
    model, video = model.double(), noise(4, (8, 8))
    found = explain(model, processor, video, "What?", method="gradient", max_new_tokens=2, num_frames=4)
    inputs, _ = whole_prompt(model, processor, video, found)
    encoded = model.get_video_features(
        inputs["pixel_values_videos"].double(), inputs["video_grid_thw"], return_dict=True
    )
    answer = torch.tensor([5, 9])
    scores = scores_by_gradient(model, inputs, encoded, answer)
    ids = torch.cat([inputs["input_ids"][0], answer])[None]
    (features,) = encoded.pooler_output

    @torch.no_grad()
    def log_probabilities(scale: torch.Tensor) -> torch.Tensor:
        encoded.pooler_output = (features * scale[:, None],)
        logits = model(ids, mm_encoder_outputs={"video": encoded}).logits[0, -3:-1]
        return logits.log_softmax(-1)[[0, 1], answer]

    for token in (0, 1, 17, len(features) - 1):
        step = torch.zeros(len(features), dtype=torch.float64)
        step[token] = 2e-2  # norms of the language model are in float32
        slope = (log_probabilities(1 + step) - log_probabilities(1 - step)) / 4e-2
        torch.testing.assert_close(scores[:, token].double(), slope.abs(), atol=2e-4, rtol=2e-2)


def test_explaining_leaves_the_model_as_it_was(monkeypatch):
    model, processor = model_with_processor(chatml_tokenizer())
    model.train()
    explain(model, processor, noise(4, (8, 8)), "What?", method="attention", ablation=True, max_new_tokens=1)
    stab, language = model.model.vision_tower, model.model.language_model
    assert model.training and stab.training and language.config._attn_implementation == "sdpa"
    assert not stab.fusion._forward_pre_hooks and all(value.grad is None for value in model.parameters())

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(language, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"), without(model, "both"):
        explain(model, processor, noise(4, (8, 8)), "What?", method="attention", max_new_tokens=1)
    assert model.training and language.config._attn_implementation == "sdpa" and not stab.fusion._forward_pre_hooks


def test_the_answer_is_that_of_the_prompt(shipped):
    found = explain(*shipped, str(RED), "Which way does it move?")
    assert found.text == "It moves to the left." and "".join(found.tokens).strip() == found.text
    frames, _ = decode_video(RED, lambda video: [0, 3, 6, 9, 12, 15, 18, 21])
    assert np.array_equal(found.frames, frames)
    in_memory = explain(*shipped, decode_video(RED)[0], "Which way does it move?", rate=8.0)
    torch.testing.assert_close(in_memory.answer, found.answer)


@pytest.mark.parametrize("part", [{"start": 1.0}, {"start": 1.0, "num_frames": 4}])
def test_a_dictionary_names_a_part_of_a_file(shipped, part):
    found = explain(*shipped, {"video": str(RED), **part})
    whole, _ = decode_video(RED)
    assert len(found.frames) == part.get("num_frames", 8) and np.array_equal(found.frames[0], whole[8])


def test_a_picture_has_one_frame_and_no_clip(shipped, tmp_path):
    Image.fromarray(decode_video(RED, lambda video: [0])[0][0]).save(tmp_path / "red.png")
    for picture in (tmp_path / "red.png", Image.open(tmp_path / "red.png")):
        found = explain(*shipped, picture, "What colour is it?")
        assert "red" in found.text and found.frames.shape[0] == 1 and found.gstra is None


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (noise(4, (8, 8)), {"method": "rollout"}, "`method` is one of attention, gradient, not 'rollout'"),
        (noise(4, (8, 8)), {"ablation": True}, "give a `question`"),
        (noise(4, (8, 8)), {"num_frames": 3}, "`num_frames` = 3"),
        ([], {}, "no frame in `video`"),
        (str(RED), {"rate": 8.0}, "`rate` is for frames in memory"),
        ("no-such-clip.mp4", {}, "no-such-clip.mp4"),
    ],
)
def test_bad_input_is_named(shipped, video, options, message):
    with pytest.raises(ValueError, match=message):
        explain(*shipped, video, **options)


# What is taken out


@torch.no_grad()
@pytest.mark.parametrize("part", ["fsra", "gstra", "both"])
def test_what_is_taken_out_is_an_addend_of_the_context_tokens_alone(part):
    model = small_model(pad_to_square=True)
    stab, given = model.model.vision_tower, {}
    hooks = [
        stab.fsra.register_forward_hook(lambda _, args, output: given.update(f=output[0])),
        stab.gstra.register_forward_hook(lambda _, args, output: given.update(g=output[0])),
    ]
    pixels, _ = to_patches(torch.randn(8, 3, 8, 12, dtype=torch.float64), SMALL_PATCH)
    grid = torch.tensor([(8, 4, 6)])
    (before,) = stab(pixels, grid, return_dict=True).pooler_output
    for hook in hooks:
        hook.remove()
    with without(model, part):
        (found,) = stab(pixels, grid, return_dict=True).pooler_output
    found, before = (tokens.view(8, 1 + 2 * 4, -1) for tokens in (found, before))
    assert torch.equal(found[:, 1:], before[:, 1:])
    alpha = stab.fusion.balance.sigmoid()
    fused = torch.zeros(8, len(alpha), dtype=torch.float64)
    if part == "fsra":
        fused += (1 - alpha) * given["g"].repeat_interleave(4, 0)
    if part == "gstra":
        fused += alpha * given["f"]
    torch.testing.assert_close(found[:, 0], stab.fusion.output(stab.fusion.norm(fused)))
    assert torch.equal(stab(pixels, grid, return_dict=True).pooler_output[0].view_as(before), before)


def test_answers_stand_side_by_side(shipped):
    answers = answers_without(*shipped, str(RED), "What colour is the shape?")
    assert list(answers) == ["full", "fsra", "gstra", "both"] and answers["full"] == "It is red."
    assert explain(*shipped, str(RED), "What colour is the shape?", ablation=True).ablation == answers
    with pytest.raises(ValueError, match="`part` is one of fsra, gstra, both, not 'lsd'"), without(shipped[0], "lsd"):
        pass
