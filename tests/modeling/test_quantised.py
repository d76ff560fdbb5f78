"""Quantised loading: the LLM in few bits, STAB and projector in full precision without being named."""

import importlib.metadata

import pytest
import torch
from packaging.version import Version
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
)

from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL


PROJECTION = "model.language_model.layers.0.mlp.up_proj.weight"


def int8_torchao():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def int8_quanto():
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    return QuantoConfig(weights="int8")


def nf4_bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
quantisers = pytest.mark.parametrize(
    "quantiser", [int8_torchao, int8_quanto, pytest.param(nf4_bitsandbytes, marks=on_gpu)], ids=lambda q: q.__name__
)


def load(**options):
    return AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL, **options).eval()


def answers(model) -> list[str]:
    """What the model says of the shipped clips."""
    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    question = {"type": "text", "text": "Describe the video."}
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "video", "path": str(clip)}, question]}] for clip in clips()],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def clips():
    return sorted(SHIPPED_CLIPS.glob("*.mp4"))


def stab_and_projector(model) -> dict[str, torch.Tensor]:
    """The parameters that are not the LLM's, by the names that they have in `VideoPandaModel`."""
    parameters = {name.removeprefix("model."): value for name, value in model.named_parameters()}
    return {k: v for k, v in parameters.items() if k.startswith(("vision_tower.", "multi_modal_projector."))}


def assert_same_bits(model, expected):
    ours, theirs = stab_and_projector(model), stab_and_projector(expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert type(value) is torch.nn.Parameter and type(value.data) is torch.Tensor, name
        assert torch.equal(value.cpu(), theirs[name]), name


@quantisers
def test_only_the_llm_is_quantised_and_answers_stay(quantiser):
    quantised, full = load(quantization_config=quantiser()), load()
    projection = quantised.get_parameter(PROJECTION)
    assert (type(projection), type(projection.data)) != (torch.nn.Parameter, torch.Tensor)
    assert_same_bits(quantised, full)
    assert answers(quantised) == answers(full)


def test_without_its_lm_head_it_is_quantised_alike():
    quantised = AutoModel.from_pretrained(SHIPPED_MODEL, quantization_config=int8_torchao())
    assert type(quantised.get_parameter(PROJECTION.removeprefix("model.")).data) is not torch.Tensor
    assert_same_bits(quantised, load())


def test_a_quantised_model_is_saved_and_loaded_as_it_is(tmp_path):
    quantised = load(quantization_config=int8_torchao())
    if Version(importlib.metadata.version("torchao")) < Version("0.17"):
        pytest.skip("torchao writes 8-bit weights to safetensors since 0.17, which needs a newer torch than 2.6")
    quantised.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    ids = torch.arange(5, 40)[None]
    assert torch.equal(again(ids).logits, quantised(ids).logits)
    assert_same_bits(again, load())


def test_in_float16_the_quantised_models_stab_stays_in_float32():
    quantised = load(quantization_config=int8_torchao(), dtype="float16")
    assert {value.dtype for value in stab_and_projector(quantised).values()} == {torch.float32}
    assert quantised.lm_head.weight.dtype == torch.float16
    assert answers(quantised) == answers(load())


def test_without_a_quantiser_float16_means_all_of_it():
    assert {value.dtype for value in load(dtype="float16").parameters()} == {torch.float16}
