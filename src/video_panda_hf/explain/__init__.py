"""What the model looked at, as maps on the frames, and what it answers with a part of it taken out."""

from .ablation import PARTS, answers_without, without
from .answers import METHODS
from .explanation import Explanation, explain


__all__ = ["METHODS", "PARTS", "Explanation", "answers_without", "explain", "without"]
