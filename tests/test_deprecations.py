"""No deprecated name of transformers is used: neither what it warns of, nor what it only logs."""

import contextlib
import inspect
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

import video_panda_hf
from tiny_models import CACHE_NAME, tiny_batch, tiny_model
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.modeling import modeling_video_panda


PACKAGE = Path(video_panda_hf.__file__).parent
MODULE = Path(inspect.getfile(torch.nn.Module))
DEPRECATED = re.compile(r"deprecat|will be removed|no longer supported", re.IGNORECASE)


@contextlib.contextmanager
def deprecations():
    """
    A list that has, after the block, what was said in it of deprecated names: by warnings that name a line of our
    package, of transformers or of torch's `Module.__call__`, which calls every `forward`, and by transformers' log.
    """
    said, logged = [], []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger, verbosity = logging.getLogger("transformers"), transformers_logging.get_verbosity()
    transformers_logging.warning_once.cache_clear()  # an earlier test may have been told already
    transformers_logging.set_verbosity_warning()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
    finally:
        logger.removeHandler(handler)
        transformers_logging.set_verbosity(verbosity)
    for warning in caught:
        path = Path(warning.filename)
        is_concerned = PACKAGE in path.parents or "transformers" in path.parts or path == MODULE
        if is_concerned and issubclass(warning.category, (FutureWarning, DeprecationWarning)):
            said.append(f"{path.name}:{warning.lineno}: {warning.message}")
    said += [message for message in logged if DEPRECATED.search(message)]


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
    with deprecations() as said:
        model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True, **how)
    assert not said


def test_continuing_from_a_cache():
    model, batch = tiny_model(), tiny_batch([[(4, 4, 8)]])
    with deprecations() as said:
        cache = model(**batch, use_cache=True)[CACHE_NAME]
        assert cache.get_seq_length() == batch["input_ids"].shape[1]
        model(batch["input_ids"][:, :1], **{CACHE_NAME: cache})
    assert not said


def test_a_step_of_training():
    model, batch = tiny_model().train(), tiny_batch([[(4, 4, 8)], []])
    with deprecations() as said:
        output = model(**batch, labels=batch["input_ids"], output_hidden_states=True, output_attentions=True)
        output.loss.backward()
        output.to_tuple()
    assert not said


def test_saving_and_loading(tmp_path):
    with deprecations() as said:
        tiny_model().save_pretrained(tmp_path)
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not said


def test_the_processor(tmp_path):
    clip = str(sorted(SHIPPED_CLIPS.glob("*.mp4"))[0])
    content = [{"type": "video", "video": clip}, {"type": "text", "text": "What is it?"}]
    with deprecations() as said:
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
    assert not said


def test_both_ways_of_saying_it_are_heard_every_time():
    for _ in range(2):
        with deprecations() as said:
            warnings.warn_explicit("`old` goes", FutureWarning, modeling_video_panda.__file__, 1)
            warnings.warn_explicit("not of ours", FutureWarning, "/elsewhere.py", 1)
            transformers_logging.get_logger("transformers.models").warning_once("`old` is deprecated.")
        assert said == ["modeling_video_panda.py:1: `old` goes", "`old` is deprecated."]
