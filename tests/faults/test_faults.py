"""Every row of the matrix."""

from collections.abc import Callable

import pytest

from . import compatibility, recipes, stops  # noqa: F401 - each module registers its rows
from .matrix import FAULTS, Fault, Lab

ROWS = [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * row.slow) for row in FAULTS]


@pytest.mark.parametrize("row", ROWS)
def test_fault(row: Fault, lab: Lab, record_property: Callable[[str, object], None]) -> None:
    record_property("fault", row.name)
    record_property("expected", row.expected)
    outcome = row.drive(lab)
    record_property("seen", outcome.seen)
    record_property("lost", "-" if outcome.lost is None else outcome.lost)
