"""What `[tool.importlinter]` in pyproject.toml cannot say of imports, and the tools that check them."""

import ast
import configparser
import re
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "video_panda_hf"
FOLDERS = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
MODULES = {file.stem for file in PACKAGE.glob("*.py")}
PINNED = {"ruff", "import-linter", "mypy"}


def imports(file: Path):
    """(module, name) of each `from module import name` in a file, and (module, None) of each `import module`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_no_folder_imports_from_the_package_that_imports_it(folder):
    for file in (PACKAGE / folder).rglob("*.py"):
        for module, name in imports(file):
            assert module != "video_panda_hf" or name in FOLDERS | MODULES, f"{file}: {name} of video_panda_hf"


def test_a_folder_reaches_its_neighbours_by_the_name_of_the_package():
    for file in PACKAGE.glob("*/*.py"):
        assert not any(module.startswith("..") for module, _ in imports(file)), file


def test_no_test_module_imports_another():
    tests = list((REPOSITORY / "tests").rglob("test_*.py"))
    names = {file.stem for file in tests}
    for file in tests:
        for module, name in imports(file):
            assert not names & {*module.split("."), name}, f"{file} imports {module}"


def test_the_name_of_a_test_has_at_most_70_characters():
    for file in (REPOSITORY / "tests").rglob("*.py"):
        names = [node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if hasattr(node, "name")]
        assert not [name for name in names if name and name.startswith("test_") and len(name) > 70], file


def test_linters_are_pinned_where_ci_and_pre_commit_look():
    parsed = configparser.ConfigParser()
    parsed.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    extras = "\n".join(parsed["options.extras_require"].values())
    versions = dict(re.findall(r"^([\w-]+)==([\d.]+)$", extras, re.MULTILINE))
    assert versions.keys() == PINNED
    pre_commit = (REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f"rev: v{versions['ruff']}\n" in pre_commit and f"import-linter=={versions['import-linter']}" in pre_commit
    for name in (".ci/run", ".github/workflows/tests.yml"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        assert all(f"{tool}==" in text for tool in PINNED), name
