"""Fewer tokens a frame: which rows go, what stays as it was, and one training for any number of rows."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor

from helpers.tiny_models import tiny_model
from helpers.training import GRIDS, collate, make_examples, make_trainer, tiny_teacher


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "fewer_tokens"))
from rows import ROWS, RowDropoutTrainer, fewer_rows, kept_tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


@pytest.fixture
def batch() -> dict:
    return collate(make_examples())


def test_the_context_token_and_whole_rows_stay(model):
    config = model.config.vision_config
    frame = {"none": "1000000", "half": "1111000", "all": "1111111"}  # 2 rows of 2 tokens and <row>
    odd = {**frame, "half": "1000111"}
    for rows in ROWS:
        kept = kept_tokens(4, 4, 4, config, rows)
        expected = "".join([frame[rows], odd[rows]] * 2)
        assert "".join("01"[stays] for stays in kept.tolist()) == expected


def test_all_rows_change_nothing(model, batch):
    with torch.no_grad():
        expected, got = model(**batch), model(**fewer_rows(model, batch, "all"))
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.loss, expected.loss)


@pytest.mark.parametrize("rows", ["none", "half"])
def test_the_rest_of_a_prompt_is_as_a_prompt_without_these_tokens(model, batch, rows):
    """Each row alone, put together by hand from the features that stay."""
    with torch.no_grad():
        got = model(**fewer_rows(model, batch, rows)).logits
        for number, (grid, example) in enumerate(zip(GRIDS, make_examples(), strict=True)):
            ids, embeddings = example["input_ids"], model.get_input_embeddings()(example["input_ids"])
            if grid is not None:
                kept = kept_tokens(*grid, model.config.vision_config, rows)
                is_video = model.model.find_placeholders(ids)
                features = model.get_video_features(example["pixel_values_videos"], example["video_grid_thw"])
                embeddings[is_video] = features.pooler_output[0]
                is_video[is_video.clone()] = ~kept
                embeddings = embeddings[~is_video]
            alone = model(inputs_embeds=embeddings[None]).logits[0]
            torch.testing.assert_close(got[number, : len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_answers_are_generated_for_prompts_padded_on_the_left(model):
    """The same for each prompt alone and in a batch."""
    examples = [example for example in make_examples() if "pixel_values_videos" in example][:2]
    prompts = [
        {
            "input_ids": example["input_ids"][example["labels"] == -100][None],
            **{name: example[name] for name in ("pixel_values_videos", "video_grid_thw")},
        }
        for example in examples
    ]
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    padding = [longest - prompt["input_ids"].shape[1] for prompt in prompts]
    assert max(padding) > 0
    together = {
        name: torch.cat([prompt[name] for prompt in prompts]) for name in ("pixel_values_videos", "video_grid_thw")
    }
    pad = torch.nn.functional.pad
    ids = [pad(prompt["input_ids"], (count, 0)) for prompt, count in zip(prompts, padding, strict=True)]
    mask = [
        pad(torch.ones_like(prompt["input_ids"]), (count, 0)) for prompt, count in zip(prompts, padding, strict=True)
    ]
    together |= {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}
    options = {"max_new_tokens": 6, "do_sample": False}
    answers = model.generate(**fewer_rows(model, together, "half"), **options)[:, -6:]
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = model.generate(**fewer_rows(model, prompt, "half"), **options)
        assert alone[0, -6:].tolist() == answer.tolist()


def test_gradients_reach_stab_and_text_alone_is_left_as_it_is(batch):
    model = tiny_model().train()
    model(**fewer_rows(model, batch, "none")).loss.backward()
    assert model.model.vision_tower.patch_embedding.weight.grad.abs().sum() > 0
    text = {"input_ids": torch.tensor([[0, 6, 7]])}
    assert fewer_rows(model, text, "none") == text


def test_each_video_of_a_training_loses_all_half_or_none_of_its_rows(model):
    torch.manual_seed(0)
    kept = [int(kept_tokens(64, 4, 4, model.config.vision_config, "random").sum()) for _ in range(60)]
    lone, whole = 64, 64 * 7
    halves = [count for count in kept if count not in (lone, whole)]
    assert min(kept.count(lone), kept.count(whole), len(halves)) >= 10
    assert all(0.35 < (count - lone) / (whole - lone) < 0.65 for count in halves)


def test_the_trainer_drops_rows_in_training_alone(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(
        RowDropoutTrainer.compute_loss.__globals__,
        "fewer_rows",
        lambda model, inputs, rows: calls.append(rows) or fewer_rows(model, inputs, rows),
    )
    trainer = make_trainer(tmp_path, trainer_class=RowDropoutTrainer)
    trainer.train()
    steps = len(calls)
    assert steps >= 2 and set(calls) == {"random"}
    trainer.evaluate(make_examples())
    assert len(calls) == steps


def test_what_cannot_work_is_refused(model, batch, tmp_path):
    with pytest.raises(ValueError, match=r"rows is .*, not 'most'"):
        fewer_rows(model, batch, "most")
    tiny_teacher("clip", 8, 2).save_pretrained(tmp_path / "teacher")
    CLIPImageProcessor().save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="without distillation"):
        make_trainer(tmp_path, trainer_class=RowDropoutTrainer, distillation_teacher=str(tmp_path / "teacher"))
