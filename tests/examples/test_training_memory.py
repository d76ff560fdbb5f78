"""The arithmetic of memory in docs/training.md: against a count by hand for a tiny model, and the page's table."""

import re
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from training_memory import RECIPES, memory, table


ROOT = Path(__file__).parents[2]
LAYERS = 8
TINY = LlamaConfig(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4
)
LINEARS = LAYERS * (4 * 64 * 64 + 3 * 64 * 96)  # weights of the language model's layers
OTHERS = 2 * 100 * 64 + (2 * LAYERS + 1) * 64  # embeddings, head, norms
STAB = 24_085_842  # of the released size, counted by hand too
PROJECTOR = 1024 * 64 + 64 + 64 * 64 + 64
HEAD = 3 * (2 * 64 + 64 * 1024) + 64 * 1024 + 1024 + 1024 * 1024 + 1024  # of distillation, for layers 8, 4 and 0


def adapters(rank: int) -> int:
    return LAYERS * rank * (4 * 2 * 64 + 3 * (64 + 96))


# STAB and projector are kept a second time where PEFT trains them, as they were.
BYTES = {
    "stage1": 16 * (STAB + PROJECTOR + HEAD) + 4 * (LINEARS + OTHERS),
    "stage3": 16 * (STAB + PROJECTOR + HEAD + LINEARS + OTHERS),
    "full_1b": 16 * (STAB + PROJECTOR + LINEARS + OTHERS),
    "lora": (16 + 4) * (STAB + PROJECTOR) + 16 * adapters(64) + 2 * (LINEARS + OTHERS),
    "qlora": (16 + 4) * (STAB + PROJECTOR) + 16 * adapters(64) + 0.5625 * LINEARS + 4 * OTHERS,
}


@pytest.mark.parametrize("recipe", BYTES)
def test_memory_is_a_count_by_hand(recipe):
    if "lora" in recipe:
        pytest.importorskip("peft")
    whole, teacher = memory(recipe, TINY)
    assert whole - teacher == pytest.approx(BYTES[recipe], rel=1e-6)
    assert (teacher > 0) == recipe.startswith("stage")


def test_each_recipe_has_a_row():
    assert set(RECIPES) == {file.stem for file in (ROOT / "examples" / "recipes").iterdir()}


@pytest.mark.slow
def test_the_page_has_the_table():
    pytest.importorskip("peft")
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert re.search(r"<!-- memory -->\n((?:\|.*\n)+)", page)[1].strip() == table()
