"""The files of the Hugging Face Space fit the package."""

import configparser
import runpy
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement


REPOSITORY = Path(__file__).parents[2]
SPACE = REPOSITORY / "examples" / "space"


def test_its_front_matter_and_requirements_fit_the_extra():
    _, front, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    front = yaml.safe_load(front)
    parsed = configparser.ConfigParser()
    parsed.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    extras = parsed["options.extras_require"]
    (gradio,) = [Requirement(line) for line in extras["demo"].split("\n") if line]
    assert front["sdk"] == gradio.name == "gradio" and front["sdk_version"] in gradio.specifier
    assert (SPACE / front["app_file"]).is_file() and len(front["short_description"]) <= 60
    (needed,) = map(Requirement, (SPACE / "requirements.txt").read_text(encoding="utf-8").split())
    assert needed.name == parsed["metadata"]["name"] and needed.extras <= set(extras)
    assert "gradio" not in extras["test"]  # the tests run without it


def test_the_demo_in_a_browser_has_a_session_and_a_job():
    assert "nox --session browser" in (REPOSITORY / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert "def browser(session)" in (REPOSITORY / "noxfile.py").read_text(encoding="utf-8")


def test_it_builds_the_demo_of_the_shipped_model(monkeypatch):
    gradio = pytest.importorskip("gradio")
    monkeypatch.delenv("MODEL", raising=False)
    page = runpy.run_path(str(SPACE / "app.py"), run_name="space")["demo"]
    assert isinstance(page, gradio.Blocks)
    assert {dependency["api_name"] for dependency in page.config["dependencies"]} >= {"ask", "explain"}
