"""Tables of what was forgotten, question by question and token by token."""

from typing import Any

from eaft_verl.pages.numbers import number, percent
from eaft_verl.reporting.markdown import Cell, Table
from eaft_verl.reporting.tables import SIDES
from eaft_verl.reporting.token_drift import TEXTS
from eaft_verl.reporting.wording import arm_name

Row = dict[str, Any]


def transitions_table(report: Row) -> Table:
    """Per benchmark and arm: questions lost and gained, what guessing would explain, the exact p-value."""
    guessed = any(row["chance"] is not None for row in report["transitions"])
    header = ("", "Questions", "Lost", "Gained", *("By guessing, each", "Lost beyond guessing") * guessed, "Exact p")
    rows = []
    for row in report["transitions"]:
        decimals = 0 if row["seeds"] == 1 else 1
        chance, lost, gained = row["chance"], row["lost"], row["gained"]
        beyond = None if chance is None else max(0.0, lost - chance)
        mark = "" if row["unmarked"] or lost == gained else "worse" if lost > gained else "better"
        marks = [mark if mark == side else "" for side in ("worse", "better")]
        counts = zip((lost, gained), marks, strict=True)
        cells = [Cell(f"{row['n']:,}"), *(Cell(number(count, decimals), mark=found) for count, found in counts)]
        cells += [Cell(number(value, 1)) for value in (chance, beyond)] * guessed
        cells.append(Cell("<0.0001" if row["p"] < 1e-4 else number(row["p"], 4)))
        name = Cell(f"{row['benchmark']}, {arm_name(row['arm'])}", (SIDES[row["side"]],), strong=True)
        rows.append([name, *cells])
    return Table([*map(Cell, header)], rows)


def token_drift_table(report: Row) -> Table:
    """KL to the base over tokens: mean, median, 95th and 99th percentile with intervals, and same likeliest token."""
    header = [Cell(""), Cell("Mean KL"), Cell("Median"), Cell("95th"), Cell("99th"), Cell("Same top token")]
    rows = []
    for row in report["token_drift"]:
        cells = [
            Cell(f"{item['value']:.3g}", (f"[{item['low']:.3g}, {item['high']:.3g}]",)) for item in row["quantiles"]
        ]
        name = Cell(arm_name(row["arm"]), (f"{TEXTS[row['text']]}, {row['tokens']:,} tokens",), strong=True)
        rows.append([name, Cell(f"{row['mean']:.3g}"), *cells, Cell(percent(row["agreement"], 1))])
    return Table(header, rows)
