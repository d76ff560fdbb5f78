"""Chat templates with videos, and the tokenizers of new models."""

import copy
import re
from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase


ROLES = ["system", "user", "assistant"]
OTHER_ROLES = ["developer", "tool", "tool_response", "function", "ipython", "observation", "environment", "context"]
OTHER_ROLES += ["document", "documents", "available_tools", "model"]


def for_videos(
    tokenizer_or_path, tokens: list[str], gguf_file: str | None = None
) -> tuple[PreTrainedTokenizerBase, str | dict]:
    """
    The tokenizer of a new model around a causal LM, and its chat template.

    Args:
        tokenizer_or_path (`str`, `Path` or `PreTrainedTokenizerBase`):
            Folder or Hub id of the LLM, or its tokenizer, which is copied.
        tokens (`list[str]`):
            The special tokens to add.
        gguf_file (`str`, *optional*):
            The file in the folder or repository, if the LLM is there as GGUF.

    Returns:
        `tuple`: The tokenizer, which pads on the left and has no chat template, and the LLM's template for messages
        with videos, or `CHAT_TEMPLATE`.

    Raises:
        ValueError: if the tokenizer has neither a padding nor an end-of-sequence token.
    """
    if isinstance(tokenizer_or_path, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_or_path, gguf_file=gguf_file)
    else:
        tokenizer = copy.deepcopy(tokenizer_or_path)
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the latter is what is saved
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a padding nor an end-of-sequence token: set `pad_token`")
        tokenizer.pad_token = tokenizer.eos_token
    template = with_videos(tokenizer.chat_template)
    tokenizer.chat_template = None  # it would say nothing of videos
    return tokenizer, template


def with_videos(template: str | dict | None) -> str | dict:
    """An LLM's chat template (or its named templates), for messages whose content is a list with videos. A role that
    the template does not name is an error."""
    if isinstance(template, dict):
        return {name: with_videos(text) for name, text in template.items()}
    if template is None:
        return read_template("vicuna")
    named = re.findall(r"""(["'])([a-z_]+)\1""", template)
    roles = [*ROLES, *(role for role in OTHER_ROLES if role in {name for _, name in named})]
    return read_template("flatten").replace("KNOWN_ROLES", str(roles)) + template


def read_template(name: str) -> str:
    """A file of `chat_templates`, after the macro that all of them use."""
    files = [Path(__file__).parent / "chat_templates" / f"{stem}.jinja" for stem in ("content_to_text", name)]
    return "".join(file.read_text(encoding="utf-8") for file in files)
