"""No deprecated name of transformers is used: neither what it warns of, nor what it only logs."""

import warnings

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from helpers.deprecations import nothing_deprecated
from helpers.tiny_models import CACHE_NAME, tiny_batch, tiny_model
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_generating(how):
    model, batch = tiny_model(), tiny_batch([[(4, 4, 8)]])
    with nothing_deprecated():
        model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True, **how)


def test_continuing_from_a_cache():
    model, batch = tiny_model(), tiny_batch([[(4, 4, 8)]])
    with nothing_deprecated():
        cache = model(**batch, use_cache=True)[CACHE_NAME]
        assert cache.get_seq_length() == batch["input_ids"].shape[1]
        model(batch["input_ids"][:, :1], **{CACHE_NAME: cache})


def test_a_step_of_training():
    model, batch = tiny_model().train(), tiny_batch([[(4, 4, 8)], []])
    with nothing_deprecated():
        output = model(**batch, labels=batch["input_ids"], output_hidden_states=True, output_attentions=True)
        output.loss.backward()
        output.to_tuple()


def test_saving_and_loading(tmp_path):
    with nothing_deprecated():
        tiny_model().save_pretrained(tmp_path)
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_the_processor(tmp_path):
    clip = str(sorted(SHIPPED_CLIPS.glob("*.mp4"))[0])
    content = [{"type": "video", "video": clip}, {"type": "text", "text": "What is it?"}]
    with nothing_deprecated():
        processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        processor(text=["<video> What is it?"], videos=[clip], return_tensors="pt")
        processor.decode(inputs["input_ids"][0])
        processor.save_pretrained(tmp_path)
        AutoProcessor.from_pretrained(tmp_path)


def test_both_ways_of_saying_it_are_heard_every_time():
    def warn():
        warnings.warn("`old` is deprecated", FutureWarning, stacklevel=2)

    def log():
        logging.get_logger("transformers.models").warning_once("`old` is deprecated")

    for say in (warn, log, warn, log):
        with pytest.raises(AssertionError, match="`old` is deprecated"), nothing_deprecated():
            say()
