"""The README's blocks of code."""

import re
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[2]


README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def block(mark: str) -> str:
    """The first fenced block after a mark."""
    found = re.search(rf"<!-- {mark} -->.*?```\w*\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no block after <!-- {mark} -->"
    return found[1]
