"""`nothing_deprecated()`: a block that fails where this repository uses a deprecated name of another package."""

import logging
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as transformers_logging


REPOSITORY = str(Path(__file__).resolve().parents[2])
PACKAGES = "site-packages"


@contextmanager
def nothing_deprecated():
    """
    Raises `AssertionError` at the end of the block for `FutureWarning`, `DeprecationWarning`, and what transformers
    logs of deprecated names. Packages that use deprecated names of each other are left to themselves.
    """
    found = []

    def note(message: str):
        if is_ours(sys._getframe(1)):
            found.append(message)

    def show(message, category, *_):
        if issubclass(category, (FutureWarning, DeprecationWarning)):
            note(str(message))

    class Handler(logging.Handler):
        def emit(self, record):
            if "deprecat" in record.getMessage():
                note(record.getMessage())

    handler = Handler(logging.WARNING)
    transformers_logging.warning_once.cache_clear()  # else a message of an earlier test does not come again
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("always", category)
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
    assert not found, "deprecated: " + "\n".join(found)


def is_ours(frame) -> bool:
    """Whether a file of this repository called the package that warns."""
    warns = None
    while frame is not None:
        file = frame.f_code.co_filename
        package = package_of(file)
        if package == "ours":
            return True
        if package is not None:
            warns = warns or package
            if package != warns:
                return False
        frame = frame.f_back
    return False


def package_of(file: str) -> str | None:
    """The package that a file is of, "ours", or `None` for what only passes a call on: torch, the standard library and
    generated code."""
    if PACKAGES in file:
        package = file.split(PACKAGES)[1].strip("/\\").replace("\\", "/").split("/")[0]
        return None if package == "torch" else package
    return "ours" if file.startswith(REPOSITORY) and file != __file__ else None
