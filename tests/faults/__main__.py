"""All rows, the slow ones too, and the table: fault, expected, seen, lost steps, seconds, seconds of CPU.

python -m tests.faults                           every row
python -m tests.faults -m slow -n 2 --dist worksteal
                                                 the slow half on two cores; what its forks use is not in CPU s
python -m tests.faults -k "two commands at once" rows whose fault has these words
python -m tests.faults -k stops                  the rows of stops.py
python -m tests.faults -k "grpo and not lora"    pytest's own expressions, and all else that pytest takes
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .matrix import FAULTS, Lab
from .test_faults import ROWS

HERE = Path(__file__).parent


def rows_with(words: str) -> set[str] | None:
    """Faults of the module so named, else that have the text in them, else all of its words; None: pytest's own."""
    if found := {str(row.name) for row in FAULTS if row.drive.__module__.endswith(f".{words}")}:
        return found
    names = {str(row.id) for row in ROWS}
    if found := {name for name in names if words.lower() in name.lower()}:
        return found
    if re.search(r"\b(and|or|not)\b|[()]", words):
        return None
    return {name for name in names if all(word in name.lower() for word in words.lower().split())}


def line(row: dict[str, str]) -> str:
    """A row of the table in Markdown."""
    return f"| {' | '.join(row.get(name, '?') for name in ('fault', 'expected', 'seen', 'lost', 'seconds', 'cpu'))} |"


class Table:
    """Collects what each row reported, and writes it at once: all rows take half an hour."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []
        self.write: Callable[[str], object] = print

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Past what pytest captures."""
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        self.write = reporter.write_line

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A row per test that ran; a failure says so instead of what was seen."""
        row = {name: str(value) for name, value in report.user_properties}
        if report.when == "call" and row:
            seen = {} if report.passed else {"seen": report.outcome if report.skipped else "NOT AS EXPECTED"}
            self.rows.append(row | seen | {"seconds": f"{report.duration:.0f}"})
            self.write(f"\n{line(self.rows[-1])}")
            if report.failed:
                self.write(report.longreprtext[-2000:])  # now: the rest may take half an hour

    def pytest_terminal_summary(self) -> None:
        """The table in Markdown."""
        self.write("| fault | expected | seen | lost steps | s | CPU s |\n|---|---|---|---|---|---|")
        for row in self.rows:
            self.write(line(row))
        wrong = sum(row.get("seen") == "NOT AS EXPECTED" for row in self.rows)
        self.write(f"{len(self.rows)} faults, {wrong} not as expected")


parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("-k", default="")
known, others = parser.parse_known_args()
chosen = rows_with(known.k) if known.k else None
if chosen is not None and not chosen:
    sys.exit(f"no fault has {known.k!r} in its words")
rows = [str(row.id) for row in ROWS if chosen is None or row.id in chosen]
where = [f"{HERE / 'test_faults.py'}::test_fault[{name}]" for name in rows]
expression = ["-k", known.k] if known.k and chosen is None else []
Lab.fork = False  # a start of its own for each command, whose CPU is counted; the processes of `-n` fork
sys.exit(pytest.main([*where, "-q", "-m", "", *expression, *others], plugins=[Table()]))
