"""The comparison of teachers on moving shapes: it goes on where it was stopped, and its figures are what they say."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel

from video_panda_hf import SHIPPED_MODEL
from video_panda_hf.training import LanguageBindVideoTower


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "moving_shapes"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "fewer_tokens"))
from rows import fewer_rows

import moving_shapes
import teachers
from data import Clip, make_clips
from quick import asked, share_right, tensors


SCALE = teachers.Scale(clips=14, held_out=14, language_steps=1, teacher_steps=1, student_steps=1)


class Watched(teachers.VideoPandaTrainer):
    """Notes what each student's teacher is."""

    seen = []

    def train(self, *given, **named):
        self.seen.append(self.teacher and type(self.teacher.model))
        return super().train(*given, **named)


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """It is trained on 1,000 clips: 5 seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "new_tokenizer", functools.cache(teachers.new_tokenizer))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("teachers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "VideoPandaTrainer", Watched)
        return folder, teachers.run(folder, SCALE, range(1))


def test_each_student_is_a_line_and_a_column(finished):
    _, result = finished
    students = [(line["teacher"], line["seed"]) for line in result["students"]]
    assert students == [("none", 0), ("picture", 0), ("video", 0)]
    assert Watched.seen == [None, CLIPVisionModel, LanguageBindVideoTower]
    heading, *rows = teachers.table(result).splitlines()
    assert all(f"teacher: {name}" in heading for name in teachers.TEACHERS)
    assert len(rows) >= 5 and all(line.count("|") == 5 for line in rows)


@pytest.mark.parametrize(
    ("script", "result", "page"),
    [
        (teachers, "moving_shapes/teachers.json", "results.md"),
        (moving_shapes, "fewer_tokens/moving_shapes.json", "training.md"),
    ],
)
def test_the_documentation_has_the_table_of_the_last_run(script, result, page):
    repository = Path(__file__).parents[2]
    table = script.table(json.loads((repository / "examples" / result).read_text()))
    assert table in (repository / "docs" / page).read_text(encoding="utf-8")


def test_a_student_that_was_cut_off_is_trained_anew_and_no_other(finished, monkeypatch):
    folder, result = finished
    file = folder / "students.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    trained = []
    line = {name: result["students"][2][name] for name in ("seconds", "right")}
    monkeypatch.setattr(teachers, "train_student", lambda *given: trained.append(given[1]) or line)
    assert teachers.run(folder, SCALE, range(1)) == result
    assert trained == ["video"]
    assert teachers.run(folder, SCALE, range(1)) == result and trained == ["video"]


def test_a_folder_with_runs_of_another_scale_is_refused(finished):
    with pytest.raises(ValueError, match="runs of another scale"):
        teachers.prepared(finished[0], teachers.Scale())


def test_teachers_are_saved_in_the_layout_of_their_kinds(finished):
    folder, _ = finished
    assert isinstance(CLIPVisionModel.from_pretrained(folder / "picture"), CLIPVisionModel)
    tower = LanguageBindVideoTower.from_pretrained(folder / "video")
    assert (len(tower.layers), tower.num_frames) == (3, teachers.NUM_FRAMES)


def test_a_namer_saves_what_it_has(tmp_path):
    frames = torch.randn(4, 3, 16, 16)
    namer = teachers.Namer("video").eval()
    namer.save(tmp_path)
    tower = LanguageBindVideoTower.from_pretrained(tmp_path)
    torch.testing.assert_close(tower.features(frames), namer.tower.features(frames))


def test_labels_name_what_is_shown_and_how_it_moves():
    names = [*teachers.THINGS, *teachers.MOTIONS]

    def shown(clip):
        labels = teachers.labels_of(clip, names)
        return {name for name, label in zip(names, labels, strict=True) if label}

    assert shown(Clip("pace", (("red", "circle"),), "upwards", "slower")) == {"red", "circle", "upwards", "slower"}
    order = shown(Clip("order", (("blue", "square"), ("red", "cross"))))
    assert order == {"blue", "square", "red", "cross", "blue first"}


def test_the_share_of_right_answers_is_that_of_generated_ones():
    """Of the shipped model, with half of the rows: it is wrong about some then."""
    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL).eval()
    examples = asked(processor, make_clips(14, 3, held_out=True, frames=8))
    right = {}
    for example in examples:
        batch = fewer_rows(model, tensors([example]), "half")
        labels = batch.pop("labels")[0]
        begin = int((labels != -100).nonzero()[0])
        prompt = {**batch, "input_ids": batch["input_ids"][:, :begin], "attention_mask": None}
        answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, begin:]
        right.setdefault(example["rows"][0], []).append(answer.tolist() == labels[begin:].tolist())
    expected = {row: sum(answers) / len(answers) for row, answers in right.items()}
    found = share_right(model, examples, lambda batch: fewer_rows(model, batch, "half"), batch_size=5)
    assert found == pytest.approx(expected)
    assert 0 < sum(map(sum, right.values())) < len(examples)


def test_row_dropout_is_compared_with_the_same_training_without_it(finished, monkeypatch):
    folder, _ = finished
    costs = moving_shapes.costs
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {name: teachers.VISION[name] for name in ("hidden_size", "num_attention_heads", "patch_size")}
    monkeypatch.setattr(moving_shapes, "costs", lambda *_: costs(sizes, vision, 64))
    result = moving_shapes.run(folder, SCALE, range(1))
    assert [line["row_dropout"] for line in result["models"]] == [False, True]
    tokens = [result["costs"][rows]["tokens"] for rows in ("none", "half", "all")]
    assert tokens[2] - tokens[1] == tokens[1] - tokens[0] == 8 * 2 * 5  # two of four rows, of four tokens and <row>
    assert all(
        0 <= share <= 1 for model in result["models"] for right in model["right"].values() for share in right.values()
    )
    assert [json.loads(line) for line in (folder / "models.jsonl").read_text().splitlines()] == result["models"]
    assert len(moving_shapes.table(result).splitlines()) == 5
