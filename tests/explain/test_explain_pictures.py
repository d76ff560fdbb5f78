"""Pictures of the maps, and the check of the maps on clips whose shapes have known places."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.cli import main
from video_panda_hf.explain import METHODS, PARTS, Explanation, explain


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "moving_shapes"))
import check_maps
from data import make_clips


RED = str(SHIPPED_CLIPS / "red_circle_left.mp4")
UNIFORM = 1 / 16  # of a map, on one of 4 × 4 places


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL), AutoProcessor.from_pretrained(SHIPPED_MODEL)


def made_up(frames: int = 4, height: int = 40, width: int = 80, **fields) -> Explanation:
    """An explanation with one bright cell in each frame: frame n has it in row 0 and column n."""
    heat = torch.zeros(frames, 2, 4)
    heat[range(frames), 0, range(frames)] = 1.0
    fields = {"gstra": None, "gstra_background": None, "lsd": None, "alpha": torch.ones(3), **fields}
    shares = {"frame_share_of_channels": torch.ones(frames, 3), "frame_share": torch.ones(frames)}
    return Explanation(np.full((frames, height, width, 3), 90, np.uint8), heat, **fields, **shares)


def with_answer(**fields) -> Explanation:
    answer = torch.full((2, 4, 2, 4), 1 / 32)
    return made_up(
        question="What?", text="A thing.", tokens=["A", " thing."], answer=answer, method="gradient", **fields
    )


def test_the_overlay_is_brightest_where_the_map_is_highest():
    for number, picture in enumerate(made_up().overlay("fsra", height=100)):
        assert picture.size == (200, 100)
        light = np.asarray(picture.convert("L"), dtype=float)
        row, column = np.unravel_index(light.argmax(), light.shape)
        assert row < 50 and 50 * number <= column < 50 * (number + 1)


def test_one_token_of_the_answer_can_be_drawn():
    explanation = with_answer()
    explanation.answer[1] = 0
    explanation.answer[1, :, 1, 3] = 1.0
    (picture, *_) = explanation.overlay("answer", token=1, height=100)
    light = np.asarray(picture.convert("L"), dtype=float)
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert row >= 50 and column >= 150
    assert not np.array_equal(light, np.asarray(explanation.overlay(height=100)[0].convert("L")))


def test_a_gif_and_an_mp4_have_a_picture_for_each_frame(tmp_path):
    explanation = with_answer()
    explanation.save(tmp_path / "a.gif", seconds_per_frame=0.25)
    explanation.save(tmp_path / "a.mp4", seconds_per_frame=0.25)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 4 and gif.info["duration"] == 250 and gif.info["loop"] == 0
        size = gif.size
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 4
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 4 and frames[0].shape[:2] == size[::-1]
    assert (frames[0] != frames[1]).any()


def test_a_sheet_has_a_row_for_each_map_and_a_line_for_each_answer(tmp_path):
    plain, answered = made_up(), with_answer(ablation=dict(zip(["full", *PARTS], "abcd", strict=True)))
    answered.save(tmp_path / "a.PNG")
    with Image.open(tmp_path / "a.PNG") as sheet:
        assert sheet.size == answered.sheet().size
        assert sheet.height - plain.sheet().height == pytest.approx(5 * 19 + 84 + 6 + 6)  # five lines and a map
    assert made_up(frames=4, width=200).sheet().width > plain.sheet().width


def test_long_text_is_wrapped_and_none_is_lost():
    from PIL import ImageFont

    from video_panda_hf.explain.pictures import wrapped

    font, text = ImageFont.load_default(14), f"What is {'very ' * 30}long, {'x' * 200}?"
    lines = [line for line, _ in wrapped([(text, "black")], font, 200)]
    assert len(lines) > 5 and all(font.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_show_uses_the_notebook_or_a_window(monkeypatch):
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda picture: shown.append(("window", picture.size)))
    monkeypatch.setitem(sys.modules, "IPython", None)
    made_up().show()
    display = SimpleNamespace(display=lambda picture: shown.append(("notebook", picture.size)))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: object(), display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    made_up().show()
    assert shown == [("window", made_up().sheet().size), ("notebook", made_up().sheet().size)]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda made, folder: made.save(folder / "a.webp"), r"a.webp: an explanation is written as .gif, .mp4, .png"),
        (lambda made, folder: made.save(folder / "a.gif", seconds_per_frame=0), "`seconds_per_frame` is a number"),
        (lambda made, folder: made.save(folder / "a.gif", maps=["heat"]), "a map is one of fsra, gstra, lsd, answer"),
        (lambda made, folder: made.overlay("gstra"), "there is no map 'gstra'"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path, use, message):
    with pytest.raises(ValueError, match=message):
        use(made_up(), tmp_path)


# The command


def test_the_command_writes_a_picture_and_prints_the_answer(tmp_path, capsys):
    file = tmp_path / "explanation.gif"
    assert main(["explain", RED, "Which way does it move?", "-o", str(file)]) == 0
    assert capsys.readouterr().out == "It moves to the left.\n"
    with Image.open(file) as gif:
        assert gif.n_frames == 8
    assert file.stat().st_size < 300_000


def test_the_command_compares_answers_and_writes_json(tmp_path, capsys):
    question = ["What colour is it?", "-o", str(tmp_path / "a.png"), "--num-frames", "4"]
    assert main(["explain", RED, *question, "--without", "--json", "--method", "attention"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == "It is red." and list(found["without"]) == list(PARTS)
    assert len(found["temporal"]) == 4 and sum(found["temporal"]) == pytest.approx(1, abs=1e-3)


def test_the_command_needs_no_question_for_the_summaries(tmp_path, capsys):
    file = str(tmp_path / "a.png")
    assert main(["explain", RED, "-o", file, "--maps", "lsd,gstra", "--num-frames", "1"]) == 2
    assert "there is no map 'gstra'" in capsys.readouterr().err
    assert main(["explain", RED, "-o", file, "--maps", "lsd,gstra"]) == 0
    assert capsys.readouterr().out == "" and Path(file).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "a.webp"], "--output a.webp: an explanation is written as .gif, .mp4, .png"),
        (["-o", "no/folder/a.gif"], "--output no/folder/a.gif: no such folder"),
        (["-o", "a.gif", "--without"], "give a QUESTION"),
        (["-o", "a.gif", "--maps", "answer"], "give a QUESTION"),
    ],
)
def test_wrong_use_of_the_command_is_named(arguments, message, capsys):
    assert main(["explain", RED, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_offers_what_the_package_has():
    from video_panda_cli.explain import MAPS, SUFFIXES
    from video_panda_cli.explain import METHODS as OFFERED
    from video_panda_hf.explain import pictures

    assert OFFERED == METHODS and SUFFIXES == pictures.SUFFIXES and set(MAPS) == set(pictures.CAPTIONS)


# The check


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 3), (3, 2)])
def test_one_bright_square_is_where_every_map_is_highest(shipped, row, column):
    frames = np.full((8, 112, 112, 3), 40, np.uint8)
    top, left = 28 * row, 28 * column
    frames[:, top : top + 28, left : left + 28] = (240, 225, 45)
    found = {method: explain(*shipped, frames, "What shape is it?", method=method, rate=8.0) for method in METHODS}
    maps = {"fsra": found["gradient"].fsra, "gstra": found["gradient"].gstra}
    maps |= {method: explanation.map("answer") for method, explanation in found.items()}
    # The share of each map in the square; the means of all 16 places are 0.75, 0.65, 0.44 and 0.20.
    least = {"fsra": 0.5, "gstra": 0.35, "gradient": 0.25, "attention": 2 * UNIFORM}
    for name, values in maps.items():
        in_time = values.sum(0)
        size = len(in_time) // 4
        place = divmod(int(in_time.argmax()), in_time.shape[1])
        assert (place[0] // size, place[1] // size) == (row, column), name
        rows, columns = (slice(size * n, size * (n + 1)) for n in (row, column))
        assert in_time[rows, columns].sum() / in_time.sum() > least[name], name


def test_the_boxes_of_a_clip_hold_its_shapes_and_nothing_else():
    for clip in make_clips(7, seed=3):
        assert clip.boxes.shape == (len(clip.things), len(clip.frames), 4)
        for number in (0, len(clip.frames) - 1):
            frame = clip.frames[number].astype(float)
            is_shape = np.abs(frame - np.median(frame, (0, 1))).max(-1) > 75
            in_box = np.zeros(is_shape.shape, dtype=bool)
            for left, top, right, bottom in clip.boxes[:, number].astype(int):
                assert is_shape[top:bottom, left:right].mean() > 0.25
                in_box[top - (top > 0) : bottom + 1, left - (left > 0) : right + 1] = True  # the edges are soft
            assert not (is_shape & ~in_box).any()


def test_a_clip_played_backwards_has_its_boxes_backwards():
    for clip in make_clips(3, seed=4):
        turned = clip.backwards()
        first = {tuple(box) for box in turned.boxes[:, 0]}
        assert first == {tuple(box) for box in clip.boxes[:, -1]}
        if clip.kind == "order":
            assert (turned.boxes[0] == clip.boxes[1, ::-1]).all()


def test_points_and_masses_are_measured_in_the_boxes():
    values = np.zeros((2, 2, 4))
    values[0, 0, 1], values[0, 1, 3], values[1, 1, 0] = 3.0, 1.0, 4.0
    # Frames of 40 × 80 pixels: a cell has 20 × 20. The first frame's maximum is in the box, the second one's is not.
    boxes = np.array([[[20, 0, 40, 20], [20, 0, 40, 20]]], dtype=float)
    assert check_maps.in_boxes(values, boxes, (40, 80)) == (0.5, 3 / 8)
    half = np.array([[[20, 0, 30, 20], [0, 20, 10, 40]]], dtype=float)  # half of a cell, without its middle
    assert check_maps.in_boxes(values, half, (40, 80)) == (0.0, (1.5 + 2) / 8)
    both = np.concatenate([boxes, np.array([[[60, 20, 80, 40], [0, 20, 20, 40]]], dtype=float)])
    assert check_maps.in_boxes(values, both, (40, 80)) == (1.0, 1.0)
    assert check_maps.in_boxes(np.ones((2, 2, 4)), boxes, (40, 80)) == (1 / 8, 1 / 8)


def test_a_map_that_is_right_beats_a_wrong_one_in_deletion(shipped):
    frames = np.full((4, 112, 112, 3), 40, np.uint8)
    frames[:, 28:84, 28:84] = (240, 225, 45)
    found = explain(*shipped, frames, "What colour is it?", num_frames=4)
    right = np.zeros((4, 4, 4))
    right[:, 1:3, 1:3] = 1
    right += 0.001 * np.random.default_rng(0).random(right.shape)
    orders = {"right": right, "wrong": -right}
    areas = check_maps.areas_of(*shipped, frames, "What colour is it?", found, orders)
    assert areas["right"][0] < areas["wrong"][0] - 0.1 and areas["right"][1] > areas["wrong"][1] + 0.1
