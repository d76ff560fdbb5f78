"""The small model that ships, and the data it learned from."""

import contextlib
import io
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.readme import README
from video_panda_hf.assets import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.cli import main
from video_panda_hf.decoding import decode_video


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "moving_shapes"))
from data import KINDS, Clip, ask, combinations, draw, make_clips, opposite
from held_out import ROWS, TIME_DEPENDENT, accuracy, constant_accuracy, questions_about, shuffled
from held_out import main as write_held_out


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL).eval()


@pytest.fixture(scope="module")
def held_out_clips():
    return list(make_clips(98, seed=1234, held_out=True))


def generate_answers(model, processor, videos: list, questions: list[str]) -> list[str]:
    """One greedy answer of `generate` for each video and its question."""
    conversations = [
        [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": question}]}]
        for video, question in zip(videos, questions, strict=True)
    ]
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


# The data


def test_clips_follow_from_the_seed_alone():
    first, again, other = (list(make_clips(len(KINDS), seed)) for seed in (5, 5, 6))
    assert [clip.kind for clip in first] == KINDS
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.frames, b.frames) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS))
def test_held_out_combinations_are_not_trained_on_but_their_parts_are(kind):
    def parts(clip):  # of things that move or are many, each property with each other; of two things, each
        names = [clip.direction or str(len(clip.things)), *clip.things[0]]
        pairs = {frozenset(pair) for pair in zip(names, [*names[1:], names[0]], strict=True)}
        return set(clip.things) if kind == "order" else pairs

    training, held_out = combinations(kind, held_out=False), combinations(kind, held_out=True)
    pairs = [{frozenset(clip.things) for clip in clips} for clips in (training, held_out)]
    assert not set(training) & set(held_out)
    assert kind != "order" or not pairs[0] & pairs[1]  # in whichever order
    assert 0.15 <= len(held_out) / len(training + held_out) <= 0.25
    assert set().union(*map(parts, held_out)) <= set().union(*map(parts, training))


def test_held_out_clips_show_held_out_combinations_and_are_all_different(held_out_clips):
    for clip in held_out_clips:
        assert replace(clip, frames=None) in combinations(clip.kind, held_out=True)
    assert len({clip.frames.tobytes() for clip in held_out_clips}) == len(held_out_clips)


@pytest.mark.parametrize("clip", [combinations(kind, held_out=False)[3] for kind in ("motion", "pace", "order")])
def test_what_order_alone_tells_has_an_opposite_of_the_same_frames(clip):
    backwards = clip.backwards()
    assert backwards != clip and backwards.backwards() == clip
    assert backwards.description != clip.description
    frames = [draw(each, np.random.default_rng(7)).frames for each in (clip, backwards)]
    assert np.array_equal(frames[0][::-1], frames[1])


def test_a_clip_drawn_with_fewer_frames_has_the_sampled_frames():
    clip = combinations("motion", held_out=False)[0]
    few, all_frames = (draw(clip, np.random.default_rng(7), count).frames.astype(int) for count in (8, 22))
    assert abs(few - all_frames[::3]).mean() < 8  # but for the noise


def test_every_question_of_a_clip_is_answered_by_what_it_shows():
    rng = np.random.default_rng(0)
    order = Clip("order", (("red", "circle"), ("blue", "square")))
    assert order.description == "The red one moves, then the blue one."
    assert ask("first", order, rng)[1] == "The red one." and ask("last", order, rng)[1] == "The blue one."
    assert ask("count", Clip("count", (("red", "circle"),) * 3), rng)[1] == "There are three."
    assert ask("pace", Clip("pace", (("red", "circle"),), "upwards", "slower"), rng)[1] == "It gets slower."
    crosses = Clip("count", (("red", "cross"),) * 2)
    assert ask("shape", crosses, rng)[1] == "They are crosses."
    assert crosses.description == "Two red crosses stand still."


def test_clips_are_square_landscape_and_portrait(held_out_clips):
    assert {np.sign(c.frames.shape[2] - c.frames.shape[1]) for c in held_out_clips} == {-1, 0, 1}


# The task


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """What the script writes of 7 clips, and what it prints."""
    folder, printed = tmp_path_factory.mktemp("task"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["held_out.py", "--output", str(folder), "--clips", "7", "--seed", "3"])
        write_held_out()
    return folder, printed.getvalue().splitlines()


def test_the_task_has_all_questions_about_held_out_clips(task):
    folder, printed = task
    clips = list(make_clips(7, seed=3, held_out=True))
    written = [folder / name / "moving-shapes.jsonl" for name in ("clips", "shuffled")]
    rows, same = ([json.loads(line) for line in file.read_text().splitlines()] for file in written)
    assert rows == same == list(questions_about(clips, seed=3))
    asked = [(row["video"], row["id"].split("-")[1]) for row in rows]
    assert asked == [(f"{number:04}.mp4", kind) for number, clip in enumerate(clips) for kind in clip.questions]
    assert {row["type"] for row in rows} <= set(ROWS.values())
    for name, expected in (("clips", clips), ("shuffled", shuffled(clips, seed=3))):
        frames = [decode_video(str(folder / name / f"{number:04}.mp4"))[0] for number in range(7)]
        assert [len(video) for video in frames] == [len(clip.frames) for clip in expected]
        assert all(abs(a.astype(int) - b.frames).mean() < 8 for a, b in zip(frames, expected, strict=True))
    assert printed[:2] == [str(file) for file in written]
    assert printed[2] == "| answers right, % | best constant answer |"


def test_the_best_constant_answer_is_the_most_frequent_one():
    clips = [Clip("motion", (("red", "circle"),), way) for way in ("upwards", "downwards", "upwards", "to the left")]
    expected = {"colour": 1, "shape": 1, "left or right": 1, "up or down": 2 / 3, "description": 1 / 2}
    assert constant_accuracy(clips, seed=0) == expected


def test_eval_of_the_task_gives_the_share_of_right_texts(task, model, processor, tmp_path, capsys):
    """From the command line, for clips and shuffled ones; the difference between them is paired."""
    runs = [str(tmp_path / name) for name in ("clips", "shuffled")]
    for run, name in zip(runs, ("clips", "shuffled"), strict=True):
        file = str(task[0] / name / "moving-shapes.jsonl")
        assert main(["eval", "predict", "--task", file, "--output", run, "--max-new-tokens", "24"]) == 0
        assert main(["eval", "judge", run, "--judge", "match"]) == 0
    capsys.readouterr()
    assert main(["eval", "report", *runs, "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = list(questions_about(make_clips(7, seed=3, held_out=True), seed=3))
    assert [counts["answered"] for counts in told["counts"]] == [len(rows)] * 2
    by_name = [{figure["name"]: figure for figure in figures} for figures in told["figures"]]
    for name, figures in zip(("clips", "shuffled"), by_name, strict=True):
        videos = [str(task[0] / name / row["video"]) for row in rows]
        given = generate_answers(model, processor, videos, [row["question"] for row in rows])
        right = [answer == row["answer"] for answer, row in zip(given, rows, strict=True)]
        for kind in {row["type"] for row in rows}:
            of_kind = [yes for yes, row in zip(right, rows, strict=True) if row["type"] == kind]
            figure = figures[f"accuracy of {kind}, all"]
            assert (figure["count"], figure["value"][0]) == (len(of_kind), pytest.approx(np.mean(of_kind)))
    clips, shuffled_ones = (figures["accuracy, all"]["value"][0] for figures in by_name)
    assert clips > shuffled_ones + 0.1
    assert by_name[1]["accuracy, all"]["difference"][0] == pytest.approx(shuffled_ones - clips)


def test_readme_and_results_have_one_table_with_the_rows_of_the_task():
    table = README[README.index("| answers right, % | 600 held-out clips") :].split("\n\n")[0]
    results = Path(__file__).parents[2] / "docs" / "results.md"
    assert table in results.read_text(encoding="utf-8")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == list(dict.fromkeys(ROWS.values()))


# The training


@pytest.mark.parametrize("variant", ["lsd_first", "without_row", "mse"])
def test_a_variant_can_be_trained_on_them(monkeypatch, variant):
    train = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "moving_shapes" / "train.py"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--variant", variant])
    assert train["parse"]().variant == variant


# The model


def test_the_checkpoint_is_small():
    assert sum(file.stat().st_size for file in SHIPPED_MODEL.parent.rglob("*") if file.is_file()) <= 10e6


@pytest.mark.parametrize(
    "name, clip",
    [
        ("red_circle_left", Clip("motion", (("red", "circle"),), "to the left")),
        ("blue_cross_upwards", Clip("motion", (("blue", "cross"),), "upwards")),
        ("green_square_right", Clip("motion", (("green", "square"),), "to the right")),
    ],
)
def test_it_answers_questions_about_the_clips_beside_it(model, processor, name, clip):
    questions = ["What colour is the shape?", "What shape is it?", "Which way does it move?", "Describe the video."]
    answers = generate_answers(model, processor, [str(SHIPPED_CLIPS / f"{name}.mp4")] * 4, questions)
    (colour, shape), direction = clip.things[0], clip.direction
    assert answers == [f"It is {colour}.", f"It is a {shape}.", f"It moves {direction}.", clip.description]


@pytest.mark.slow
def test_it_answers_about_combinations_it_never_saw(model, processor, held_out_clips):
    right = accuracy(model, processor, held_out_clips, seed=0)
    assert right["colour"] >= 0.95
    assert right["shape"] >= 0.9  # of 98 clips; examples/moving_shapes/held_out.py asks about 600
    assert min(right[row] for row in TIME_DEPENDENT) >= 0.9


def test_it_tells_the_direction_by_the_order_of_the_frames(model, processor, held_out_clips):
    clips = [clip for clip in held_out_clips if clip.direction]

    def share_right(clips, direction_of):
        questions = ["Which way is it moving?"] * len(clips)
        answers = generate_answers(model, processor, [clip.frames for clip in clips], questions)
        return np.mean([answer == f"It moves {direction_of(c)}." for c, answer in zip(clips, answers, strict=True)])

    backwards = [replace(clip, frames=clip.frames[::-1]) for clip in clips]
    assert share_right(clips, lambda clip: clip.direction) >= 0.9
    assert share_right(backwards, lambda clip: opposite(clip.direction)) >= 0.9
    assert share_right(shuffled(clips, seed=0), lambda clip: clip.direction) <= 0.65


def test_no_text_is_foreign_to_its_tokenizer(processor):
    text = "Où va le cercle rouge ? 圆 🐼"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text
