"""What `src` leans on in other packages without a promise is in `docs/upstream.md`, and nothing more is there."""

import ast
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import video_panda_hf


SOURCES = Path(video_panda_hf.__file__).parent
PAGE = (SOURCES.parent.parent / "docs" / "upstream.md").read_text(encoding="utf-8")
PACKAGES = ("accelerate", "av", "datasets", "fastapi", "huggingface_hub", "peft", "pydantic", "safetensors")
PACKAGES += ("starlette", "torchvision", "transformers", "uvicorn")
MOST_PRIVATE_OVERRIDES = 5
# Modules that the reference of their package names.
DOCUMENTED = {
    "accelerate.utils",
    "av.container",
    "av.video.stream",
    "fastapi.exceptions",
    "fastapi.middleware.cors",
    "fastapi.responses",
    "huggingface_hub.errors",
    "huggingface_hub.utils",
    "safetensors.torch",
    "starlette.requests",
    "torchvision.transforms.v2",
    "transformers.modeling_outputs",
    "transformers.utils",
}


def section(title: str) -> set[str]:
    """What stands in code in the first column of the tables under a heading of the page."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert text, f"docs/upstream.md has no section {title}"
    return {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}


def our_classes():
    for module in pkgutil.walk_packages([str(SOURCES)], "video_panda_hf."):
        if module.name.startswith("video_panda_hf.serving") and importlib.util.find_spec("fastapi") is None:
            continue
        if module.name.startswith(("video_panda_hf.serving.vllm.", "video_panda_hf.evaluation.lmms.")):
            continue  # needs vllm or lmms-eval
        for item in vars(importlib.import_module(module.name)).values():
            if isinstance(item, type) and item.__module__ == module.name:
                yield item


def private_members_of_bases(is_wanted) -> set[str]:
    """`_names` that a class of ours sets and a base class of another package has too."""
    return {
        name
        for cls in our_classes()
        for name, value in vars(cls).items()
        if re.match(r"_[a-z]", name) and name != "_abc_impl" and is_wanted(value)  # which Python sets
        for base in cls.__mro__[1:]
        if base.__module__.split(".")[0] in PACKAGES and name in vars(base)
    }


def trees():
    for file in SOURCES.parent.glob("video_panda_*/**/*.py"):
        yield ast.parse(file.read_text(encoding="utf-8"))


def test_private_methods_that_we_override_are_listed():
    found = private_members_of_bases(callable)
    assert found == section("Private methods that we override")
    assert len(found) <= MOST_PRIVATE_OVERRIDES


def test_private_settings_of_classes_are_listed():
    assert private_members_of_bases(lambda value: not callable(value)) == section("Private settings of classes")


def imports_from_inner_modules(packages) -> set[str]:
    return {
        f"{node.module}.{name.name}"
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and "." in (node.module or "")
        for name in node.names
        if node.module.split(".")[0] in packages and node.module not in DOCUMENTED
    }


def test_inner_modules_that_we_import_from_are_listed():
    assert imports_from_inner_modules(PACKAGES) == section("Imports from inner modules")


def test_what_the_plugin_uses_of_vllm_is_listed():
    assert imports_from_inner_modules(["vllm"]) == section("vLLM")


def test_what_the_plugin_uses_of_lmms_eval_is_listed():
    assert imports_from_inner_modules(["lmms_eval"]) == section("lmms-eval")


def test_private_attributes_that_we_touch_are_listed():
    defined, touched = set(), set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                defined.add(node.attr)
    for tree in trees():
        touched |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and node.attr not in defined
        }
    touched -= {"_exit"}  # of `os`, whose reference has it
    assert touched == section("Private attributes that we touch")


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_every_row_names_a_test_that_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    rows = re.findall(r"^\| `.*$", PAGE, re.MULTILINE)
    assert len(named) >= len(rows)
    for file, test in named:
        text = (SOURCES.parent.parent / file).read_text(encoding="utf-8")
        assert re.search(rf"(def|class) {test}\b", text), f"{file} has no {test}"
