"""What ships with the package: a small model of moving shapes and clips for it. `examples/` has how they were made."""

from pathlib import Path


SHIPPED_MODEL = Path(__file__).parent / "moving-shapes"
SHIPPED_CLIPS = Path(__file__).parent / "clips"
