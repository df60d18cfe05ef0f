"""Every row of the matrix."""

import contextlib
import importlib
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from .matrix import FAULTS, Fault, Lab

for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    if not path.stem.startswith(("test_", "conftest", "matrix")):
        importlib.import_module(f".{path.stem}", __package__)  # each module registers its rows
ROWS = [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * row.slow) for row in FAULTS]


def cpu_seconds() -> float:
    """Of this process and all that it has waited for: under `python -m tests.faults` those too that a driver left."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.mark.parametrize("row", ROWS)
def test_fault(row: Fault, lab: Lab, record_property: Callable[[str, object], None]) -> None:
    record_property("fault", row.name)
    record_property("expected", row.expected)
    before = cpu_seconds()
    outcome = row.drive(lab)
    record_property("cpu", f"{cpu_seconds() - before:.0f}")
    record_property("seen", outcome.seen)
    record_property("lost", "-" if outcome.lost is None else outcome.lost)
