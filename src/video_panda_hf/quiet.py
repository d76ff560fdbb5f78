"""Hides log messages that do not concern users of this package."""

import logging
import sys
from contextlib import contextmanager


# transformers imports torchao. That registers its enums with torch in a way that torch 2.14 calls deprecated, and it
# logs a line if its C++ parts do not fit the installed torch.
NOISY_AT_IMPORT = ("torch.utils._pytree", "torchao")


@contextmanager
def quiet_imports():
    """Drops warnings that other packages log about each other while they are imported here.

    Messages before and after the context are kept.
    """

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    loggers = [logging.getLogger(name) for name in NOISY_AT_IMPORT]
    for logger in loggers:
        logger.addFilter(is_error)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_error)


@contextmanager
def progress_bars_on_terminals():
    """transformers' progress bars of loading and saving, unless standard error is a file or a pipe."""
    from transformers.utils import logging  # not above: it must be imported in `quiet_imports`

    hidden = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()
