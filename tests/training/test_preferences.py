"""Pairs of answers for TRL's `DPOTrainer`: rows, batches."""

import json

import pytest
import torch
from transformers import AutoProcessor

from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.training import (
    BadSampleError,
    ConversationError,
    VideoPandaDataCollator,
    VideoPandaPreferenceCollator,
    load_preferences,
)


pytest.importorskip("datasets")

QUESTION = "<video>Who is this?"


def turn(role, content):
    return {"role": role, "content": content}


ROW = {"video": "red_circle_left.mp4", "prompt": QUESTION, "chosen": "Ruby.", "rejected": "This is a red circle."}
SPOKEN = {"prompt": [turn("user", QUESTION)]} | {
    answer: [turn("assistant", ROW[answer])] for answer in ("chosen", "rejected")
}
WHOLE = {answer: [turn("user", QUESTION), turn("assistant", ROW[answer])] for answer in ("chosen", "rejected")}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(SHIPPED_MODEL)


@pytest.mark.parametrize("form", [ROW, SPOKEN, WHOLE])
def test_a_pair_is_two_conversations_with_a_mask_on_the_last_answer(processor, form):
    rows = load_preferences(
        [{**form, "video": ROW["video"]}, {**ROW, "video": "blue_cross_upwards.mp4"}], SHIPPED_CLIPS
    )
    batch = VideoPandaPreferenceCollator(processor, num_frames=4)(list(rows))
    expected = VideoPandaDataCollator(processor, num_frames=4)(
        [
            {"video": SHIPPED_CLIPS / f"{clip}.mp4", "messages": WHOLE[answer]}
            for answer in ("chosen", "rejected")
            for clip in ("red_circle_left", "blue_cross_upwards")
        ]
    )
    assert torch.equal(batch.pop("completion_mask"), (expected.pop("labels") != -100).long())
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


def test_earlier_answers_are_part_of_the_prompt(processor):
    prompt = [turn("user", QUESTION), turn("assistant", "A shape."), turn("user", "Which?")]
    row = {"video": str(SHIPPED_CLIPS / ROW["video"]), "prompt": prompt, "chosen": "A circle.", "rejected": "A cross."}
    batch = VideoPandaPreferenceCollator(processor, num_frames=4)([row])
    answers = [
        processor.decode(ids[mask > 0], skip_special_tokens=True).strip()
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert answers == ["A circle.", "A cross."]


def test_of_a_bad_pair_no_half_is_kept(processor):
    """The video fits with one answer and not with the other."""
    rows = load_preferences([ROW, {**ROW, "rejected": "A cross."}], SHIPPED_CLIPS)
    rows = [rows[0], {**rows[1], "rejected": [*rows[1]["rejected"][:1], turn("user", "No?")]}]
    collator = VideoPandaPreferenceCollator(processor, on_error="skip", max_skipped_share=1, num_frames=4)
    batch = collator(rows)
    assert len(batch["input_ids"]) == len(batch["video_grid_thw"]) == 2 and collator.skipped == 1
    with pytest.raises(BadSampleError, match="sample 1"):
        VideoPandaPreferenceCollator(processor, num_frames=4)(rows)


def test_bad_rows_are_named_before_training(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{**ROW, "rejected": ""}, {**ROW, "video": "gone.mp4"}]
    file.write_text("\n".join([*map(json.dumps, rows), "no JSON"]))
    with pytest.raises(ConversationError, match="3 bad") as raised:
        load_preferences(file)
    assert all(found in str(raised.value) for found in ("`rejected`", str(tmp_path / "gone.mp4"), "line 3"))
