"""The test matrix: README's two commands on each Python, with the newest and oldest packages, and without the caps.

    nox --list                  what there is
    nox                         the whole matrix, one cell after the other
    nox -s newest-3.12          one cell; `-- keep` leaves its environment in `.nox`
    nox -s exchange             checkpoints between the newest and the oldest release
    nox -s compatibility        results → docs/compatibility.md
    nox -s vllm                 the plugin for vLLM against generate
    nox -s lmms                 the plugin for lmms-eval against generate
    nox -s trl                  training by TRL
    nox -s docs                 the site of documentation, without a warning
    nox -s browser              the demo in headless Chromium; skipped where there is none

A Python that is not installed is skipped. An environment takes about 6 GB and is deleted after its cell.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import nox
from nox.command import CommandFailed


sys.path.insert(0, str(Path(__file__).resolve().parent / ".ci"))

import matrix


nox.options.sessions = ["newest", "oldest", "canary"]
nox.options.default_venv_backend = "venv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False  # even if `CI` is set
os.environ["PATH"] = os.pathsep.join([*matrix.interpreter_folders(matrix.PYTHONS, os.environ), os.environ["PATH"]])

DEPENDENCIES = "import importlib.metadata, json, sys; print(json.dumps(importlib.metadata.requires(sys.argv[1])))"
INSTALL_SECONDS = 15 * 60  # limit for a smoke test's packages: a longer download counts as failed


@nox.session(python=matrix.PYTHONS)
def newest(session):
    """README's commands with the newest packages that setup.cfg admits."""
    with fresh_copy(session) as copy:
        if not run_cell(session, f"newest-{session.python}", copy):
            session.error("the question or the tests failed")


@nox.session(python=[matrix.OLDEST_PYTHON])
def oldest(session):
    """README's commands with the lower bound of each requirement in setup.cfg."""
    with fresh_copy(session) as copy:
        constraints = copy.parent / "oldest.txt"
        constraints.write_text(matrix.oldest((copy / "setup.cfg").read_text()))
        if not run_cell(session, f"oldest-{session.python}", copy, {"PIP_CONSTRAINT": str(constraints)}):
            session.error("the question or the tests failed")


@nox.session(python=[matrix.CANARY_PYTHON])
def canary(session):
    """README's commands with the newest of everything, without setup.cfg's caps. Reports and does not fail."""
    with fresh_copy(session) as copy:
        setup_cfg = copy / "setup.cfg"
        setup_cfg.write_text(matrix.without_caps(setup_cfg.read_text()))
        # Without caps, the tests of the caps fail.
        environment = {"PYTEST_ADDOPTS": "--deselect tests/project/test_packaging.py"}
        if not run_cell(session, f"canary-{session.python}", copy, environment):
            session.warn("Something newer than the caps in setup.cfg breaks this package.")


@nox.session(python=matrix.PYTHONS)
def smoke(session):
    """README's question, and the tests most sensitive to upstream changes. Skipped if a download fails."""
    with fresh_copy(session) as copy, session.chdir(copy):
        install(session, ".")
        if ask(session) != "answers":
            session.error("README's question has another answer")
        install(session, ".[test]")
        session.run("pytest", "-n", "2", *matrix.SMOKE_TESTS)


@nox.session(python=[matrix.OLDEST_PYTHON])
def exchange(session):
    """Checkpoints saved with their code by the newest release answer under the oldest, and the reverse."""
    with fresh_copy(session) as copy, session.chdir(copy):
        install(session, ".[test]")
        constraints = copy.parent / "oldest.txt"
        constraints.write_text(matrix.oldest((copy / "setup.cfg").read_text()))
        other = copy.parent / "oldest"
        session.run("python", "-m", "venv", str(other))
        oldest_python = str(other / "bin" / "python")
        pip = [oldest_python, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
        session.run(*pip, *matrix.requirements((copy / "setup.cfg").read_text()), external=True)
        session.run("pytest", "-m", "", "tests/hub/test_between_releases.py", env={"OTHER_PYTHON": oldest_python})


@nox.session(python=[matrix.OLDEST_PYTHON])
def vllm(session):
    """The answers of vLLM, in its build for CPUs, against those of `generate`. Skipped if a download fails."""
    with fresh_copy(session) as copy, session.chdir(copy):
        install(session, ".[test]")
        install(session, "--no-deps", matrix.VLLM)
        found = session.run("python", "-c", DEPENDENCIES, matrix.VLLM.split("==")[0], silent=True, log=False)
        peft = matrix.requirements((copy / "setup.cfg").read_text())["peft"]
        install(session, str(peft), *matrix.without_torch(json.loads(found)))
        session.run("pytest", "-n", "0", "tests/serving")


@nox.session(python=[matrix.OLDEST_PYTHON])
def lmms(session):
    """lmms-eval with our model and tasks, against `generate` and `video-panda eval`. Skipped if a download fails."""
    with fresh_copy(session) as copy, session.chdir(copy):
        install(session, ".[test]")
        install(session, *matrix.LMMS_EVAL)
        av = matrix.requirements((copy / "setup.cfg").read_text())["av"]
        install(session, str(av))  # lmms-eval asks for an older one
        tests = "tests/evaluation/test_lmms.py", "tests/evaluation/test_lmms_tasks.py"
        session.run("pytest", "-n", "0", *tests)


@nox.session(python=[matrix.OLDEST_PYTHON])
def trl(session):
    """Training by TRL. Skipped if a download fails."""
    with fresh_copy(session) as copy, session.chdir(copy):
        install(session, ".[test,train]", matrix.TRL)
        session.run("pytest", "-n", "0", "tests/training/test_trl.py")


@nox.session(venv_backend="none")
def compatibility(session):
    """Write the last result of each cell into docs/compatibility.md. Runs no cell."""
    rows = matrix.recorded()
    earlier = matrix.PAGE.read_text(encoding="utf-8") if matrix.PAGE.exists() else ""
    matrix.PAGE.parent.mkdir(exist_ok=True)
    matrix.PAGE.write_text(matrix.compatibility_page(rows, earlier), encoding="utf-8")
    print(matrix.plain_table(rows))


@nox.session(python=[matrix.OLDEST_PYTHON])
def docs(session):
    """Build the documentation. A warning fails it: a broken link, a missing page, a name that is not in the code."""
    with fresh_copy(session) as copy, session.chdir(copy):
        install(session, ".[docs]")
        session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(python=[matrix.OLDEST_PYTHON])
def browser(session):
    """The demo in headless Chromium. `-- docs/pictures/demo.png` takes the picture of the documentation."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        session.skip("there is no Chromium: install it, or name it in CHROMIUM")
    environment = {"CHROMIUM": chromium}
    for name in session.posargs:
        environment["DEMO_SCREENSHOT"] = str(Path(name).resolve())
    with fresh_copy(session) as copy, session.chdir(copy):
        install(session, ".[test,demo]")
        install(session, "playwright>=1.50,<2")
        session.run("pytest", "-m", "", "tests/demo", env=environment)


@contextmanager
def fresh_copy(session):
    """A copy of the repository's files, as after `git clone`. It and the environment are deleted at the end."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=matrix.REPOSITORY, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        for name in filter(None, names.split("\0")):
            if (matrix.REPOSITORY / name).is_file():  # false for a deletion that is not committed
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(matrix.REPOSITORY / name, copy / name)
        try:
            yield copy
        finally:
            if "keep" not in session.posargs:
                shutil.rmtree(session.virtualenv.location, ignore_errors=True)


def run_cell(session, cell, copy, env=None) -> bool:
    """Run README's commands in `copy`, record the row, print the table. Returns whether both commands succeeded."""
    started = time.monotonic()
    with session.chdir(copy):
        answer = ask(session, env)
        counts = tests(session, copy.parent / "tests.xml", env)
    row = {
        "cell": cell,
        **versions(session),
        "ask": answer,
        **counts,
        "seconds": round(time.monotonic() - started),
        "date": date.today().isoformat(),
    }
    matrix.record(row)
    print(matrix.plain_table(matrix.recorded()))
    return answer == "answers" and counts["failed"] == 0 and bool(counts["passed"])


def ask(session, env=None) -> str:
    """README's first command, as written: "answers" if its last line is README's answer, else "fails"."""
    with tempfile.TemporaryFile("w+") as output:
        try:
            session.run("sh", "-c", matrix.readme_block("try"), env=env, external=True, stdout=output, stderr=None)
            failed = False
        except CommandFailed:
            failed = True
        output.seek(0)
        printed = output.read().strip()
    print(printed)
    return "answers" if not failed and printed.splitlines()[-1:] == [matrix.readme_block("answer")] else "fails"


def tests(session, report, env=None) -> dict[str, int | None]:
    """Runs README's second command. Returns pytest's counts; None if pytest wrote no report."""
    # pytest takes options from the environment, so the command stays as written.
    env = env or {}
    env = {**env, "PYTEST_ADDOPTS": f"{env.get('PYTEST_ADDOPTS', '')} --junitxml={report}"}
    try:
        session.run("sh", "-c", matrix.readme_block("tests"), env=env, external=True)
    except CommandFailed:
        session.warn("README's test command failed.")
    if not report.exists():
        return dict.fromkeys(["passed", "failed", "skipped"])
    suite = ElementTree.parse(report).getroot().find("testsuite")
    failed, skipped = int(suite.get("failures")) + int(suite.get("errors")), int(suite.get("skipped"))
    return {"passed": int(suite.get("tests")) - failed - skipped, "failed": failed, "skipped": skipped}


def versions(session) -> dict[str, str | None]:
    """The versions of Python and of the packages in the session's environment; None if one is not installed."""
    program = """
import importlib.metadata, json, platform, sys
found = {"Python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""
    return json.loads(session.run("python", "-c", program, *matrix.PACKAGES, silent=True, log=False))


def install(session, *targets) -> None:
    """Install with pip. Skips the session if the packages cannot be downloaded, fails it if pip fails otherwise."""
    python = shutil.which("python", path=os.pathsep.join(session.bin_paths))
    session.log(f"pip install {' '.join(targets)}")
    try:
        command = [python, "-m", "pip", "install", "--quiet", *targets]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        session.skip(f"the packages were not there after {INSTALL_SECONDS // 60} minutes")
    if done.returncode != 0:
        print(done.stdout + done.stderr)
        if matrix.is_download_failure(done.stderr):
            session.skip("the packages could not be downloaded")
        session.error("the package cannot be installed")
