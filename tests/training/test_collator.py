"""`VideoPandaDataCollator`: what a batch holds, token by token, and what becomes of a sample that is bad."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from helpers.tiny_models import tiny_config
from helpers.tiny_tokenizers import chatml_tokenizer
from helpers.video_files import VideoSpec
from video_panda_hf import VideoPandaForConditionalGeneration, VideoPandaProcessor
from video_panda_hf.decoding import isolation
from video_panda_hf.training import (
    BadSampleError,
    VideoPandaDataCollator,
    VideoPandaTrainer,
    VideoPandaTrainingArguments,
    load_conversations,
)


WORDS = ["<pad>", "<s>", "</s>", "<video>", "<row>", "USER", "BOT", "what", "moves", "a", "red", "ball", "why", "wind"]
TEMPLATE = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}USER "
    "{% for part in m['content'] %}{{ '<video>' if part['type'] == 'video' else part['text'] }} {% endfor %}"
    "{% else %}BOT {% generation %}{{ m['content'][0]['text'] }}</s>{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def processor():
    """Words are tokens, their ids their places in WORDS. Videos have 4 frames of 1 × 2 tokens, if they are as wide
    again as high. Saved for generation, i.e. padding on the left."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    tokenizer.add_tokens(["<s>", "</s>"], special_tokens=True)
    return VideoPandaProcessor.from_text_pretrained(
        tokenizer, image_size=16, patch_size=4, num_frames=4, chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    VideoSpec("wide.mp4", "libx264", width=96, height=48, frames=8).write(folder)
    VideoSpec("square.mp4", "libx264", width=64, height=64, frames=8).write(folder)
    whole = (folder / "wide.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return folder


def row(*turns, name="row"):
    """Turns of words by user and assistant in turn; a path among the user's is a video."""

    def content(turn):
        parts = turn if isinstance(turn, tuple) else (turn,)
        return [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "video", "video": str(p)} for p in parts
        ]

    roles = ("user", "assistant")
    return {"id": name, "messages": [{"role": roles[i % 2], "content": content(t)} for i, t in enumerate(turns)]}


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def good(folder, name="good"):
    return row((folder / "wide.mp4", "what moves"), "a ball", name=name)


def bad(folder, name="bad"):
    return row((folder / "cut.mp4", "what moves"), "a ball", name=name)


# What a batch holds


def test_rows_with_pictures_are_trained_on_as_they_are(folder):
    processor = VideoPandaProcessor.from_text_pretrained(chatml_tokenizer(), image_size=28, num_frames=4)
    pictures = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    rows = [
        {"image": "0.png", "messages": [user("<image>What?"), assistant("Red.")]},
        {"messages": [user("What is an <image>?"), assistant("A <row> of pixels.")]},
        {
            "images": ["0.png", "1.png"],
            "video": "square.mp4",
            "messages": [user("<image><video><image>What?"), assistant("Three.")],
        },
    ]
    rows = list(load_conversations(rows, folder))
    batch = VideoPandaDataCollator(processor)(rows)
    assert batch["video_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 2], [4, 2, 2], [1, 2, 2]]
    alone = [processor(images=picture)["pixel_values_videos"] for picture in pictures]
    first, _, _, last = batch["pixel_values_videos"].split([4, 4, 16, 4])
    assert first.equal(alone[0]) and last.equal(alone[1])
    assert (batch["input_ids"] == processor.row_token_id).sum(-1).tolist() == [1, 0, 6]
    learnt = [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert learnt == ["Red.<|im_end|>", "A <row> of pixels.<|im_end|>", "Three.<|im_end|>"]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def test_a_batch_checked_by_hand(processor, folder):
    rows = [
        row((folder / "wide.mp4", "what moves"), "a red ball", "why", "wind"),
        row("what", "a ball"),
    ]
    batch = VideoPandaDataCollator(processor)(rows)
    video = 4 * "<video> <video> <video> <row> "
    #          <s> USER [4 × (context, 2 tokens, <row>)] what moves BOT a red ball </s> USER why BOT wind </s>
    by_hand = [1, 5, *4 * [3, 3, 3, 4], 7, 8, 6, 9, 10, 11, 2, 5, 12, 6, 13, 2]
    assert by_hand == ids(f"<s> USER {video} what moves BOT a red ball </s> USER why BOT wind </s>")
    padding = len(by_hand) - 7
    assert batch["input_ids"].tolist() == [by_hand, [1, 5, 7, 6, 9, 11, 2] + padding * [0]]
    assert batch["attention_mask"].tolist() == [len(by_hand) * [1], 7 * [1] + padding * [0]]
    assert batch["labels"].tolist() == [
        21 * [-100] + [9, 10, 11, 2] + 3 * [-100] + [13, 2],  # every answer and its end
        4 * [-100] + [9, 11, 2] + padding * [-100],
    ]
    assert batch["video_grid_thw"].tolist() == [[4, 2, 4]]
    assert batch["pixel_values_videos"].shape == (4 * 2 * 4, 3 * 4 * 4)
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "pixel_values_videos": torch.float32,
        "video_grid_thw": torch.int64,
    }
    assert processor.tokenizer.padding_side == "left"


def test_the_end_token_is_learned_even_where_it_is_the_padding_token(folder):
    processor = VideoPandaProcessor.from_text_pretrained(chatml_tokenizer(), image_size=28, num_frames=4)
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    batch = VideoPandaDataCollator(processor)([good(folder), row("what", "a"), row("why", "a red red red ball")])
    ends = (batch["labels"] == processor.tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1, 1]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_the_end_token_is_learned_if_the_template_ends_answers_with_it(processor, folder):
    rows = [good(folder), row("what", "a", "why", "wind")]
    expected = VideoPandaDataCollator(processor)(rows)["labels"]
    for end in ("</s>", " </s>"):
        outside = TEMPLATE.replace("</s>{% endgeneration %}", "{% endgeneration %}" + end)
        assert outside != TEMPLATE
        other = VideoPandaProcessor(processor.video_processor, processor.tokenizer, chat_template=outside)
        assert torch.equal(VideoPandaDataCollator(other)(rows)["labels"], expected)


def test_rows_of_any_number_of_videos_are_packed_in_order(processor, folder):
    wide, square = folder / "wide.mp4", folder / "square.mp4"
    rows = [row((wide, square, "what"), "a"), row("why", "wind"), row((square,), "a", (wide, "moves"), "a")]
    batch = VideoPandaDataCollator(processor)(rows)
    assert batch["video_grid_thw"][:, 1:].tolist() == [[2, 4], [4, 4], [4, 4], [2, 4]]
    alone = [VideoPandaDataCollator(processor)([r]) for r in rows]
    assert torch.equal(
        batch["pixel_values_videos"], torch.cat([a["pixel_values_videos"] for a in (alone[0], alone[2])])
    )
    for i, single in enumerate(alone):
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][i, :length], single["input_ids"][0])
        assert torch.equal(batch["labels"][i, :length], single["labels"][0])


def test_text_alone_makes_a_batch_without_videos(processor):
    assert set(VideoPandaDataCollator(processor)([row("what", "a ball")])) == {"input_ids", "attention_mask", "labels"}


def test_settings_go_to_the_video_processor(processor, folder):
    batch = VideoPandaDataCollator(processor, num_frames=8)([good(folder)])
    assert batch["video_grid_thw"].tolist() == [[8, 2, 4]]
    batch = VideoPandaDataCollator(processor, fps=25, max_frames=8)([good(folder)])
    assert batch["video_grid_thw"].tolist() == [[8, 2, 4]]


def test_arrow_and_back_makes_the_same_batch(processor, folder):
    pytest.importorskip("datasets")
    rows = [good(folder), row("what", "a ball"), row((folder / "square.mp4",), "a", "why", "wind")]
    dataset = load_conversations(rows)
    assert set(dataset[0]["messages"][1]["content"][0]) > {"type", "text"}  # Arrow fills in the fields of the others
    from_arrow, from_python = (VideoPandaDataCollator(processor)(list(given)) for given in (dataset, rows))
    assert from_arrow.keys() == from_python.keys()
    assert all(torch.equal(from_arrow[name], from_python[name]) for name in from_python)


def test_part_of_a_video_survives_arrow(processor, folder):
    pytest.importorskip("datasets")
    seen = []
    part = {"type": "video", "video": str(folder / "wide.mp4"), "indices": [7, 7, 7, 7]}
    rows = [{"messages": [{"role": "user", "content": [part]}, row("", "a ball")["messages"][1]]}, good(folder)]
    for given in (load_conversations(rows), rows):
        seen.append(VideoPandaDataCollator(processor)(list(given))["pixel_values_videos"])
    assert torch.equal(*seen)
    assert torch.equal(seen[0][:8], seen[0][8:16]) and not torch.equal(seen[0][:8], seen[0][32:40])


# The length cap


def test_what_stands_after_the_video_is_cut(processor, folder):
    long = row((folder / "wide.mp4", "what moves"), "a red ball", "why", "wind")
    full = VideoPandaDataCollator(processor)([long])
    for max_length in (22, 24, 29, 30, 1000):
        batch = VideoPandaDataCollator(processor, max_length=max_length)([long, row("what", "a ball")])
        length = min(max_length, 30)
        assert torch.equal(batch["input_ids"][:1], full["input_ids"][:, :length])
        assert torch.equal(batch["labels"][:1], full["labels"][:, :length])
        assert torch.equal(batch["pixel_values_videos"], full["pixel_values_videos"])
    batch = VideoPandaDataCollator(processor, max_length=5)([row("what", "a red ball")])
    assert batch["labels"].tolist() == [4 * [-100] + [9]]


def test_a_video_is_never_cut_and_a_label_must_remain(processor, folder):
    long = good(folder, "long one")
    with pytest.raises(BadSampleError, match=r"long one .*wide.mp4.*ends at token 18, over max_length = 17"):
        VideoPandaDataCollator(processor, max_length=17)([long])
    with pytest.raises(BadSampleError, match="no token of an assistant's turn within max_length = 21"):
        VideoPandaDataCollator(processor, max_length=21)([long])
    with pytest.raises(BadSampleError, match=r"no token of an assistant's turn$"):
        VideoPandaDataCollator(processor)([row("what")])
    fits = VideoPandaDataCollator(processor, max_length=17, on_error="skip")([row("what", "a"), long])
    assert fits["input_ids"].tolist() == [ids("<s> USER what BOT a </s>")]
    assert "pixel_values_videos" not in fits


# Bad samples


def test_a_bad_video_raises_an_error_that_names_the_sample(processor, folder):
    with pytest.raises(BadSampleError, match=r"sample bad \(.*cut.mp4\): .*cut.mp4"):
        VideoPandaDataCollator(processor)([good(folder), bad(folder)])


def test_a_skipped_sample_leaves_the_others_as_they_were_and_is_logged(processor, folder, tmp_path):
    log = tmp_path / "skipped.jsonl"
    rows = [good(folder), row("why", "wind")]
    collator = VideoPandaDataCollator(processor, on_error="skip", skip_log=log)
    batch = collator([rows[0], bad(folder), {"messages": 3}, rows[1], row((folder / "none.mp4",), "a", name="gone")])
    expected = VideoPandaDataCollator(processor)(rows)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert (collator.seen, collator.skipped) == (5, 3)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["bad", None, "gone"]
    assert lines[0]["videos"] == [str(folder / "cut.mp4")]
    assert lines[2]["error"].startswith("VideoNotFoundError: ")
    assert lines[2]["seen"] == 5 and lines[2]["skipped"] == 3 and lines[2]["time"]


@pytest.mark.skipif(os.name != "posix", reason="workers need Linux or macOS")
def test_videos_are_decoded_in_a_worker_where_bad_ones_are_skipped(processor, folder, monkeypatch):
    taken = []
    take = isolation._pool.take
    monkeypatch.setattr(isolation._pool, "take", lambda fresh: taken.append(take(fresh)) or taken[-1])
    VideoPandaDataCollator(processor)([good(folder)])
    off = VideoPandaDataCollator(processor, on_error="skip", decode_limits={"isolate": False, "max_side": 4000})
    off([good(folder)])
    assert taken == [] and off.processor_kwargs["decode_limits"].max_side == 4000
    VideoPandaDataCollator(processor, on_error="skip")([good(folder)])
    assert taken
    monkeypatch.setattr(processor.video_processor, "decode_limits", {"isolate": False, "max_side": 4000})
    limits = VideoPandaDataCollator(processor, on_error="skip").processor_kwargs["decode_limits"]
    assert limits.isolate and limits.max_side == 4000  # what a checkpoint saved does not turn it off


def test_a_clean_batch_is_one_call_of_the_processor(processor, folder, monkeypatch):
    calls = []
    original = VideoPandaProcessor.apply_chat_template

    def counted(self, conversation, **kwargs):
        calls.append(len(conversation))
        return original(self, conversation, **kwargs)

    monkeypatch.setattr(VideoPandaProcessor, "apply_chat_template", counted)
    collator = VideoPandaDataCollator(processor, on_error="skip")
    collator([good(folder)] * 4)
    assert calls == [4]
    collator([good(folder), bad(folder)])
    assert calls == [4, 2, 1, 1]


def test_too_many_skipped_samples_end_the_run(processor, folder):
    collator = VideoPandaDataCollator(processor, on_error="skip", max_skipped_share=0.2, min_samples=10)
    for _ in range(2):
        collator([row("what", "a ball"), bad(folder)])  # 2 of 4, but not more than a fifth of 10
    with pytest.raises(BadSampleError, match=r"3 of 6 samples were skipped, over max_skipped_share = 0.2; the last"):
        collator([row("what", "a ball"), bad(folder)])

    patient = VideoPandaDataCollator(processor, on_error="skip", max_skipped_share=0.2, min_samples=10)
    for _ in range(3):
        patient([row("what", "a ball")] * 4 + [bad(folder)])


def test_in_a_batch_of_bad_samples_the_last_good_one_stands_in(processor, folder, tmp_path):
    log = tmp_path / "skipped.jsonl"
    collator = VideoPandaDataCollator(processor, on_error="skip", skip_log=log)
    with pytest.raises(BadSampleError, match="all 1 samples of a batch are bad"):
        collator([bad(folder)])
    expected = collator([row("why", "wind"), good(folder)])
    batch = collator([bad(folder, "b1"), bad(folder, "b2")])
    assert torch.equal(batch["labels"], expected["labels"][1:])
    assert torch.equal(batch["pixel_values_videos"], expected["pixel_values_videos"])
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["id"] == "good" and [name.split()[0] for name in last["stands_in_for"]] == ["b1", "b2"]


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_count_together_and_in_all_epochs(processor, folder, tmp_path, start):
    collator = VideoPandaDataCollator(processor, on_error="skip", skip_log=tmp_path / "new" / "skipped.jsonl")
    rows = [row("what", "a ball"), bad(folder)] * 6  # ten may be bad: one epoch is let through, two are not
    loader = DataLoader(rows, 2, collate_fn=collator, num_workers=2, multiprocessing_context=start)
    assert len(list(loader)) == 6 and (collator.seen, collator.skipped) == (12, 6)
    assert len((tmp_path / "new" / "skipped.jsonl").read_text().splitlines()) == 6
    with pytest.raises(BadSampleError, match=r"were skipped, over max_skipped_share = 0.01"):
        list(loader)


def test_a_row_of_the_dataset_stands_in_where_the_first_batch_is_bad(processor, folder, tmp_path):
    rows = [bad(folder, "b1"), bad(folder, "b2"), good(folder), row("why", "wind")]
    arguments = VideoPandaTrainingArguments(
        tmp_path, per_device_train_batch_size=1, per_device_eval_batch_size=1, use_cpu=True, dataloader_num_workers=2
    )
    collator = VideoPandaDataCollator(processor, on_error="skip")
    trainer = VideoPandaTrainer(
        tiny_model(), arguments, train_dataset=rows, eval_dataset=rows[:1] + rows[3:], data_collator=collator
    )
    expected = {
        name: VideoPandaDataCollator(processor)([rows[i]])["labels"] for name, i in (("train", 2), ("eval", 3))
    }
    training = [batch["labels"] for batch in trainer.get_train_dataloader()]
    assert len(training) == 4 and sum(torch.equal(labels, expected["train"]) for labels in training) >= 2
    evaluation = [batch["labels"] for batch in trainer.get_eval_dataloader()]
    assert len(evaluation) == 2 and all(torch.equal(labels, expected["eval"]) for labels in evaluation)
    assert (collator.seen, collator.skipped) == (6, 3) and trainer.data_collator is collator


def test_without_a_collator_the_trainer_makes_its_own(processor, folder, tmp_path):
    rows = [good(folder), row("what", "a ball")]
    arguments = VideoPandaTrainingArguments(tmp_path, per_device_train_batch_size=2, use_cpu=True)
    trainer = VideoPandaTrainer(tiny_model(), arguments, train_dataset=rows, processing_class=processor)
    (batch,) = trainer.get_train_dataloader()
    order = (
        rows if torch.equal(batch["input_ids"], VideoPandaDataCollator(processor)(rows)["input_ids"]) else rows[::-1]
    )
    expected = VideoPandaDataCollator(processor)(order)
    assert batch.keys() == expected.keys() and (batch["labels"] != -100).any()
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    own = VideoPandaDataCollator(processor, max_length=50)
    assert VideoPandaTrainer(tiny_model(), arguments, own, processing_class=processor).data_collator is own
    given = {"data_collator": own, "processing_class": processor}
    assert VideoPandaTrainer(tiny_model(), arguments, **given).data_collator is own


def test_wrong_arguments_say_so(processor):
    with pytest.raises(ValueError, match="'ignore'"):
        VideoPandaDataCollator(processor, on_error="ignore")


# In a training


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_workers_of_either_kind_skip_and_log(processor, folder, tmp_path, start, workers):
    log = tmp_path / "skipped.jsonl"
    rows = [bad(folder, f"bad {i}") if i in (3, 5) else good(folder, f"good {i}") for i in range(8)]
    collator = VideoPandaDataCollator(processor, on_error="skip", skip_log=log)
    loader = DataLoader(rows, 2, collate_fn=collator, num_workers=workers, multiprocessing_context=start)
    assert [len(batch["input_ids"]) for batch in loader] == [2, 1, 1, 2]
    lines = {line["id"]: line for line in map(json.loads, log.read_text().splitlines())}
    assert lines.keys() == {"bad 3", "bad 5"} and all(1 <= line["skipped"] <= 2 for line in lines.values())
    assert lines["bad 3"]["worker"] == workers - 1 and (collator.seen, collator.skipped) == (8, 2)


def test_a_bad_sample_in_a_worker_raises_in_the_training(processor, folder):
    loader = DataLoader([bad(folder)], collate_fn=VideoPandaDataCollator(processor), num_workers=1)
    with pytest.raises(BadSampleError, match=r"sample bad \(.*cut.mp4\)"):
        next(iter(loader))


def test_a_stream_in_workers(processor, folder):
    datasets = pytest.importorskip("datasets")
    files = []
    for i in range(2):
        files.append(folder / f"{i}.jsonl")
        files[-1].write_text("\n".join(json.dumps(good(folder)) for _ in range(3)), encoding="utf-8")
    stream = load_conversations(files, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    loader = DataLoader(stream, 2, collate_fn=VideoPandaDataCollator(processor), num_workers=2)
    assert sorted(len(batch["input_ids"]) for batch in loader) == [1, 1, 2, 2]


def test_it_is_pickled_with_its_counts(processor, folder):
    collator = VideoPandaDataCollator(processor, on_error="skip", num_frames=8)
    collator([good(folder), bad(folder)])
    again = pickle.loads(pickle.dumps(collator))
    assert (again.seen, again.skipped, again.processor_kwargs["num_frames"]) == (2, 1, 8)
    assert again.processor_kwargs == collator.processor_kwargs
    list(DataLoader([good(folder), bad(folder)], 2, collate_fn=again, num_workers=1))
    assert (again.seen, again.skipped, collator.seen) == (4, 2, 2)
    assert torch.equal(again([good(folder)])["input_ids"], collator([good(folder)])["input_ids"])


def tiny_model():
    torch.manual_seed(0)
    return VideoPandaForConditionalGeneration(tiny_config(patch_size=4, dropout=0.0))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_plain_trainer_takes_the_dataset_and_the_collator(processor, folder, tmp_path, streaming):
    pytest.importorskip("datasets")
    rows = [good(folder), row("what", "a ball"), bad(folder), row((folder / "square.mp4", "why"), "wind")] * 2
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # else a stream's batches are sliced, and pixels are packed
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = VideoPandaDataCollator(processor, on_error="skip")
    trainer = Trainer(
        tiny_model(), arguments, train_dataset=load_conversations(data, streaming=streaming), data_collator=collator
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and np.isfinite(losses).all() and losses[0] != losses[1]
    assert collator.skipped == 2


def test_trl_takes_the_dataset_and_the_collator(processor, folder, tmp_path):
    """TRL looks at a dataset's column `images` alone to tell that it is more than text: hence `skip_prepare_dataset`,
    without which it would tokenize the rows itself and leave their videos out."""
    trl = pytest.importorskip("trl")
    rows = [good(folder), row("what", "a ball"), row((folder / "square.mp4", "why"), "wind")]
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    collator = VideoPandaDataCollator(processor)
    with torch.no_grad():
        expected = tiny_model()(**collator(rows)).loss.item()
    trainer = trl.SFTTrainer(
        tiny_model(),
        arguments,
        train_dataset=load_conversations(rows),
        data_collator=collator,
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-4) and losses[1] < losses[0]
