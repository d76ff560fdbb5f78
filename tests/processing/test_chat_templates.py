"""Every chat template that is written or shipped here: only answers are learnt, and roles are known."""

import ast
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from helpers.tiny_tokenizers import CHATML_TEMPLATE, chatml_tokenizer, llama_tokenizer
from video_panda_hf import SHIPPED_MODEL, VideoPandaProcessor
from video_panda_hf.processing.templates import with_videos
from video_panda_hf.training import VideoPandaDataCollator


TRAIN_SCRIPT = Path(__file__).parents[2] / "examples" / "moving_shapes" / "train.py"


def template_of_the_train_script() -> str:
    (found,) = [
        node.value.value
        for node in ast.parse(TRAIN_SCRIPT.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CHAT_TEMPLATE"
    ]
    return found


def shipped() -> VideoPandaProcessor:
    return AutoProcessor.from_pretrained(SHIPPED_MODEL)


def of_the_train_script() -> VideoPandaProcessor:
    processor = shipped()
    processor.chat_template = with_videos(template_of_the_train_script())
    return processor


def vicuna() -> VideoPandaProcessor:
    return VideoPandaProcessor.from_text_pretrained(llama_tokenizer())


def flattened() -> VideoPandaProcessor:
    return VideoPandaProcessor.from_text_pretrained(chatml_tokenizer(CHATML_TEMPLATE))


every_template = pytest.mark.parametrize("make", [vicuna, flattened, shipped, of_the_train_script])
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Which shape?"}]},
    {"role": "assistant", "content": "A ball."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "A cube."},
]


@every_template
def test_no_system_or_user_text_is_ever_labelled(make):
    processor = make()
    inputs = processor.apply_chat_template(
        CONVERSATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    batch = VideoPandaDataCollator(processor)([{"messages": CONVERSATION}])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert ids.tolist() == inputs["input_ids"][0]
    assert (labels != -100).tolist() == [bool(is_answer) for is_answer in inputs["assistant_masks"][0]]
    end = processor.tokenizer.eos_token
    learnt = processor.tokenizer.decode(labels[labels != -100])
    assert learnt.replace(f"{end} ", end).strip() == f"A ball.{end}A cube.{end}"
    unlearnt = processor.tokenizer.decode(ids[labels == -100])
    assert all(text in unlearnt for text in ("Be brief.", "Which shape?", "And now?"))
    assert torch.equal(labels[labels != -100], ids[labels != -100])


@every_template
def test_a_system_message_comes_first_and_is_no_answer(make):
    prompt = make().apply_chat_template(CONVERSATION[:2], add_generation_prompt=True)
    before, _, after = prompt.partition("Be brief.")
    assert "ASSISTANT" not in before and "assistant" not in before and "Which shape?" in after
    assert "A chat between" not in prompt  # the system message stands in place of the default one


@every_template
def test_an_unknown_role_is_an_error_that_names_it(make):
    with pytest.raises(Exception, match="role banana"):
        make().apply_chat_template([{"role": "user", "content": "Q"}, {"role": "banana", "content": "A"}])


def test_a_role_that_the_llms_own_template_names_is_known():
    message = [{"role": "tool", "content": "42"}]
    with pytest.raises(Exception, match="role tool: there are system, user, assistant"):
        flattened().apply_chat_template(message)
    template = "{% for m in messages %}{% if m.role == 'tool' %}<tool>{{ m.content }}{% endif %}{% endfor %}"
    processor = VideoPandaProcessor.from_text_pretrained(chatml_tokenizer(template))
    assert processor.apply_chat_template(message) == "<tool>42"


def test_the_shipped_template_is_that_of_its_training_script():
    assert shipped().chat_template == of_the_train_script().chat_template
    assert shipped().apply_chat_template(CONVERSATION[:2], add_generation_prompt=True) == (
        "<s>Be brief. USER: Which shape? ASSISTANT:"
    )
