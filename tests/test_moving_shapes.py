"""The small model that ships, and the data it learned from."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from video_panda_hf.assets import SHIPPED_CLIPS, SHIPPED_MODEL


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from evaluate_moving_shapes import accuracy, generate_answers, shuffled
from moving_shapes import COLOURS, DIRECTIONS, SHAPES, Clip, draw_clip, make_clips, training_and_held_out_combinations


OPPOSITE = {
    "to the left": "to the right",
    "to the right": "to the left",
    "upwards": "downwards",
    "downwards": "upwards",
}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL).eval()


@pytest.fixture(scope="module")
def held_out_clips():
    return list(make_clips(72, seed=1234, held_out=True))


# The data


def test_clips_follow_from_the_seed_alone():
    first, again, other = (list(make_clips(3, seed)) for seed in (5, 5, 6))
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.frames, b.frames) for a, b in zip(first, other, strict=True))


def test_held_out_combinations_are_never_trained_on_but_each_of_their_pairs_is():
    training, held_out = training_and_held_out_combinations()
    assert len(set(training) | set(held_out)) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS)
    assert not set(training) & set(held_out)
    for left_out in range(3):
        pairs = [{(*c[:left_out], *c[left_out + 1 :]) for c in combinations} for combinations in (held_out, training)]
        assert pairs[0] <= pairs[1]


def test_held_out_clips_show_held_out_combinations_and_are_all_different(held_out_clips):
    held_out = training_and_held_out_combinations()[1]
    assert {(c.colour, c.shape, c.direction) for c in held_out_clips} == set(held_out)
    assert len({clip.frames.tobytes() for clip in held_out_clips}) == len(held_out_clips)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_opposite_directions_have_the_same_frames_in_opposite_order(direction):
    clip = draw_clip("blue", "cross", direction, np.random.default_rng(7))
    opposite = draw_clip("blue", "cross", OPPOSITE[direction], np.random.default_rng(7))
    assert np.array_equal(clip.frames[::-1], opposite.frames)


def test_clips_are_square_landscape_and_portrait(held_out_clips):
    assert {np.sign(c.frames.shape[2] - c.frames.shape[1]) for c in held_out_clips} == {-1, 0, 1}


# The model


def test_the_checkpoint_is_small():
    assert sum(file.stat().st_size for file in SHIPPED_MODEL.parent.rglob("*") if file.is_file()) <= 10e6


@pytest.mark.parametrize(
    "name, colour, shape, direction",
    [
        ("red_circle_left", "red", "circle", "to the left"),
        ("blue_cross_upwards", "blue", "cross", "upwards"),
        ("green_square_right", "green", "square", "to the right"),
    ],
)
def test_it_answers_questions_about_the_clips_beside_it(model, processor, name, colour, shape, direction):
    questions = ["What colour is the shape?", "What shape is it?", "Which way does it move?", "Describe the video."]
    answers = generate_answers(model, processor, [str(SHIPPED_CLIPS / f"{name}.mp4")] * 4, questions)
    assert answers == list(Clip(colour, shape, direction, None).answers.values())


def test_it_answers_about_combinations_it_never_saw(model, processor, held_out_clips):
    right = accuracy(model, processor, held_out_clips, seed=0)
    assert right["colour"] >= 0.95
    assert right["shape"] >= 0.9  # of 72 clips; examples/evaluate_moving_shapes.py asks about 600
    assert min(right["left or right"], right["up or down"]) >= 0.9
    assert right["description"] >= 0.85


def test_it_tells_the_direction_by_the_order_of_the_frames(model, processor, held_out_clips):
    def share_right(clips, direction_of):
        answers = generate_answers(
            model, processor, [c.frames for c in clips], ["Which way is it moving?"] * len(clips)
        )
        return np.mean([answer == f"It moves {direction_of(c)}." for c, answer in zip(clips, answers, strict=True)])

    backwards = [replace(clip, frames=clip.frames[::-1]) for clip in held_out_clips]
    assert share_right(held_out_clips, lambda clip: clip.direction) >= 0.9
    assert share_right(backwards, lambda clip: OPPOSITE[clip.direction]) >= 0.9
    assert share_right(shuffled(held_out_clips, seed=0), lambda clip: clip.direction) <= 0.6


def test_no_text_is_foreign_to_its_tokenizer(processor):
    text = "Où va le cercle rouge ? 圆 🐼"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text
