"""Keeps verl's chatter off the terminal: what it warns of and prints is kept in the run's libraries.log."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG = "libraries.log"


@contextlib.contextmanager
def kept_in(run: Path) -> Iterator[None]:
    """Python warnings of this process go to RUN/libraries.log, such as those of engines that are not installed."""

    def keep(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        with contextlib.suppress(OSError), (run / LOG).open("a", encoding="utf-8") as log:
            log.write(warnings.formatwarning(message, category, filename, lineno, line))

    with warnings.catch_warnings():
        warnings.showwarning = keep
        yield


@contextlib.contextmanager
def printed_in(run: Path) -> Iterator[None]:
    """What is printed meanwhile goes to RUN/libraries.log."""
    with (run / LOG).open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield
