"""The plugin where vLLM is absent: nothing imports it, and what vLLM is told. A stand-in takes vLLM's place."""

import ast
import configparser
import re
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest

import video_panda_hf
from video_panda_hf.serving.vllm import register


SOURCES = Path(video_panda_hf.__file__).parents[1]
PLUGIN = SOURCES / "video_panda_hf" / "serving" / "vllm"


def imported_by(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_only_the_plugin_imports_vllm_and_nothing_imports_the_plugin():
    for file in SOURCES.glob("video_panda_*/**/*.py"):
        names = set(imported_by(ast.walk(ast.parse(file.read_text(encoding="utf-8")))))
        assert PLUGIN in file.parents or not any(name.split(".")[0] == "vllm" for name in names), file
        assert not any(name.startswith("video_panda_hf.serving.vllm") for name in names), file
    entered = ast.parse((PLUGIN / "__init__.py").read_text(encoding="utf-8")).body
    assert not list(imported_by(entered))  # `register` alone imports it


class Registry:
    def __init__(self):
        self.classes = {}

    def get_supported_archs(self):
        return self.classes.keys()

    def register_model(self, architecture, where):
        assert architecture not in self.classes
        self.classes[architecture] = where


def test_vllm_is_told_where_the_class_is_once_in_each_process(monkeypatch):
    stand_in = types.ModuleType("vllm")
    stand_in.ModelRegistry = Registry()
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    register()
    register()  # vLLM may call it again
    (architecture,) = video_panda_hf.VideoPandaConfig.from_pretrained(video_panda_hf.SHIPPED_MODEL).architectures
    assert stand_in.ModelRegistry.classes == {architecture: f"video_panda_hf.serving.vllm.model:{architecture}"}
    classes = [node.name for node in ast.parse((PLUGIN / "model.py").read_text()).body if type(node) is ast.ClassDef]
    assert architecture in classes


def test_the_entry_point_that_vllm_looks_for_is_the_function():
    parsed = configparser.ConfigParser()
    parsed.read(Path(__file__).parents[2] / "setup.cfg", encoding="utf-8")  # the package may be installed elsewhere
    name, _, where = parsed["options.entry_points"]["vllm.general_plugins"].strip().partition(" = ")
    module, _, function = where.partition(":")
    assert name == "video_panda" and getattr(import_module(module), function) is register


@pytest.mark.parametrize(("version", "is_tested"), [("0.31.9", False), ("0.32.0+cpu", True), ("0.99.1", False)])
def test_another_release_of_vllm_is_named_in_the_error(version, is_tested, monkeypatch):
    stand_in = types.ModuleType("vllm")
    stand_in.__version__ = version
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    for name in ("model", "tested"):
        monkeypatch.delitem(sys.modules, f"video_panda_hf.serving.vllm.{name}", raising=False)
    if is_tested:
        import_module("video_panda_hf.serving.vllm.tested")
        return
    with pytest.raises(ImportError, match=rf"not {re.escape(version)}: `pip install 'vllm>=0\.32,<0\.34'`"):
        import_module("video_panda_hf.serving.vllm.model")
