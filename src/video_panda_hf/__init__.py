"""Video-Panda, the encoder-free video-language model, for Hugging Face `transformers`."""

from .version import __version__


__all__ = ["__version__"]
