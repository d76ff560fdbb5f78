"""Chat templates that take videos: our own, and those of language models."""

from pathlib import Path


def template_with_videos(template: str | dict | None) -> str | dict:
    """An LLM's chat template (or its named templates), for messages whose content is a list with videos."""
    if isinstance(template, dict):
        return {name: template_with_videos(text) for name, text in template.items()}
    return read_template("vicuna") if template is None else read_template("flatten") + template


def read_template(name: str) -> str:
    """A file of `chat_templates`, after the macro that all of them use."""
    folder = Path(__file__).parent / "chat_templates"
    return "".join((folder / f"{stem}.jinja").read_text(encoding="utf-8") for stem in ("content_to_text", name))
