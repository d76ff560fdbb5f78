"""The model as lmms-eval finds and runs it: answers of `generate`, a task from its command line. Needs lmms-eval."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.evaluation import CLIPS, write_lines
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL


if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("needs lmms-eval", allow_module_level=True)

from lmms_eval.models.registry_v2 import ModelRegistryV2

from video_panda_hf.evaluation.lmms import manifest
from video_panda_hf.evaluation.lmms.model import VideoPanda


COLOUR, DESCRIBE = "What colour is the shape?", "Describe the video."
FILES = {colour: str(SHIPPED_CLIPS / f"{name}.mp4") for name, colour in CLIPS.items()}
GREEDY = {"until": ["ASSISTANT:"], "max_new_tokens": 20, "temperature": 0, "do_sample": False}


def model_of(**arguments) -> VideoPanda:
    return VideoPanda.create_from_arg_string(f"pretrained={SHIPPED_MODEL}", {"device": "cpu", **arguments})


@pytest.fixture(scope="module")
def model():
    return model_of(batch_size="2")


def ask(model, *asked: tuple, settings=GREEDY) -> list[str]:
    """The answers to (part or parts of a message, question), or to these with settings of their own."""
    model.task_dict = {"task": {"test": asked}}

    def to_messages(doc):
        parts = doc[0] if isinstance(doc[0], list) else [doc[0]]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": doc[1]}]}]

    return model.generate_until(
        [
            SimpleNamespace(args=(doc[1], to_messages, doc[2] if len(doc) > 2 else settings, number, "task", "test"))
            for number, doc in enumerate(asked)
        ]
    )


def video(colour: str, **fields) -> dict:
    return {"type": "video", "url": FILES[colour], **fields}


def expected(part: dict, question: str, **settings) -> str:
    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **settings
    )
    output = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL).generate(**inputs, max_new_tokens=20)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_the_manifest_names_a_chat_model():
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("video_panda") is VideoPanda


def test_batches_and_settings_give_the_answers_of_generate_in_order(model):
    short = {**GREEDY, "max_new_tokens": 2}
    asked = [
        (video("red"), COLOUR),
        (video("blue"), DESCRIBE, short),
        (video("blue"), COLOUR),
        (video("green"), DESCRIBE),
    ]
    answers = ask(model, *asked)
    description = expected({"type": "video", "video": FILES["green"]}, DESCRIBE)
    assert [answers[0], answers[2], answers[3]] == ["It is red.", "It is blue.", description]
    whole = expected({"type": "video", "video": FILES["blue"]}, DESCRIBE)
    assert whole.startswith(answers[1]) and 0 < len(answers[1]) < len(whole)
    assert ask(model_of(), *asked) == answers


def test_frames_are_those_the_processor_takes(monkeypatch):
    seen = []
    for arguments, frames in (({}, 8), ({"num_frames": 4}, 4), ({"fps": 8, "max_frames": 16}, 16)):
        model = model_of(**arguments)
        monkeypatch.setattr(model.model, "generate", lambda **inputs: seen.append(inputs) or inputs["input_ids"])
        ask(model, (video("red"), COLOUR))
        settings = {"do_sample_frames": True, **arguments}
        part = [
            {"role": "user", "content": [{"type": "video", "video": FILES["red"]}, {"type": "text", "text": COLOUR}]}
        ]
        wanted = model.processor.apply_chat_template(
            part, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **settings
        )
        assert seen[-1]["video_grid_thw"][0, 0] == frames
        assert torch.equal(seen[-1]["pixel_values_videos"], wanted["pixel_values_videos"])


def test_a_part_in_seconds_is_that_part(model):
    times = {"video_start": 0.5, "video_end": 1.5}
    (answer,) = ask(model, ({"type": "video", "url": {"url": FILES["red"], **times}}, DESCRIBE))
    assert answer == expected({"type": "video", "video": FILES["red"], "start": 0.5, "end": 1.5}, DESCRIBE)


def test_a_broken_video_is_a_wrong_answer_with_a_warning_and_not_the_end(model, tmp_path, caplog):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing")
    gone = {"type": "video", "url": str(tmp_path / "gone.mp4")}
    asked = [
        (video("red"), COLOUR),
        (gone, COLOUR),
        ({"type": "video", "url": str(broken)}, COLOUR),
        (video("blue"), COLOUR),
    ]
    assert ask(model, *asked) == ["It is red.", "", "", "It is blue."]
    warned = [record.getMessage() for record in caplog.records if "no answer" in record.getMessage()]
    assert len(warned) == 2 and "gone.mp4" in warned[0] and "broken.mp4" in warned[1]


@pytest.mark.parametrize("kind", ["gif", "webm"])
def test_a_gif_or_webm_is_a_video(model, tmp_path, kind):
    """lmms-eval takes them for a picture and a sound."""
    file = tmp_path / f"clip.{kind}"
    file.write_bytes(open(FILES["red"], "rb").read())  # what is in it says what it is
    part = {"type": {"gif": "image", "webm": "audio"}[kind], "url": str(file)}
    assert ask(model, (part, DESCRIBE)) == ask(model, (video("red"), DESCRIBE))


def test_an_answer_ends_before_the_first_of_the_tasks_strings(model):
    assert ask(model, (video("red"), COLOUR), settings={**GREEDY, "until": ["red", " is"]}) == ["It"]
    assert ask(model, (video("red"), COLOUR), settings={"until": "\n\n"}) == ["It is red."]


def test_a_temperature_samples_and_none_is_greedy(model):
    greedy = {"max_new_tokens": 1024, "num_beams": 1, "do_sample": False}
    assert model.generation({"temperature": 0, "top_p": 0.9, "do_sample": True}) == greedy
    assert model.generation({"temperature": 0.7, "do_sample": False}) == greedy
    sampled = {"max_new_tokens": 5, "num_beams": 1, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert model.generation({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}) == sampled


def test_a_system_prompt_replaces_that_of_the_task(model):
    told = model_of(system_prompt="Be brief.")
    told.task_dict = {"task": {"test": [0]}}
    content = [video("red"), {"type": "text", "text": COLOUR}]
    of_task = [
        {"role": "system", "content": [{"type": "text", "text": "Talk."}]},
        {"role": "user", "content": content},
    ]
    messages = told.conversation("", lambda doc: of_task, {}, 0, "task", "test")
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[0]["content"] == [{"type": "text", "text": "Be brief."}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "`batch_size` is a number from 1, not 'auto'"),
        ({"num_frames": 3}, "num_frames"),
        ({"max_frames": 8}, "`max_frames` limits `fps`"),
    ],
)
def test_wrong_arguments_are_refused_before_a_request(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of(**arguments)


def test_what_it_cannot_do_says_what_can(model):
    with pytest.raises(NotImplementedError, match="--choice likelihood"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])


TASK = """\
task: shapes
dataset_path: json
dataset_kwargs:
  data_files: {test: %s}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.video
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 20, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_a_task_runs_from_the_command_line_of_lmms_eval(tmp_path, monkeypatch):
    rows = [
        {"video": FILES[c], "question": COLOUR, "answer": f"It is {a}."} for c, a in zip(FILES, (*FILES,), strict=True)
    ]
    rows.append({"video": FILES["red"], "question": COLOUR, "answer": "It is green."})
    rows = write_lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "shapes.yaml").write_text(TASK % rows)
    (tmp_path / "task" / "utils.py").write_text("def video(doc, *_):\n    return [doc['video']]\n")
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "video_panda",
        "--model_args",
        f"pretrained={SHIPPED_MODEL}",
    ]
    command += ["--tasks", "shapes", "--include_path", str(tmp_path / "task"), "--batch_size", "2", "--device", "cpu"]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(file.read_text())["results"]["shapes"]["exact_match,none"] == 0.75
