"""Distillation: the reference's numbers, a textbook form, and that student and teacher look at the same patches."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import layer_norm
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
)

from helpers.reference_checkpoint import reference_llm, reference_tensors, write_reference
from helpers.tiny_models import tiny_batch, tiny_model
from helpers.tiny_tokenizers import chatml_tokenizer
from helpers.training import (
    SIZES,
    VISION,
    collate,
    distilling_model,
    make_examples,
    make_trainer,
    save_teacher,
    tiny_teacher,
)
from video_panda_hf import VideoPandaForConditionalGeneration, VideoPandaProcessor, VideoPandaVisionConfig
from video_panda_hf.conversion import ConversionError, convert_checkpoint
from video_panda_hf.training.distillation import (
    HEAD_FILE,
    VideoPandaDistillationHead,
    VideoPandaTeacher,
    align_grids,
    attach_distillation_head,
    distillation_loss,
    frame_grids,
    patch_positions,
)


GOLDEN = Path(__file__).parents[1] / "golden" / "distillation_tiny.safetensors"
PREFIX = "model.video_tower_compressor."


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, json.loads(opened.metadata()["golden"])["cases"]


@pytest.fixture
def head(golden):
    """The reference's head: its names are ours."""
    head = VideoPandaDistillationHead(32, 32, num_layers=8)
    head.load_state_dict({key.removeprefix(PREFIX): value for key, value in golden[0].items() if PREFIX in key})
    return head


def golden_case(golden, name):
    """Hidden states (layers, patches, 32) without contexts and `<row>`, the teacher's features, patches per frame."""
    tensors, cases = golden
    height, width = cases[name]["token_grid"]
    sequences = tensors[f"{name}.hidden_states"].unflatten(1, (-1, 1 + height * (width + 1)))
    patches = sequences[:, :, 1:].unflatten(2, (height, width + 1))[:, :, :, :-1].flatten(1, 3)
    return patches, tensors[f"{name}.teacher"].flatten(0, 1), torch.full((4,), height * width)


@pytest.mark.parametrize("name", ["square", "landscape", "portrait"])
def test_loss_is_the_references(golden, head, name):
    hidden, teacher, patches_per_frame = golden_case(golden, name)
    loss = distillation_loss(head([hidden[layer] for layer in head.layers]), teacher, patches_per_frame)
    torch.testing.assert_close(loss, golden[0][f"{name}.loss"], atol=1e-5, rtol=0)


def test_frames_of_several_shapes_count_alike_in_one_batch(golden, head):
    cases = [golden_case(golden, name) for name in ("square", "landscape", "portrait")]
    hidden, teacher, patches_per_frame = zip(*cases, strict=True)
    hidden, teacher, patches_per_frame = torch.cat(hidden, 1), torch.cat(teacher), torch.cat(patches_per_frame)
    loss = distillation_loss(head([hidden[layer] for layer in head.layers]), teacher, patches_per_frame)
    expected = torch.stack([golden[0][f"{name}.loss"] for name in ("square", "landscape", "portrait")]).mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


def test_the_converter_carries_the_head_over(golden, tmp_path):
    """A checkpoint with a head of its LLM's layers gives it, bit by bit, to the head of a new training."""
    tensors = reference_tensors() | reference_llm(num_hidden_layers=8).state_dict()
    tensors |= {key: value for key, value in golden[0].items() if PREFIX in key}
    source = write_reference(tmp_path / "source", tensors, num_hidden_layers=8)
    assert not (convert_checkpoint(source, tmp_path / "without", quiet=True) / HEAD_FILE).exists()
    target = convert_checkpoint(source, tmp_path / "with", keep_distillation_head=True, quiet=True)
    head = VideoPandaDistillationHead(32, 32, num_layers=8)
    head.load_state_dict(load_file(target / HEAD_FILE))
    for name, value in head.state_dict().items():
        assert torch.equal(value, golden[0][PREFIX + name])


HALVES = [("input_layer.weight", "no distillation head"), ("norm_layer.2.0.bias", "missing `norm_layer.2.0.bias`")]


@pytest.mark.parametrize(("key", "message"), HALVES)
def test_the_converter_does_not_keep_half_a_head(golden, tmp_path, key, message):
    tensors = reference_tensors() | reference_llm(num_hidden_layers=8).state_dict()
    tensors |= {name: value for name, value in golden[0].items() if PREFIX in name and not name.endswith(key)}
    with pytest.raises(ConversionError, match=message):
        source = write_reference(tmp_path / "source", tensors, num_hidden_layers=8)
        convert_checkpoint(source, tmp_path / "target", keep_distillation_head=True, quiet=True)


def cosine(student, teacher):
    return 1 - (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))


def mean_square(student, teacher):
    return ((student - teacher) ** 2).sum(-1) / student.shape[-1]


def textbook_loss(parameters, hidden, teacher, frames, distance=cosine, num_heads=8):
    """Eq. 19 word by word: `hidden` [layer L, L-4, …], loops over heads and frames."""
    mapped = [
        layer_norm(
            states, states.shape[-1:], parameters[f"norm_layer.{n}.0.weight"], parameters[f"norm_layer.{n}.0.bias"]
        )
        @ parameters[f"norm_layer.{n}.1.weight"].T
        for n, states in enumerate(hidden)
    ]
    width = mapped[0].shape[-1]
    heads = []
    for columns in torch.arange(width).chunk(num_heads):
        query, keys = mapped[0][:, columns], torch.stack([other[:, columns] for other in mapped[1:]], 1)
        weights = torch.softmax(torch.einsum("pd,pld->pl", query, keys) / width**0.5, -1)
        heads.append(torch.einsum("pl,pld->pd", weights, keys))
    student = hidden[0] @ parameters["input_layer.weight"].T + parameters["input_layer.bias"]
    student = student + torch.cat(heads, -1) @ parameters["output_layer.weight"].T + parameters["output_layer.bias"]
    losses = []
    for s, t in zip(student.split(frames), teacher.split(frames), strict=True):
        losses.append(distance(s, t).mean())
    return torch.stack(losses).mean()


def test_gradients_are_the_textbooks_in_float64(golden, head):
    head.double()
    hidden, teacher, _ = golden_case(golden, "landscape")
    hidden, teacher, frames = hidden.double(), teacher.double(), [100, 44, 288, 144]
    inputs = [hidden[layer].requires_grad_() for layer in head.layers]
    parameters = dict(head.named_parameters())
    loss = distillation_loss(head(inputs), teacher, torch.tensor(frames))
    expected = textbook_loss(parameters, inputs, teacher, frames)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    wanted = [*parameters.values(), *inputs]
    for got, textbook in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert textbook.abs().max() > 0
        torch.testing.assert_close(got, textbook, atol=1e-12, rtol=1e-9)


def test_mse_and_its_gradient_are_the_formula_in_float64():
    """Frames of 2 and 3 patches: each counts alike, and so does each channel."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64).unbind()
    loss = distillation_loss(student.requires_grad_(), teacher, torch.tensor([2, 3]), distance="mse")
    squares = [[((s - t) ** 2).sum() / 16 for s, t in zip(student, teacher, strict=True)][i] for i in range(5)]
    torch.testing.assert_close(loss, (sum(squares[:2]) / 2 + sum(squares[2:]) / 3) / 2)
    (gradient,) = torch.autograd.grad(loss, student)
    weights = torch.tensor([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6], dtype=torch.float64)[:, None]
    torch.testing.assert_close(gradient, weights * (student - teacher) / 8)


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [(8, [8, 4, 0]), (32, [*range(32, -1, -4)]), (30, [30, 26, 22, 18, 14, 10, 6, 2, 0]), (2, [2, 0])],
)
def test_every_fourth_layer_and_always_layer_0_counts(num_layers, layers):
    assert VideoPandaDistillationHead(16, 16, num_layers).layers == layers


def test_parts_of_a_batch_add_up_to_its_loss():
    torch.manual_seed(0)
    student, teacher, frames = *torch.randn(2, 30, 16).unbind(), torch.tensor([4, 6, 8, 12])
    whole = distillation_loss(student, teacher, frames)
    parts = [
        distillation_loss(student[:10], teacher[:10], frames[:2], num_frames_in_batch=4),
        distillation_loss(student[10:], teacher[10:], frames[2:], num_frames_in_batch=4),
    ]
    torch.testing.assert_close(sum(parts), whole)


# The teacher


def pixels_of(videos: list[torch.Tensor]):
    """Packed patches and grids of frames (T, 3, H, W) of normalised pixels, patches of 4 × 4."""
    packed = [
        v.unflatten(2, (-1, 4)).unflatten(4, (-1, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)
        for v in videos
    ]
    return torch.cat(packed), torch.tensor([[len(v), v.shape[2] // 4, v.shape[3] // 4] for v in videos])


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_teacher_gives_the_features_of_each_pictures_own_patches(kind):
    """As computed picture by picture; without its class token, and whatever else is in the batch."""
    model = tiny_teacher(kind)
    teacher = VideoPandaTeacher(model, VISION, image_mean=(0.5, 0.4, 0.3), image_std=(0.3, 0.2, 0.1))
    videos = [torch.rand(4, 3, 64, 64), torch.rand(1, 3, 32, 64), torch.rand(4, 3, 64, 24)]
    pixels, grids = pixels_of(videos)
    features, teacher_grids = teacher(pixels, grids), teacher.grids(grids)
    assert teacher_grids.tolist() == [[4, 8, 8], [1, 4, 8], [4, 8, 3]]
    assert features.shape == (4 * 64 + 32 + 4 * 24, 16) and not features.requires_grad

    shown = teacher.frames(pixels, grids)
    hidden = model(shown, output_hidden_states=True).hidden_states[-2][:, -64:].unflatten(1, (8, 8))
    boxes = [*[(0, 8, 0, 8)] * 4, (2, 6, 0, 8), *[(0, 8, 2, 5)] * 4]
    expected = [hidden[n, top:bottom, left:right].flatten(0, 1) for n, (top, bottom, left, right) in enumerate(boxes)]
    torch.testing.assert_close(features, torch.cat(expected))


TEACHERS = [(14, 224, 16, False), (14, 336, 16, True), (16, 224, 14, False)]


@pytest.mark.parametrize(("patch_size", "image_size", "side", "interpolates"), TEACHERS)
def test_the_released_student_meets_clip_at_224_pixels(patch_size, image_size, side, interpolates):
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(image_size=image_size, patch_size=patch_size, **SIZES))
    teacher = VideoPandaTeacher(model, VideoPandaVisionConfig(), (0.5,) * 3, (0.5,) * 3)
    assert (teacher.side, teacher.options) == (side, {"interpolate_pos_encoding": interpolates})
    assert teacher.grids(torch.tensor([[8, 18, 32]])).tolist() == [[8, round(9 * side / 16), side]]


def test_teacher_sees_the_students_frames_at_half_the_size():
    """A picture of 2 × 2 blocks keeps its colours; around it is the teacher's mean colour, rounded down to 8 bits."""
    mean, std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
    teacher = VideoPandaTeacher(tiny_teacher("clip"), VISION, mean, std)
    blocks = torch.rand(1, 3, 2, 4)
    frame = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)  # (1, 3, 32, 64), of values 0..1
    student_mean, student_std = (torch.tensor(v)[:, None, None] for v in (teacher.student_mean, teacher.student_std))
    shown = teacher.frames(*pixels_of([(frame - student_mean) / student_std]))
    assert shown.shape == (1, 3, 32, 32)
    colours = shown * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    centres = colours[:, :, 8:24].unflatten(2, (2, 8)).unflatten(4, (4, 8))[:, :, :, 4, :, 4]
    torch.testing.assert_close(centres, blocks, atol=0.02, rtol=0)
    torch.testing.assert_close(colours[0, :, 0, 0], torch.tensor([127, 102, 76]) / 255)


def test_an_image_of_the_processor_reaches_the_teacher_as_it_was():
    """From a uint8 picture through the student's processor and back: nothing is lost but the resizing by half."""

    processor = VideoPandaProcessor.from_text_pretrained(
        chatml_tokenizer(), image_size=64, patch_size=4
    ).video_processor
    picture = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    inputs = processor(picture, return_tensors="pt")
    teacher = VideoPandaTeacher(tiny_teacher("clip"), VISION, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    shown = teacher.frames(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    half = torch.nn.functional.interpolate(picture / 255, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(shown, half, atol=1e-5, rtol=0)


def test_the_finer_grid_is_averaged():
    """A teacher with patches twice as large: each of its patches meets the mean of four of the student's."""
    teacher = VideoPandaTeacher(tiny_teacher("clip", patch_size=8), VISION, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    grids = torch.tensor([[4, 16, 16], [1, 16, 8], [4, 8, 16]])
    assert teacher.grids(grids).tolist() == [[4, 4, 4], [1, 4, 2], [4, 2, 4]]
    student_grids = frame_grids(grids) // 2
    student = torch.randn(int(student_grids.prod(1).sum()), 5)
    features = torch.randn(int(teacher.grids(grids).prod(1).sum()), 5)
    pooled, same, patches_per_frame = align_grids(student, student_grids, features, frame_grids(teacher.grids(grids)))
    assert same is features and patches_per_frame.tolist() == [16] * 4 + [8] * 5
    expected = [
        part.view(*shape, 5).unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).mean((1, 3)).flatten(0, 1)
        for part, shape in zip(student.split(student_grids.prod(1).tolist()), student_grids.tolist(), strict=True)
    ]
    torch.testing.assert_close(pooled, torch.cat(expected))


# In the model


def test_patch_positions_are_where_the_models_windows_stand():
    """LSD's tokens, found by what the model puts there: neither contexts nor `<row>`, in the videos' order."""
    model = tiny_model()
    batch = tiny_batch([[(4, 8, 8)], [(1, 4, 6), (4, 6, 8)], []])
    tower = model.model.vision_tower(batch["pixel_values_videos"], batch["video_grid_thw"])
    num_windows = int(batch["video_grid_thw"].prod(1).sum()) // 4
    windows = model.model.multi_modal_projector(tower.tokens[:num_windows])
    embedded = model(**batch, output_hidden_states=True).hidden_states[0].flatten(0, 1)
    positions = patch_positions(model.config, batch["input_ids"], batch["video_grid_thw"])
    torch.testing.assert_close(embedded[positions], windows)


@pytest.mark.parametrize(("checkpointing", "distance"), [(False, "cosine"), (True, "cosine"), (False, "mse")])
def test_model_with_head_gives_the_loss_of_its_hidden_states(checkpointing, distance):
    model, teacher = distilling_model(checkpointing)
    model.distillation_head.distance = distance
    batch = tiny_batch([[(4, 8, 8)], [(1, 4, 6), (4, 6, 8)], []])
    pixels, grids = batch["pixel_values_videos"], batch["video_grid_thw"]
    outputs = model(**batch, teacher_features=teacher(pixels, grids), teacher_grid_thw=teacher.grids(grids))

    plain = tiny_model()
    hidden = plain(**batch, output_hidden_states=True).hidden_states
    positions = patch_positions(model.config, batch["input_ids"], grids)
    student = model.distillation_head([hidden[layer].flatten(0, 1)[positions] for layer in (2, 0)])
    patches_per_frame = frame_grids(teacher.grids(grids)).prod(1)
    expected = distillation_loss(student, teacher(pixels, grids), patches_per_frame, distance=distance)
    torch.testing.assert_close(outputs.distillation_loss, expected)

    outputs.distillation_loss.backward()
    expected.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)


def test_text_without_videos_has_no_distance_but_a_gradient():
    """So that no process waits for another's gradients."""
    model, _ = distilling_model()
    outputs = model(
        **tiny_batch([[]]),
        teacher_features=torch.zeros(0, 16),
        teacher_grid_thw=torch.zeros(0, 3, dtype=torch.long),
        num_frames_in_batch=8,
    )
    outputs.distillation_loss.backward()
    assert outputs.distillation_loss == 0
    assert all(parameter.grad is not None for parameter in model.distillation_head.parameters())


VIDEO_AND_PICTURES = [(1, 8, 8), (4, 8, 4), (1, 4, 8)]


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory):
    """A trainer in float64 with a teacher of 16 channels, and one of 24 for pictures."""
    folder = tmp_path_factory.mktemp("two_teachers")
    teachers = {
        "distillation_teacher": save_teacher(folder / "videos"),
        "picture_teacher": save_teacher(folder / "pictures", hidden_size=24),
    }
    trainer = make_trainer(folder, tiny_model(), **teachers)
    for module in (trainer.model.eval(), trainer.teacher.model, trainer.picture_teacher.model):
        module.double()
    return trainer


@pytest.mark.parametrize(
    ("grids", "distance"),
    [
        (VIDEO_AND_PICTURES, "cosine"),
        (VIDEO_AND_PICTURES, "mse"),
        (VIDEO_AND_PICTURES[::2], "cosine"),
        (VIDEO_AND_PICTURES[1:2], "cosine"),
        ([None], "cosine"),
    ],
    ids=["mixed", "mixed-mse", "pictures", "video", "text"],
)
def test_pictures_have_their_own_teacher_and_head_in_float64(two_teachers, grids, distance):
    """Each frame counts alike; a head that no frame of the batch needs gets gradients of zero."""
    trainer, model = two_teachers, two_teachers.model
    heads = {False: model.distillation_head, True: model.picture_distillation_head}
    batch = collate(make_examples(grids))
    if "pixel_values_videos" in batch:
        batch["pixel_values_videos"] = batch["pixel_values_videos"].double()
    for head in heads.values():
        head.distance = distance
    trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    loss = model(**batch, **trainer.distillation_inputs(batch)).distillation_loss

    hidden, expected, first = model(**batch, output_hidden_states=True).hidden_states, 0, 0
    for row, grid in enumerate(grids):
        if grid is None:
            continue
        frames, rows, columns = grid
        patches = slice(first, first := first + frames * rows * columns)
        teacher = trainer.picture_teacher if frames == 1 else trainer.teacher
        features = teacher(batch["pixel_values_videos"][patches], torch.tensor([grid]))
        tokens = [layer[row, 1 : 1 + frames * (1 + rows // 2 * (columns // 2 + 1))] for layer in hidden]
        tokens = [layer.unflatten(0, (frames, -1))[:, 1:].unflatten(1, (rows // 2, -1))[:, :, :-1] for layer in tokens]
        students = [tokens[layer].flatten(0, 2) for layer in (2, 0)]
        sizes, measure = [rows * columns // 4] * frames, {"cosine": cosine, "mse": mean_square}[distance]
        parameters = dict(heads[frames == 1].named_parameters())
        expected = expected + frames * textbook_loss(parameters, students, features, sizes, measure)
    expected = expected / max(1, sum(grid[0] for grid in grids if grid)) + 0 * hidden[-1].sum()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-9)
    assert (loss > 0) == (grids != [None])

    parameters = dict(model.named_parameters())
    found, textbook = (torch.autograd.grad(v, parameters.values(), allow_unused=True) for v in (loss, expected))
    for (name, parameter), got, wanted in zip(parameters.items(), found, textbook, strict=True):
        assert got is not None or "distillation_head" not in name, name
        zero = torch.zeros_like(parameter)
        got, wanted = (zero if gradient is None else gradient for gradient in (got, wanted))
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-8, msg=name)


def test_head_is_not_saved_with_the_model(tmp_path):
    model, _ = distilling_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert set(opened.keys()) == set(tiny_model().state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "VideoPandaForConditionalGeneration"
    ]


def test_a_model_with_a_head_is_a_model_of_its_class_and_can_be_copied():
    class Own(VideoPandaForConditionalGeneration):
        def own(self) -> str:
            return "kept"

    model = Own(tiny_model().config).eval()
    for width in (16, 32):  # the second head takes the place of the first
        attach_distillation_head(model, VideoPandaDistillationHead(32, width, num_layers=2))
    assert isinstance(model, Own) and model.own() == "kept"
    assert (type(model).__name__, type(model).__module__) == (Own.__name__, Own.__module__)
    batch = tiny_batch([[(4, 8, 8)]])
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert (model(**batch).logits == 0).all() and (copied(**batch).logits != 0).any()
    features = {"teacher_features": torch.ones(64, 32), "teacher_grid_thw": torch.tensor([[4, 4, 4]])}
    assert copied(**batch, **features).distillation_loss > 0
