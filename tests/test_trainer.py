"""`VideoPandaTrainer`: which parts learn and how fast, what the loss is made of, that a run can be cut anywhere."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPImageProcessor, Trainer, TrainingArguments

from test_distillation import tiny_teacher
from tiny_models import PAD, PATCH_DIM, placeholders, tiny_model
from video_panda_hf.training import VideoPandaTrainer, VideoPandaTrainingArguments
from video_panda_hf.training.trainer import part_of


GRIDS = [(4, 8, 8), (4, 4, 8), (1, 8, 8), (8, 8, 4), None, (4, 8, 8), (4, 8, 6), (4, 4, 4)]


def make_examples(grids=GRIDS) -> list[dict]:
    """Each a video (or none) of noise, a question and an answer, of various lengths."""
    examples = []
    for number, grid in enumerate(grids):
        generator = torch.Generator().manual_seed(number)
        answer = torch.randint(5, 99, (2 + number % 3,), generator=generator).tolist()
        prompt = [0, *(placeholders(*grid) if grid else []), 6, 7]
        example = {
            "input_ids": torch.tensor([*prompt, *answer, 1]),
            "labels": torch.tensor([-100] * len(prompt) + [*answer, 1]),
        }
        if grid:
            patches = grid[0] * grid[1] * grid[2]
            example["pixel_values_videos"] = torch.randn(patches, PATCH_DIM, generator=generator)
            example["video_grid_thw"] = torch.tensor([grid])
        examples.append(example)
    return examples


def collate(examples: list[dict]) -> dict:
    ids = [example["input_ids"] for example in examples]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence([example["labels"] for example in examples], batch_first=True, padding_value=-100),
    }
    for name in ("pixel_values_videos", "video_grid_thw"):
        parts = [example[name] for example in examples if name in example]
        if parts:
            batch[name] = torch.cat(parts)
    return batch


def make_trainer(folder, model=None, examples=None, trainer_class=VideoPandaTrainer, callbacks=None, **arguments):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
    }
    arguments_class = VideoPandaTrainingArguments if trainer_class is VideoPandaTrainer else TrainingArguments
    args = arguments_class(str(folder), **{**defaults, **arguments})
    return trainer_class(
        tiny_model() if model is None else model,
        args,
        train_dataset=examples or make_examples(),
        data_collator=collate,
        callbacks=callbacks,
    )


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> str:
    """A made-up CLIP: pictures of 8 × 8 pixels, patches of 2 × 2, as the tiny model's canvas halved."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_teacher("clip", image_size=8, patch_size=2).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return str(folder)


def changed_parts(before: dict, model) -> set[str]:
    """Modules right under the model that have a changed tensor, batch norm's statistics included."""
    names = [name for name, value in model.state_dict().items() if not torch.equal(before[name], value)]
    return {module for name in names for module in MODULES if module in name}


MODULES = ("vision_tower", "multi_modal_projector", "language_model", "lm_head", "distillation_head")


@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        ({}, {"vision_tower", "multi_modal_projector", "language_model", "lm_head"}),
        ({"train_language": False}, {"vision_tower", "multi_modal_projector"}),
        ({"train_vision": False, "train_language": False}, {"multi_modal_projector"}),
        ({"train_vision": False, "train_projector": False}, {"language_model", "lm_head"}),
    ],
)
def test_only_the_chosen_parts_change(tmp_path, arguments, trained):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(tmp_path, model, **arguments).train()
    assert changed_parts(before, model) == trained


def test_each_part_has_its_learning_rate(tmp_path, teacher_folder):
    trainer = make_trainer(
        tmp_path,
        learning_rate=1.0,
        vision_learning_rate=2.0,
        distillation_learning_rate=3.0,
        weight_decay=0.1,
        distillation_teacher=teacher_folder,
    )
    groups = trainer.create_optimizer().param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    named = dict(trainer.model.named_parameters())
    assert len(rates) == len(named) == sum(len(group["params"]) for group in groups)
    expected = {"vision": 2.0, "language": 1.0, "distillation": 3.0}
    assert {name: rates[id(parameter)] for name, parameter in named.items()} == {
        n: expected[part_of(n)] for n in named
    }
    plain = make_trainer(tmp_path, trainer_class=Trainer, weight_decay=0.1).get_decay_parameter_names(tiny_model())
    assert {n for n, p in named.items() if decays[id(p)] and "distillation" not in n} == set(plain)


def test_loss_and_gradients_are_those_of_a_plain_trainer(tmp_path):
    ours, plain = tiny_model(), tiny_model()
    losses = []
    for model, trainer_class in ((ours, VideoPandaTrainer), (plain, Trainer)):
        trainer = make_trainer(tmp_path, model, trainer_class=trainer_class, gradient_accumulation_steps=2)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


def test_a_batch_has_one_loss_however_it_is_split(tmp_path, teacher_folder):
    """Both terms, their logs and the weights after a step; the first four examples differ in tokens and frames."""
    results = []
    for batch_size, parts in [(4, 1), (2, 2), (1, 4)]:
        model = tiny_model()
        trainer = make_trainer(
            tmp_path,
            model,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=parts,
            train_vision=False,  # batch norm and dropout would tell the splits apart
            distillation_teacher=teacher_folder,
            distillation_weight=0.5,
            optim="sgd",
        )
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(log["language_loss"] + 0.5 * log["distillation_loss"], abs=1e-5)
        assert log["tokens_per_second"] > log["videos_per_second"] > 0
        results.append({**model.state_dict(), **{name: log[name] for name in ("language_loss", "distillation_loss")}})
    assert results[0]["language_loss"] == pytest.approx(tiny_model()(**collate(make_examples()[:4])).loss.item())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-6, rtol=1e-5)
