"""The model in a browser, by Gradio (extra `demo`)."""

from .app import build_demo
from .talk import DECODE_LIMITS


__all__ = ["DECODE_LIMITS", "build_demo"]
