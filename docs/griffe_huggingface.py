"""For mkdocs.yml: docstrings in transformers' dialect, as mkdocstrings reads them.

``size (`int`, *optional*, defaults to 4):`` becomes `size (int, optional, defaults to 4):`, and a reference such as
[`~VideoPandaModel.forward`] the name alone. Needs griffe, which comes with mkdocstrings.
"""

import re

import griffe


ARGUMENT = re.compile(r"^( +[\w, ]+ \()(`.*)(\):)$", re.MULTILINE)
REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")


class HuggingFaceDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            text = ARGUMENT.sub(lambda found: found[1] + re.sub("[`*]", "", found[2]) + found[3], obj.docstring.value)
            obj.docstring.value = REFERENCE.sub(r"`\1`", text)
