"""Keeps standard error clean of messages that tell a user of this package nothing."""

import logging
from contextlib import contextmanager


# transformers imports torchao, which registers its enums with torch in a way that torch 2.14 calls deprecated, and
# which says so if its C++ parts do not fit the installed torch.
NOISY_AT_IMPORT = ("torch.utils._pytree", "torchao")


@contextmanager
def quiet_imports():
    """Drops warnings that other packages log about each other while this package has them imported.

    Nothing is dropped of packages that were imported before, nor after the context.
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
