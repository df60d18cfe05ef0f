"""All rows, the slow ones too, and the table: fault, expected, seen, lost steps."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


class Table:
    """Collects what each row reported."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A row per test that ran; a failure says so instead of what was seen."""
        row = {name: str(value) for name, value in report.user_properties}
        if report.when == "call" and row:
            self.rows.append(row | ({} if report.passed else {"seen": "NOT AS EXPECTED", "lost": "?"}))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table in Markdown."""
        write = terminalreporter.write_line
        write("| fault | expected | seen | lost steps |\n|---|---|---|---|")
        for row in self.rows:
            write(f"| {row['fault']} | {row['expected']} | {row.get('seen', '')} | {row.get('lost', '')} |")
        wrong = sum(row.get("seen") == "NOT AS EXPECTED" for row in self.rows)
        write(f"{len(self.rows)} faults, {wrong} not as expected")


sys.exit(pytest.main([str(HERE), "-q", "-m", "", *sys.argv[1:]], plugins=[Table()]))
