"""Hides log messages that do not concern users of this package."""

import logging
from contextlib import contextmanager


# When transformers imports torchao, torch 2.14 logs a deprecation warning about how torchao registers its enums.
NOISY_AT_IMPORT = ("torch.utils._pytree",)


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
