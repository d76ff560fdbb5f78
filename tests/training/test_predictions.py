"""What an evaluation in the course of training gives: generated answers, the most likely tokens, figures of a task."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, GenerationConfig

from helpers.evaluated import decoded, eval_rows, make_evaluated
from helpers.evaluation import lines_of, write_lines
from helpers.tiny_models import tiny_model
from helpers.training import collate, make_examples, make_trainer
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.training import VideoPandaDataCollator, VideoPandaTrainingArguments
from video_panda_hf.training.collator import up_to_the_last_answer
from video_panda_hf.training.tasks import load_eval_task


GOOD = [0, 2, 3, 6]  # of `eval_rows`


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A trainer, and what it generates for `eval_rows`, among which some are broken."""
    trainer = make_evaluated(tmp_path_factory.mktemp("generated"), predict_with_generate=True)
    return trainer, trainer.predict(trainer.eval_dataset)


def test_answers_are_those_of_generate_for_each_prompt_alone(generated):
    """Of videos, pictures, text and several turns; the right answers of earlier turns are in the prompt."""
    trainer, found = generated
    processor, answers = trainer.processing_class, []
    for number in GOOD:
        *prompt, _ = up_to_the_last_answer(eval_rows()[number]["messages"])
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(prompt, **options)
        output = trainer.model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(output, skip_special_tokens=True)
    assert decoded(trainer, found.predictions) == answers
    assert answers[0].strip() == "It is red." and len(set(answers)) > 2
    assert [label.strip() for label in decoded(trainer, found.label_ids)] == [
        "Red.",
        "Hello, who is there?",
        "A picture.",
        "Green.",
    ]


def test_the_loss_is_that_of_an_evaluation_without_generation(generated, tmp_path):
    _, found = generated
    plain = make_evaluated(tmp_path).evaluate()
    assert found.metrics["test_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


def test_compute_metrics_gets_answers_in_the_course_of_training(tmp_path):
    def metrics(given):
        seen.append(given)
        return {"answered": len(given.predictions)}

    seen = []
    options = {"predict_with_generate": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    trainer = make_evaluated(tmp_path, compute_metrics=metrics, **options)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "eval_answered" in entry)
    assert logged["eval_answered"] == len(GOOD) and "eval_loss" in logged
    assert decoded(trainer, seen[0].predictions)[0].strip() == "It is red."


@pytest.mark.parametrize(
    ("arguments", "longest", "beams"),
    [
        ({"generation_max_length": 3, "generation_num_beams": 2}, 3, 2),
        ({"generation_config": GenerationConfig(max_new_tokens=2, num_beams=3), "generation_max_length": None}, 2, 3),
        ({"generation_max_length": None}, 256, None),
    ],
)
def test_answers_are_generated_as_the_arguments_say(tmp_path, monkeypatch, arguments, longest, beams):
    trainer = make_evaluated(tmp_path, eval_rows()[:1], predict_with_generate=True, **arguments)
    generate, given = trainer.model.generate, []

    def watched(**options):
        given.append(options)
        return generate(**{**options, "max_new_tokens": min(options["max_new_tokens"], 5)})

    monkeypatch.setattr(trainer.model, "generate", watched)
    found = trainer.predict(trainer.eval_dataset)
    assert found.predictions.shape[1] <= min(longest, 5)
    assert given[0]["max_new_tokens"] == longest
    assert given[0].get("num_beams", getattr(given[0].get("generation_config"), "num_beams", None)) == beams


def test_rows_without_labels_are_prompts_as_a_whole(tmp_path):
    trainer = make_trainer(tmp_path, predict_with_generate=True, generation_max_length=4)
    examples = make_examples([(4, 8, 8), None])
    trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "labels"}
    found = trainer.predict(examples)
    assert found.label_ids is None
    for row, example in zip(found.predictions, examples, strict=True):
        inputs = {name: value for name, value in collate([example]).items() if name != "labels"}
        alone = tiny_model().generate(**inputs, max_new_tokens=4)[0, len(example["input_ids"]) :]
        assert row[: len(alone)].tolist() == alone.tolist()


# Without generation


def test_by_default_predictions_are_the_most_likely_tokens_before_labels(tmp_path):
    """And their logits are the only ones that are computed."""
    model, sizes = tiny_model(), []
    trainer = make_trainer(tmp_path, model, per_device_eval_batch_size=2)
    trainer.compute_metrics = lambda given: {"shape": given.predictions.shape}
    model.lm_head.register_forward_hook(lambda head, given, logits: sizes.append(logits.shape[:-1].numel()))
    batch = collate(make_examples()[:3])
    found = trainer.predict(make_examples()[:3])
    expected = tiny_model()(**batch).logits[:, :-1].argmax(-1)
    is_label = batch["labels"][:, 1:] != -100
    predictions = torch.from_numpy(found.predictions)
    assert predictions.shape == batch["labels"].shape == found.label_ids.shape
    assert torch.equal(predictions[:, :-1][is_label], expected[is_label])
    assert (predictions[:, :-1][~is_label] == -100).all()
    assert sum(sizes) == is_label.sum()


def test_a_function_of_the_user_gets_all_logits(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.amin(-1)
    found = trainer.predict(make_examples()[:2])
    logits = tiny_model()(**collate(make_examples()[:2])).logits
    torch.testing.assert_close(torch.from_numpy(found.predictions), logits.amin(-1), atol=1e-5, rtol=1e-5)


def test_samples_that_are_skipped_have_no_predictions(tmp_path):
    trainer = make_evaluated(tmp_path)
    found = trainer.predict(trainer.eval_dataset)
    alone = [trainer.predict([eval_rows()[number]]) for number in GOOD]
    assert len(found.predictions) == len(found.label_ids) == len(GOOD)
    for row, one in zip(found.predictions, alone, strict=True):
        assert row[row >= 0].tolist() == one.predictions[one.predictions >= 0].tolist()


def test_what_follows_the_last_answer_is_left_out():
    row, collate_rows = eval_rows()[6], VideoPandaDataCollator(AutoProcessor.from_pretrained(SHIPPED_MODEL))
    whole, cut = collate_rows([row]), collate_rows([{**row, "messages": row["messages"][:-1]}])
    assert len(whole["video_grid_thw"]) == 2 and all(torch.equal(value, cut[name]) for name, value in whole.items())


# A task

FIGURES = {"eval_shapes_accuracy": 0.75, "eval_shapes_accuracy_colour": 1.0, "eval_shapes_accuracy_shape": 0.5}
FIGURES |= {"eval_shapes_match": 0.25, "eval_shapes_match_colour": 0.5, "eval_shapes_match_shape": 0.0}


def questions(folder: Path) -> str:
    """Two colours, which the shipped model says, one in a sentence as it does, a shape, and a wrong answer."""
    colour, shape = ("What colour is the shape?", "colour"), ("Which shape is it?", "shape")
    asked = [("red_circle_left", *colour, "red"), ("blue_cross_upwards", *colour, "It is blue.")]
    asked += [("blue_cross_upwards", *shape, "cross"), ("green_square_right", *shape, "a circle")]
    rows = [dict(zip(("video", "question", "type", "answer"), row, strict=True)) for row in asked]
    return str(write_lines(folder / "shapes.jsonl", rows))


def test_a_task_is_run_at_each_evaluation_and_can_choose_the_best_model(tmp_path):
    """It changes neither the mode nor the random numbers of the training."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "learning_rate": 1e-5, "logging_steps": 1}
    plain = make_evaluated(tmp_path / "plain", eval_rows()[:1], **options)
    plain.train()
    task = {"eval_task": questions(tmp_path), "eval_task_videos": str(SHIPPED_CLIPS)}
    best = {"metric_for_best_model": "eval_shapes_accuracy", "load_best_model_at_end": True}
    options |= {"save_strategy": "steps", "save_steps": 1}
    trainer = make_evaluated(tmp_path / "run", eval_rows()[:1], **options, **task, **best)
    trainer.train()
    logged = [
        {name: value for name, value in entry.items() if "shapes" in name}
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]
    assert logged == [FIGURES, FIGURES] and trainer.state.best_metric == 0.75
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (plain, trainer)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    lines = lines_of(tmp_path / "run" / "eval" / "shapes" / "step-2" / "predictions.jsonl")
    assert [line["answer"].strip() for line in lines[:2]] == ["It is red.", "It is blue."]
    assert all(len(line["frames"]) == 8 for line in lines)
    trainer.model.train()
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()  # the answers of other weights at the same step are not taken for these
    figures = trainer.figures_of_task()
    assert figures["eval_shapes_accuracy"] == 0.0 and trainer.model.training


def test_a_task_is_run_once_for_several_datasets_with_the_collators_frames(tmp_path):
    task = {"eval_task": questions(tmp_path), "eval_task_videos": str(SHIPPED_CLIPS)}
    trainer = make_evaluated(tmp_path / "run", eval_rows()[:1], **task)
    trainer.data_collator = VideoPandaDataCollator(trainer.processing_class, num_frames=4)
    rows = eval_rows()
    metrics = trainer.evaluate({"one": rows[:1], "two": rows[2:3]})
    assert "eval_one_loss" in metrics and "eval_two_loss" in metrics and "eval_shapes_accuracy" in metrics
    lines = lines_of(tmp_path / "run" / "eval" / "shapes" / "step-0" / "predictions.jsonl")
    assert all(len(line["frames"]) == 4 for line in lines)


def test_options_of_a_task_are_chosen_by_likelihood(tmp_path):
    rows = [
        {"video": "red_circle_left", "question": "What colour is it?", "options": ["It is red.", "A"], "answer": 0}
    ]
    task = {"eval_task": str(write_lines(tmp_path / "mc.jsonl", rows)), "eval_task_videos": str(SHIPPED_CLIPS)}
    metrics = make_evaluated(tmp_path / "run", eval_rows()[:1], **task).evaluate()
    (line,) = lines_of(tmp_path / "run" / "eval" / "mc" / "step-0" / "predictions.jsonl")
    assert len(line["log_likelihoods"]) == 2 and metrics["eval_mc_accuracy"] == (line["choice"] == 0)


def test_a_task_that_cannot_be_run_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match="is no task"):
        make_evaluated(tmp_path, eval_task="nonsense")
    with pytest.raises(ValueError, match="as `processing_class`"):
        make_trainer(tmp_path, eval_task=questions(tmp_path))
    with pytest.raises(ValueError, match="FSDP or ZeRO-3"):
        load_eval_task(VideoPandaTrainingArguments(str(tmp_path), eval_task="any"), None, is_sharded=True)


@pytest.mark.slow
def test_two_processes_give_the_predictions_of_one(generated, forks, tmp_path):
    trainer, found = generated
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).parents[1] / "helpers" / "evaluated.py"
    questions(tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PET_START_METHOD": "fork", "PET_RUN_PATH": "1"}  # without imports
    done = forks.run([*command, script, tmp_path], env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    likely = make_evaluated(tmp_path / "one").predict(eval_rows()).predictions
    expected = {
        "predictions": decoded(trainer, found.predictions),
        "labels": decoded(trainer, found.label_ids),
        "likely": [row[row >= 0].tolist() for row in likely],
        "figures": FIGURES,
    }
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
