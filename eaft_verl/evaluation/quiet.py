"""Keeps the libraries' chatter out of a run's log."""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator

_EXPECTED = {
    "lm_eval.api.task": "Custom kwargs can be passed to",
    "lm_eval.models.huggingface": "model kwarg is not of type `str`",
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only warnings, less the two that our own way of calling provokes; progress bars only on a terminal."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    for name in _EXPECTED:
        logging.getLogger(name).addFilter(_unexpected)
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        for name in _EXPECTED:
            logging.getLogger(name).removeFilter(_unexpected)


def _unexpected(record: logging.LogRecord) -> bool:
    return _EXPECTED[record.name] not in record.getMessage()
