"""Each block of STAB can be left out: the learned branch goes, what it was added to stays, nothing else changes."""

import copy

import numpy as np
import pytest
import torch

from helpers.textbook_stab import VIDEOS, fast, small_model, small_videos, textbook
from helpers.tiny_tokenizers import llama_tokenizer
from video_panda_hf import VideoPandaConfig, VideoPandaForConditionalGeneration, VideoPandaProcessor


BLOCKS = ["use_lste", "use_gstra", "use_fsra", "use_lsd", "use_row_tokens"]
# The last linear maps of each block's learned branch: with zeros there, the full model computes what one without does.
LAST = {
    "use_lste": ["lste.expand.", "dpe."],
    "use_gstra": ["gstra.attention.output.", "gstra.mlp_out."],
    "use_fsra": ["fsra.attention.output."],
    "use_lsd": ["lsd.attention.output."],
    "use_row_tokens": [],
}


def without(*blocks: str, pad_to_square: bool = True):
    """A float64 model without these blocks, and the full one of these weights, but zeros where they end."""
    full = small_model(pad_to_square)
    with torch.no_grad():
        for name, parameter in full.model.vision_tower.named_parameters():
            if any(name.startswith(last) for block in blocks for last in LAST[block]):
                parameter.zero_()
    config = copy.deepcopy(full.config)
    for block in blocks:
        setattr(config.vision_config, block, False)
    model = VideoPandaForConditionalGeneration(config).double().eval()
    missing = model.load_state_dict(full.state_dict(), strict=False).missing_keys
    assert not missing
    return model, full


def is_row() -> list[torch.Tensor]:
    """Of each video's tokens in the full model, which are ROW."""
    return [torch.tensor(([False] + ([False] * (w // 2) + [True]) * (h // 2)) * t) for t, h, w in VIDEOS]


@pytest.mark.parametrize("pad_to_square", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_without_a_block_its_residual_stays(block, pad_to_square):
    model, full = without(block, pad_to_square=pad_to_square)
    expected = textbook(full, small_videos())
    if block == "use_row_tokens":
        expected = [tokens[~row] for tokens, row in zip(expected, is_row(), strict=True)]
    for got, tokens in zip(fast(model, small_videos()), expected, strict=True):
        torch.testing.assert_close(got, tokens, rtol=0, atol=1e-10)


@pytest.mark.parametrize("blocks", [*([block] for block in BLOCKS), BLOCKS], ids=str)
def test_no_parameter_is_left_that_no_gradient_reaches(blocks):
    model, full = without(*blocks)
    assert len(list(model.parameters())) < len(list(full.parameters()))
    model.train()
    sum(tokens.sum() for tokens in fast(model, small_videos())).backward()
    trained = [*model.model.vision_tower.named_parameters(), *model.model.multi_modal_projector.named_parameters()]
    assert [name for name, parameter in trained if parameter.grad is None] == []


def test_attentions_are_those_of_the_blocks_that_are_there():
    model, _ = without("use_lsd", "use_gstra")
    pixels, grids = torch.rand(4 * 6 * 4, 12, dtype=torch.float64), torch.tensor([[4, 6, 4]])
    attentions = model.model.vision_tower(pixels, grids, output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(4, 4, 6)]  # FSRA: frames, heads, tokens


@pytest.fixture(scope="module")
def processor():
    return VideoPandaProcessor.from_text_pretrained(llama_tokenizer(), 12, 2, use_row_tokens=False)


def test_the_processor_lays_out_prompts_without_row_and_remembers_it(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for each in (processor, VideoPandaProcessor.from_pretrained(tmp_path)):
        inputs = each(text="<video>", videos=np.zeros((8, 12, 8, 3), np.uint8), return_tensors="pt")
        assert inputs["video_grid_thw"].tolist() == [[8, 6, 4]]
        assert (inputs["input_ids"] == each.video_token_id).sum() == 8 * (1 + 3 * 2)
        assert (inputs["input_ids"] == each.row_token_id).sum() == 0


@pytest.mark.parametrize("model_has_rows", [True, False])
def test_prompts_fit_a_model_with_the_same_setting_only(processor, model_has_rows):
    vision = {"hidden_size": 16, "patch_size": 2, "image_size": 12, "use_row_tokens": model_has_rows}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = VideoPandaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), **text},
        video_token_id=processor.video_token_id,
        row_token_id=processor.row_token_id,
    )
    model = VideoPandaForConditionalGeneration(config).eval()
    inputs = processor(text="<video>", videos=np.zeros((8, 12, 8, 3), np.uint8), return_tensors="pt")
    if model_has_rows:
        with pytest.raises(ValueError, match="placeholder"):
            model(**inputs)
    else:
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
