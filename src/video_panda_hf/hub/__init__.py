"""Uploads a checkpoint to the Hub in one commit, with its code and a model card.

`push_folder`, the command `video-panda push`, checks a checkpoint on disk and uploads it. The `push_to_hub` methods of
a model and of `Trainer` are transformers' own.
"""

from .card import CARD, HTTP_ERRORS, ModelFacts, written
from .code import add_code, register_code, remove_code
from .push import check_folder, push_folder


__all__ = [
    "CARD",
    "HTTP_ERRORS",
    "ModelFacts",
    "add_code",
    "check_folder",
    "push_folder",
    "register_code",
    "remove_code",
    "written",
]
