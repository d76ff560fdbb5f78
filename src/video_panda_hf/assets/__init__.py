"""The small model and the clips that ship with the package. `examples/moving_shapes` creates them."""

from pathlib import Path


SHIPPED_MODEL = Path(__file__).parent / "moving-shapes"
SHIPPED_CLIPS = Path(__file__).parent / "clips"
