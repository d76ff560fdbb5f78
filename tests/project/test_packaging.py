"""The ranges in setup.cfg, README's commands and the matrix that runs them fit each other."""

import configparser
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version


REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / ".ci"))

import matrix  # noqa: E402


SETUP_CFG = (REPOSITORY / "setup.cfg").read_text(encoding="utf-8")
RANGES = {name: requirement.specifier for name, requirement in matrix.requirements(SETUP_CFG).items()}
PLUGINS = ("lmms_eval.models", "vllm.general_plugins")
ROW = {"cell": "newest-3.12", "Python": "3.12.9", "torch": "2.14.1", "ask": "answers", "passed": 7, "failed": 0}


def test_the_oldest_are_the_lower_bounds_of_all_that_readme_installs():
    constraints = [Requirement(line) for line in matrix.oldest(SETUP_CFG).splitlines()]
    assert {constraint.name for constraint in constraints} == set(RANGES) >= {"torch", "pytest", "datasets", "torchao"}
    for constraint in constraints:
        (pin,) = constraint.specifier
        assert pin.operator == "==" and pin.version in RANGES[constraint.name]
        assert f"{constraint.name}>={pin.version}" in SETUP_CFG or f"{constraint.name}=={pin.version}" in SETUP_CFG


def test_a_requirement_without_a_lower_bound_is_an_error():
    with pytest.raises(ValueError, match="av<20 needs one lower bound"):
        matrix.oldest(SETUP_CFG.replace("av>=17.1,<20", "av<20"))


@pytest.mark.parametrize("name", ["accelerate", "av", "datasets", "huggingface_hub", "peft", "transformers"])
def test_what_has_broken_us_or_may_is_capped(name):
    assert "9999" not in RANGES[name]


@pytest.mark.parametrize("name", ["torch", "torchvision", "numpy", "pillow"])
def test_what_everything_else_needs_too_is_not_capped(name):
    assert "9999" in RANGES[name]


def test_the_canary_has_no_caps_and_the_same_lower_bounds():
    lifted = matrix.without_caps(SETUP_CFG)
    assert matrix.oldest(lifted) == matrix.oldest(SETUP_CFG)
    for name, requirement in matrix.requirements(lifted).items():
        assert "9999" in requirement.specifier or name == "ruff"
    assert "python_requires = >=3.10\n" in lifted


def test_vllm_gets_its_dependencies_but_another_torch():
    given = ["torch==2.13.0+cpu", "torchaudio", "fastapi[standard]<1,>=0.1", "six; python_version < '3'"]
    assert matrix.without_torch([*given, "ray; extra == 'ray'"]) == ["fastapi[standard]<1,>=0.1"]


def test_lmms_eval_and_vllm_find_what_the_entry_points_name():
    parsed = configparser.ConfigParser()
    parsed.read_string(SETUP_CFG)
    points = {
        group: EntryPoint(*parsed["options.entry_points"][group].strip().split(" = "), group) for group in PLUGINS
    }
    assert {(point.name, callable(point.load())) for point in points.values()} == {("video_panda", True)}


def test_the_commands_of_readme_are_found():
    assert matrix.readme_block("try").startswith("pip install . && video-panda ask ")
    assert matrix.readme_block("tests").startswith("pip install -e ") and " pytest " in matrix.readme_block("tests")
    assert matrix.readme_block("answer").endswith(".")
    with pytest.raises(ValueError, match="no block after <!-- nothing -->"):
        matrix.readme_block("nothing")


def test_the_documentation_has_ranges_and_a_job():
    parsed = configparser.ConfigParser()
    parsed.read_string(SETUP_CFG)
    needed = [Requirement(line) for line in parsed["options.extras_require"]["docs"].split("\n") if line]
    assert "mkdocs-material" in {requirement.name for requirement in needed}
    for requirement in needed:
        assert {bound.operator for bound in requirement.specifier} == {">=", "<"}
    workflow = (REPOSITORY / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert "nox --session docs" in workflow
    assert "def docs(session)" in (REPOSITORY / "noxfile.py").read_text(encoding="utf-8")


def test_each_python_of_the_package_has_a_cell_and_a_job():
    prefix = "    Programming Language :: Python :: 3."
    pythons = [line.rsplit(" ", 1)[1] for line in SETUP_CFG.splitlines() if line.startswith(prefix)]
    assert pythons == matrix.PYTHONS and f"python_requires = >={pythons[0]}\n" in SETUP_CFG
    assert {f"newest-{python}" for python in pythons} < set(matrix.CELLS)
    workflow = (REPOSITORY / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert all(f'"{python}"' in workflow for python in pythons)


def test_the_tests_of_a_smoke_are_there():
    assert all((REPOSITORY / path).is_file() for path in matrix.SMOKE_TESTS)


def test_the_newest_interpreter_of_pyenv_is_found(tmp_path):
    for release in ["3.12.9", "3.12.10", "3.12-dev", "3.13.0rc1", "3.1.2"]:
        folder = tmp_path / "versions" / release / "bin"
        folder.mkdir(parents=True)
        python = ".".join(str(part) for part in Version(release.removesuffix("-dev")).release[:2])
        (folder / f"python{python}").touch()
    found = matrix.interpreter_folders(["3.1", "3.12", "3.13"], {"PYENV_ROOT": str(tmp_path)})
    assert found == [str(tmp_path / "versions" / release / "bin") for release in ("3.1.2", "3.12.10")]


@pytest.mark.parametrize(
    ("output", "failed_to_download"),
    [
        ("HTTPSConnectionPool(host='example.org', port=443): Read timed out.", True),
        ("Retrying after connection broken by 'NewConnectionError(…)'\nERROR: No matching distribution found", True),
        ("ERROR: No matching distribution found for transformers<5.25,>=5.26", False),
        ("ERROR: ResolutionImpossible", False),
    ],
)
def test_a_failed_download_is_told_from_ranges_that_cannot_be_met(output, failed_to_download):
    assert matrix.is_download_failure(output) is failed_to_download


def test_the_page_has_the_last_result_of_each_cell_and_invents_none():
    first = matrix.compatibility_page({"newest-3.12": ROW})
    rows = matrix.rows_of_page(first)
    assert list(rows) == matrix.CELLS
    assert rows["newest-3.12"][:3] == ["newest-3.12", "3.12.9", "2.14.1"] and "answers" in rows["newest-3.12"]
    assert all("not run" in row and "answers" not in row for cell, row in rows.items() if cell != "newest-3.12")

    second = matrix.rows_of_page(matrix.compatibility_page({"newest-3.10": {**ROW, "cell": "newest-3.10"}}, first))
    assert second["newest-3.12"] == rows["newest-3.12"] and "answers" in second["newest-3.10"]
    assert "not run" in matrix.plain_table({})
