"""The README's code runs as it is written."""

import re
import shlex

import pytest

from helpers.readme import README, REPOSITORY, block
from video_panda_hf.cli import main


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def test_the_first_command_prints_what_the_readme_says(capsys):
    command, answer = block("try"), block("answer")
    program, *arguments = shlex.split(command.split("&&")[1])
    assert program == "video-panda"
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == answer.strip()


def test_the_python_of_the_readme_prints_what_it_says(capsys):
    code = block("python")
    exec(compile(code, "README.md", "exec"), {})
    expected = re.search(r"# prints: (.*)", code)[1]
    assert capsys.readouterr().out.strip() == expected


def test_the_files_that_the_readme_names_are_there():
    named = set(re.findall(r"(?:src|examples|benchmarks|tests)/[\w./-]+\w", README))
    assert named and not [name for name in sorted(named) if not (REPOSITORY / name).exists()]
