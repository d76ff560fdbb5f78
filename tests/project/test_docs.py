"""The documentation's code runs as it is written, its tables are those of the results, its errors are the code's."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import video_panda_cli
import video_panda_hf
from helpers.readme import README, REPOSITORY, block
from video_panda_hf.assets import SHIPPED_CLIPS
from video_panda_hf.cli import build_parser


sys.path += [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "docs")]

import make_pictures
import tables


DOCS = REPOSITORY / "docs"
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
SOURCES = sorted(
    file for package in (video_panda_hf, video_panda_cli) for file in Path(package.__file__).parent.rglob("*.py")
)
PYTHON = re.compile(r"(?:<!-- ([^\n]*?) -->\n)?```python\n(.*?)```", re.DOTALL)
WITH_CODE = [page for page, text in PAGES.items() if "<!-- run -->" in text]
NOT_OURS = {"RowError"}  # never leaves the package


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    for needed in {"training": ["datasets"], "data-formats": ["datasets"], "usage": ["torchao"]}.get(page, []):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    variables = {"__name__": page}
    for mark, code in PYTHON.findall(PAGES[page]):
        if mark == "run":
            exec(compile(code, f"{page}.md", "exec"), variables)
            printed = capsys.readouterr().out.splitlines()
            promised = re.findall(r"^# prints: (.*)", code, re.MULTILINE)
            assert not promised or printed == promised


def test_each_block_of_python_runs_or_says_why_not():
    for page, text in PAGES.items():
        marks = [mark for mark, _ in PYTHON.findall(text)]
        assert all(mark == "run" or mark.startswith("not run: ") for mark in marks), page


def test_the_commands_of_the_command_line_are_ones_it_takes():
    commands = [
        line.split(" #")[0].split("&& ")[-1]
        for text in (README, *PAGES.values())
        for lines in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in lines.replace("\\\n", " ").splitlines()
    ]
    commands = [shlex.split(line)[1:] for line in commands if line.startswith("video-panda ")]
    assert len(commands) >= 4
    for arguments in commands:
        build_parser().parse_args(arguments)


SAMPLES = re.findall(r"<!-- sample: (\w+) -->\n```json\n(.*?)```", PAGES["data-formats"], re.DOTALL)


@pytest.mark.parametrize(("suffix", "sample"), SAMPLES)
def test_each_sample_of_a_data_format_is_read(suffix, sample, tmp_path):
    pytest.importorskip("datasets")
    from video_panda_hf.training import load_conversations

    for clip in SHIPPED_CLIPS.glob("*.mp4"):
        (tmp_path / clip.name).symlink_to(clip)
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    file = tmp_path / f"sample.{suffix}"
    file.write_text(sample, encoding="utf-8")
    rows = [json.loads(line) for line in sample.splitlines()] if suffix == "jsonl" else json.loads(sample)
    kept = load_conversations(file)
    assert len(kept) == len(rows) > 0
    for row, read in zip(rows, kept, strict=True):
        files = re.findall(r"[\w-]+\.(?:mp4|png)", json.dumps(row))
        parts = [part for message in read["messages"] for part in message["content"]]
        assert [Path(part[part["type"]]).name for part in parts if part["type"] != "text"] == files


def test_the_benchmarks_page_has_the_tables_of_the_results():
    assert tables.filled(PAGES["benchmarks"]) == PAGES["benchmarks"], "run `python benchmarks/tables.py`"
    assert {file.stem for file in tables.RESULTS.glob("*.json")} == set(tables.TABLES)


def test_a_reader_that_failed_is_said_to_fail():
    given = {"fails": "fails", 1.092: "1.09 ×", 16.0: "16.0 ×", 102.4: "102 ×"}
    assert [tables.times(factor) for factor in given] == list(given.values())


def test_the_pictures_are_what_the_script_makes():
    svg = (make_pictures.PICTURES / "architecture.svg").read_text(encoding="utf-8")
    assert svg == make_pictures.architecture(), "run `python docs/make_pictures.py`"
    gif = make_pictures.PICTURES / "answer.gif"
    assert gif.stat().st_size < 300_000
    with Image.open(gif) as picture:
        answer = picture.info["comment"].decode()
    assert answer == block("answer").strip()
    assert shlex.split(block("try"))[-1] == make_pictures.QUESTION


def test_readme_is_short_and_leads_to_pages_that_exist():
    assert len(README.splitlines()) <= 150
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links and not [link for link in links if not (REPOSITORY / link).exists()]


def test_the_files_that_the_pages_name_are_there():
    for page, text in PAGES.items():
        named = set(re.findall(r"(?:src|examples|benchmarks|tests)/[\w./-]+\w", text))
        assert not [name for name in sorted(named) if not (REPOSITORY / name).exists()], page


def test_each_setting_of_a_training_is_on_its_page():
    (arguments,) = [file for file in SOURCES if file.name == "arguments.py"]
    fields = re.findall(r"^    (\w+): .* = field\(", arguments.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fields) > 8
    assert not [name for name in fields if f"`{name}" not in PAGES["training"]]


def test_each_error_class_has_its_place_in_troubleshooting():
    defined = {
        node.name
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Error", "Warning"))
    }
    assert len(defined) > 10
    assert not [name for name in sorted(defined - NOT_OURS) if f"`{name}`" not in PAGES["troubleshooting"]]


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    texts = [text.replace("`", "") for file in SOURCES for text in strings_of(file)]
    messages = []
    for row in re.findall(r"^\|(.*)\|$", PAGES["troubleshooting"], re.MULTILINE):
        *_, message, _ = row.replace("`", "").split("|")
        messages += [part.strip() for half in message.split(";") for part in half.split("…")]
    messages = [part for part in messages if len(part) > 12]
    assert len(messages) > 60
    assert not [part for part in messages if not any(part in text for text in texts)]


def strings_of(file: Path):
    """The texts of a file. Where a value is put in, the names and settings of the released model stand for it."""
    values = {"self.row_token": "<row>", "self.video_token": "<video>", "token": "<video>", "NEED_THE_PACKAGE": ""}
    values |= {"frames_per_clip": "4"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else values.get(ast.unparse(part.value), "…")
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_site_builds_without_a_warning(tmp_path):
    for needed in ("mkdocs", "material", "mkdocstrings_handlers", "mkdocs_include_markdown_plugin"):
        pytest.importorskip(needed)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "load_conversations" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
