"""`VideoPandaTrainer`: which parts learn and how fast, what the loss is made of, that a run can be cut anywhere."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.deprecations import nothing_deprecated
from helpers.tiny_models import checkpoint_activations, tiny_model
from helpers.training import collate, make_examples, make_trainer, save_teacher
from video_panda_hf.training import (
    LANGUAGE_MODEL_LINEARS,
    STAB_AND_PROJECTOR,
    VideoPandaTrainer,
    VideoPandaTrainingArguments,
)
from video_panda_hf.training.trainer import GroupedDataset, estimate_length, keep_in_step, part_of


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def picture_teacher_folder(tmp_path_factory) -> str:
    """One that is wider, so that its head is no head of the other."""
    return save_teacher(tmp_path_factory.mktemp("picture_teacher"), hidden_size=24)


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


def test_a_frozen_language_model_survives_a_batch_of_text(tmp_path):
    make_trainer(tmp_path, examples=[make_examples()[4]] * 4, train_language=False).train()


@pytest.mark.parametrize("number", [2, 4])
def test_what_a_picture_or_text_leaves_alone_has_gradients_of_zero_in_step(number):
    model, alone = tiny_model().double().train(), tiny_model().double().train()
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    keep_in_step(model)
    batch = collate([make_examples()[number]])
    losses = [each(**batch).loss for each in (model, alone)]
    assert torch.equal(*losses)  # in float32: float64 rounds to the same
    for loss in losses:
        loss.backward()
    unused = [name for name, parameter in alone.named_parameters() if parameter.grad is None]
    assert unused and all("vision_tower" in name or "projector" in name for name in unused)
    for name, parameter in model.named_parameters():
        expected = alone.get_parameter(name).grad
        expected = torch.zeros_like(parameter) if name in unused else expected
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-5, msg=name)
    for name, value in model.named_buffers():
        assert torch.equal(value, statistics[name]), name
    assert model.model.vision_tower.lste.norm.training


@pytest.mark.parametrize(("sharded", "number", "calls"), [(False, 4, 0), (True, 4, 1), (True, 2, 1), (True, 0, 1)])
def test_in_evaluation_stab_runs_for_text_only_where_it_is_sharded(sharded, number, calls):
    """And once whatever the batch, because processes gather it each time."""
    model = tiny_model().double()
    batch = collate([make_examples()[number]])
    expected = model(**batch).logits
    keep_in_step(model, sharded)
    called = []
    model.model.vision_tower.register_forward_hook(lambda *_: called.append(True))
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-9, rtol=1e-9)
    assert len(called) == calls


@pytest.mark.parametrize("number", [0, 2, 4])
def test_stabs_backward_ends_after_all_its_gradients_where_it_is_sharded(number):
    """In this hook DeepSpeed reduces them. torch calls it early, or never, for other inputs or outputs."""
    model = tiny_model().train()
    keep_in_step(model, sharded=True)
    tower, ended = model.model.vision_tower, []
    tower.register_full_backward_hook(lambda *_: ended.append([p.grad is not None for p in tower.parameters()]))
    model(**collate([make_examples()[number]])).loss.backward()
    assert len(ended) == 1 and all(ended[0])


def test_zero3_has_stab_run_for_text_in_evaluation_too(tmp_path, monkeypatch):
    monkeypatch.setattr("video_panda_hf.training.trainer.is_deepspeed_zero3_enabled", lambda: True)
    trainer = make_trainer(tmp_path, train_language=False)
    called = []
    trainer.model.model.vision_tower.register_forward_hook(lambda *_: called.append(True))
    trainer.model.eval()(**collate([make_examples()[4]]))
    assert called


@pytest.mark.parametrize("beams", [1, 2])
def test_a_model_that_is_kept_in_step_generates_the_same(beams):
    model, batch = tiny_model(), collate([make_examples()[2]])
    options = {"max_new_tokens": 3, "num_beams": beams, "do_sample": False}
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    expected = model.generate(**prompt, **options)
    keep_in_step(model, sharded=True)
    assert torch.equal(model.generate(**prompt, **options), expected)


def test_each_part_has_its_learning_rate(tmp_path, teacher_folder, picture_teacher_folder):
    trainer = make_trainer(
        tmp_path,
        learning_rate=1.0,
        vision_learning_rate=2.0,
        distillation_learning_rate=3.0,
        weight_decay=0.1,
        distillation_teacher=teacher_folder,
        picture_teacher=picture_teacher_folder,
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
    heads = {name.split(".")[0] for name in named if part_of(name) == "distillation"}
    assert heads == {"distillation_head", "picture_distillation_head"}
    plain = make_trainer(tmp_path, trainer_class=Trainer, weight_decay=0.1).get_decay_parameter_names(tiny_model())
    assert {n for n, p in named.items() if decays[id(p)] and "distillation" not in n} == set(plain)


def test_loss_and_gradients_are_those_of_a_plain_trainer(tmp_path):
    ours, plain = tiny_model(), tiny_model()
    losses = []
    for model, trainer_class in ((ours, VideoPandaTrainer), (plain, Trainer)):
        options = {"gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 2}
        trainer = make_trainer(tmp_path, model, trainer_class=trainer_class, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        if trainer_class is VideoPandaTrainer:
            terms = [entry["language_loss"] for entry in trainer.state.log_history if "loss" in entry]
            assert terms == pytest.approx(losses[0], abs=1e-5) and len(terms) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
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


def test_distillation_by_mse_learns(tmp_path, teacher_folder):
    options = {"distillation_teacher": teacher_folder, "learning_rate": 1e-2, "max_steps": 8}
    losses = []
    for distance in ("cosine", "mse"):
        trainer = make_trainer(tmp_path, distillation_distance=distance, examples=make_examples()[:2], **options)
        trainer.train()
        losses.append([log["distillation_loss"] for log in trainer.state.log_history if "loss" in log])
        assert losses[-1][-1] < 0.9 * losses[-1][0]
    assert losses[0][0] != pytest.approx(losses[1][0], rel=0.1)


def test_an_evaluation_reports_the_language_models_loss(tmp_path, teacher_folder):
    trainer = make_trainer(tmp_path, distillation_teacher=teacher_folder, per_device_eval_batch_size=8)
    metrics = trainer.evaluate(make_examples()[:4])
    assert metrics["eval_loss"] == pytest.approx(tiny_model()(**collate(make_examples()[:4])).loss.item(), abs=1e-5)


def test_a_function_that_keeps_logits_gets_the_logits(tmp_path):
    """And nothing else, such as the videos' tokens, which are not one for each row."""
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits
    given = trainer.predict(make_examples()[:2])
    torch.testing.assert_close(
        torch.from_numpy(given.predictions), tiny_model()(**collate(make_examples()[:2])).logits, atol=1e-5, rtol=1e-5
    )


def test_evaluating_and_saving_do_not_count_as_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("video_panda_hf.training.trainer.time.perf_counter", lambda: clock[0])

    def after(seconds, original):
        def later(*positional, **keywords):
            result = original(*positional, **keywords)
            clock[0] += seconds
            return result

        return later

    class SlowDisk(TrainerCallback):
        def on_save(self, *_, **__):
            clock[0] += 100.0

    monkeypatch.setattr(Trainer, "evaluate", after(100.0, Trainer.evaluate))
    monkeypatch.setattr(Trainer, "save_model", after(100.0, Trainer.save_model))
    monkeypatch.setattr(VideoPandaTrainer, "training_step", after(1.0, VideoPandaTrainer.training_step))
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    for evaluated in (make_examples()[:2], {"one": make_examples()[:2], "two": make_examples()[2:4]}):
        trainer = make_trainer(tmp_path, max_steps=2, logging_steps=2, **every)
        trainer.eval_dataset = evaluated
        trainer.add_callback(SlowDisk())
        trainer.train()
        (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
        assert logged["videos_per_second"] == 2.0  # two of them in each step of a second


def test_mixed_precision_learns_like_full_precision(tmp_path, teacher_folder):
    """Autocast reaches STAB, LLM and distillation head alike; the weights and the losses stay in float32."""
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, bf16=bf16, distillation_teacher=teacher_folder, activation_checkpointing=bf16)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_halves_the_memory_of_stab(reentrant):
    """Batch norm's statistics are the same too: it sees each batch once. So is what dropout drops."""
    example = {name: value[None] if value.dim() == 1 else value for name, value in make_examples()[0].items()}
    results = []
    for checkpointing in (False, True):
        model, kept = tiny_model().train(), {}
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
        inside = []  # STAB is running
        tower = model.model.vision_tower
        tower.register_forward_pre_hook(lambda *_, inside=inside: inside.append(True))
        tower.register_forward_hook(lambda *_, inside=inside: inside.clear())

        def keep(tensor, kept=kept, inside=inside):
            if inside and not isinstance(tensor, nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**example).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((sum(kept.values()), {"loss": loss, **gradients, **dict(model.named_buffers())}))
    (plain_bytes, plain), (bytes_kept, checkpointed) = results
    assert bytes_kept < plain_bytes / 2
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


# Checkpoints


def losses_of(trainer) -> list[tuple]:
    return [(e["step"], e["language_loss"], e["distillation_loss"]) for e in trainer.state.log_history if "loss" in e]


def test_a_resumed_run_has_the_losses_of_an_unbroken_one(tmp_path, teacher_folder):
    """Dropout, shuffling, schedule, optimizer and distillation head: all of them go on."""
    options = {
        "max_steps": 6,
        "distillation_teacher": teacher_folder,
        "train_sampling_strategy": "random",
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 3,
    }
    unbroken = make_trainer(tmp_path / "unbroken", **options)
    unbroken.train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    with torch.no_grad():  # whatever it starts with
        for parameter in resumed.model.parameters():
            parameter.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    assert losses_of(resumed)[3:] == losses_of(unbroken)[3:]
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_checkpoint_holds_the_head_beside_the_model_and_no_teacher(tmp_path, teacher_folder):
    trainer = make_trainer(tmp_path, distillation_teacher=teacher_folder, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    head = load_file(checkpoint / "distillation_head.safetensors")
    assert {name: value.tolist() for name, value in head.items()} == {
        name: value.tolist() for name, value in trainer.distillation_head.state_dict().items()
    }
    assert set(load_file(checkpoint / "model.safetensors")) == set(tiny_model().state_dict())
    assert sum(value.numel() for value in trainer.model.parameters()) == sum(
        value.numel() for value in [*tiny_model().parameters(), *trainer.distillation_head.parameters()]
    )
    # The next stage starts from it.
    following = make_trainer(tmp_path, distillation_teacher=teacher_folder, distillation_head=str(checkpoint))
    for name, value in following.distillation_head.state_dict().items():
        assert torch.equal(value, head[name])


def test_the_head_of_pictures_is_saved_and_loaded_beside_the_other(tmp_path, teacher_folder, picture_teacher_folder):
    teachers = {"distillation_teacher": teacher_folder, "picture_teacher": picture_teacher_folder}
    options = {**teachers, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    files = {name: f"{name}.safetensors" for name in ("distillation_head", "picture_distillation_head")}
    heads = {name: trainer.model.get_submodule(name).state_dict() for name in files}
    checkpoint = tmp_path / "checkpoint-2"
    assert set(load_file(checkpoint / "model.safetensors")) == set(tiny_model().state_dict())
    # A run that goes on takes the last step anew, the next stage starts from its end.
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(str(tmp_path / "checkpoint-1"))
    following = make_trainer(tmp_path, **teachers, **dict.fromkeys(files, str(checkpoint)))
    for name, head in heads.items():
        saved, before = load_file(checkpoint / files[name]), load_file(tmp_path / "checkpoint-1" / files[name])
        assert any(not torch.equal(before[key], value) for key, value in head.items())
        for key, value in head.items():
            assert torch.equal(saved[key], value), key
            assert torch.equal(following.model.get_submodule(name).state_dict()[key], value), key
            torch.testing.assert_close(resumed.model.get_submodule(name).state_dict()[key], value, msg=key)


def test_the_best_checkpoint_comes_back_with_its_head(tmp_path, teacher_folder):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(
        tmp_path,
        distillation_teacher=teacher_folder,
        load_best_model_at_end=True,
        learning_rate=1.0,  # so large that the first step is the best
        max_steps=3,
        **options,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-3")
    for name, value in load_file(f"{best}/distillation_head.safetensors").items():
        assert torch.equal(trainer.distillation_head.state_dict()[name], value)


def test_true_goes_on_from_the_last_complete_checkpoint_with_its_head(tmp_path, teacher_folder):
    options = {"distillation_teacher": teacher_folder, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    make_trainer(tmp_path, **options).train()
    head = load_file(tmp_path / "checkpoint-2" / "distillation_head.safetensors")
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()  # as if it had been killed there
    trainer = make_trainer(tmp_path, **options)
    started_from = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            started_from.append(state.global_step)
            assert all(torch.equal(v, head[n]) for n, v in trainer.distillation_head.state_dict().items())

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=True)
    assert started_from == [2]
    with pytest.raises(ValueError, match="No valid checkpoint"):
        make_trainer(tmp_path / "empty", **options).train(resume_from_checkpoint=True)


def test_a_head_of_another_model_is_an_error(tmp_path, teacher_folder):
    save_file({"input_layer.weight": torch.zeros(3, 3)}, tmp_path / "distillation_head.safetensors")
    with pytest.raises(ValueError, match="of another LLM or teacher"):
        make_trainer(tmp_path, distillation_teacher=teacher_folder, distillation_head=str(tmp_path))


def test_training_uses_nothing_deprecated(tmp_path, teacher_folder):
    """Steps, evaluation, checkpoints, the best of them, the card, and a run that goes on."""
    options = {
        "distillation_teacher": teacher_folder,
        "activation_checkpointing": True,
        "bf16": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    for strategy, checkpoint in (("sequential", None), ("group_by_length", str(tmp_path / "checkpoint-1"))):
        with nothing_deprecated():
            trainer = make_trainer(tmp_path, train_sampling_strategy=strategy, **options)
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.predict(make_examples()[:1])
            trainer.save_model()
            trainer.create_model_card()


def test_the_model_card_has_settings_and_a_row_for_each_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(tags="clips")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for line in ("* learning_rate: 0.001", "* optim: adamw_torch", "* max_steps: 2", "* batch_size: 4", "- clips"):
        assert line in card, line
    assert not any(
        f"* {name}: " in card for name in ("distillation_weight", "remove_unused_columns", "num_train_epochs")
    )
    log = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    assert ["Step", "Epoch", "Training Loss", "Validation Loss"] in rows
    for training, evaluation in (log[:2], log[2:4]):
        losses = [f"{training['loss']:.4g}", f"{evaluation['eval_loss']:.4g}"]
        assert any(row[0] == str(training["step"]) and row[2:] == losses for row in rows)
    assert f"| Loss | {log[-1]['eval_loss']:.4g} |" in card


def test_a_deprecated_name_is_noticed(tmp_path):
    if not hasattr(TrainingArguments, "activation_checkpointing"):
        pytest.skip("this transformers has the old name alone")
    with pytest.raises(AssertionError, match="`gradient_checkpointing` is deprecated"), nothing_deprecated():
        make_trainer(tmp_path, gradient_checkpointing=True)


def test_distillation_needs_fsdp2(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        trainer.load_teacher()


# Arguments and data


def test_several_gpus_in_one_process_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(VideoPandaTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="accelerate launch"):
        make_trainer(tmp_path)


def test_arguments_that_make_no_sense_are_errors(tmp_path):
    with pytest.raises(ValueError, match="Nothing to train"):
        VideoPandaTrainingArguments(str(tmp_path), train_vision=False, train_projector=False, train_language=False)
    with pytest.raises(ValueError, match=r"label_smoothing_factor = 0\.1"):
        make_trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="distillation_teacher"):
        VideoPandaTrainingArguments(str(tmp_path), distillation_head="somewhere")
    with pytest.raises(ValueError, match="`picture_teacher` is of no use without a `distillation_teacher`"):
        VideoPandaTrainingArguments(str(tmp_path), picture_teacher="somewhere")
    with pytest.raises(ValueError, match="`picture_distillation_head` is of no use without a `picture_teacher`"):
        VideoPandaTrainingArguments(str(tmp_path), distillation_teacher="one", picture_distillation_head="somewhere")
    with pytest.raises(ValueError, match="`distillation_distance` is one of cosine, mse, not 'l1'"):
        VideoPandaTrainingArguments(str(tmp_path), distillation_distance="l1")


@pytest.mark.parametrize("kind", ["list", "datasets"])
@pytest.mark.parametrize("workers", [0, 2])
def test_grouping_puts_conversations_with_videos_together(tmp_path, kind, workers):
    """Each epoch in another order; evaluation keeps the dataset's own."""
    video, text = {"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "What happens?"}
    with_video, text_only = (
        [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "Rain."}]}]
        for content in ([video, text], [{"type": "text", "text": "Hello " * 9}])
    )
    assert estimate_length(with_video) > 100 * estimate_length(text_only)
    dataset = [{"messages": (with_video, text_only)[number % 2], "number": number} for number in range(800)]
    if kind == "datasets":
        dataset = pytest.importorskip("datasets").Dataset.from_list(dataset)
    trainer = make_trainer(
        tmp_path,
        examples=dataset,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=8,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
    )
    trainer.data_collator = numbers_of
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = torch.stack([batch["numbers"] for batch in loader])
        epochs.append(batches.flatten().tolist())
        assert batches.shape == (100, 8) and sorted(epochs[-1]) == list(range(800))
        assert sum(len(batch.unique()) > 1 for batch in batches % 2) <= 4  # of 100: where sorted stretches meet
    assert epochs[0] != epochs[1]
    for loader in (trainer.get_eval_dataloader(dataset), trainer.get_test_dataloader(dataset)):
        assert torch.cat([batch["numbers"] for batch in loader]).tolist() == list(range(800))
    assert trainer.train_dataset is dataset and trainer.args.train_sampling_strategy == "group_by_length"


def numbers_of(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {"numbers": torch.tensor([example["number"] for example in examples])}


def test_the_longest_conversation_comes_first():
    lengths = [1, 2, 9, 3] * 50
    lengths[77] = 10
    for epoch in range(3):
        grouped = GroupedDataset(range(200), lengths, batch_size=4, seed=0)
        grouped.set_epoch(epoch)
        assert grouped[0] == 77


def test_a_grouped_run_goes_on_in_the_order_of_the_epoch_it_was_in(tmp_path):
    examples = make_examples()
    for example in examples:
        example["messages"] = [{"role": "user", "content": "word " * len(example["input_ids"])}]
    runs = {}
    for name, checkpoint in {"unbroken": None, "resumed": tmp_path / "unbroken" / "checkpoint-6"}.items():
        options = {"train_sampling_strategy": "group_by_length", "save_strategy": "steps", "save_steps": 3}
        trainer = make_trainer(tmp_path / name, examples=examples, max_steps=12, **options)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        runs[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(runs["unbroken"])) == 12
    assert runs["resumed"] == runs["unbroken"]  # 4 steps are an epoch: it went on in the middle of the second


# PEFT


def with_adapters(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=LANGUAGE_MODEL_LINEARS, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("stab", [False, True])
def test_only_adapters_and_what_is_trained_in_full_change(tmp_path, stab):
    model = with_adapters(tiny_model(), modules_to_save=STAB_AND_PROJECTOR if stab else None)
    adapted = {name.rpartition(".lora_A")[0] for name in model.state_dict() if "lora_A" in name}
    assert len(adapted) == 2 * 7 and all("language_model" in name for name in adapted)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(tmp_path, model).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert {name for name in before if "lora_" in name} <= changed
    others = {name for name in changed if "lora_" not in name}
    assert bool(others) == stab and all(".modules_to_save." in name for name in others)


def test_adapters_saved_loaded_and_merged_give_the_same_logits(tmp_path, teacher_folder):
    """With STAB trained in full, and batch norm's statistics with it; the head goes into its own file."""
    peft = pytest.importorskip("peft")
    model = with_adapters(tiny_model(), modules_to_save=STAB_AND_PROJECTOR)
    trainer = make_trainer(tmp_path, model, distillation_teacher=teacher_folder)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "distillation_head.safetensors").is_file()
    assert not any("distillation" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    origin = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
    assert origin["base_model_class"] == "VideoPandaForConditionalGeneration"
    assert origin["parent_library"] == type(tiny_model()).__module__
    batch = collate(make_examples()[:3])
    expected = model.eval()(**batch).logits
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    assert (tiny_model()(**batch).logits - expected).abs().max() > 0.1
    merged.save_pretrained(tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(tiny_model().state_dict())


def test_a_run_with_adapters_goes_on_from_its_checkpoint(tmp_path, teacher_folder):
    options = {"max_steps": 4, "distillation_teacher": teacher_folder, "save_strategy": "steps", "save_steps": 2}
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        model = with_adapters(tiny_model(), modules_to_save=STAB_AND_PROJECTOR)
        trainer = make_trainer(tmp_path if checkpoint is None else tmp_path / "resumed", model, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(losses_of(trainer))
    assert runs[1][2:] == runs[0][2:]


def test_logits_are_computed_only_where_a_label_follows(tmp_path):
    model, sizes = tiny_model(), []
    model.lm_head.register_forward_hook(lambda head, given, logits: sizes.append(logits.shape[:-1].numel()))
    make_trainer(tmp_path, model, max_steps=1).train()
    labels = collate(make_examples()[:2])["labels"]
    assert sizes == [(labels[:, 1:] != -100).sum()] and sizes[0] < labels.numel() / 20
    evaluated = make_trainer(tmp_path, model, per_device_eval_batch_size=2, prediction_loss_only=True)
    evaluated.evaluate(make_examples()[:2])
    assert sizes == 2 * sizes[:1]


def test_batches_are_not_cut_by_rows(tmp_path):
    assert VideoPandaTrainingArguments(tmp_path, use_cpu=True).accelerator_config.dispatch_batches is False
