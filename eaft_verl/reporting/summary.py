"""What a report comes to, for a terminal: a line per arm; and which runs and which place a report is for."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.files import read_json
from eaft_verl.pages.numbers import DASH, number
from eaft_verl.reporting.comparability import other_keys
from eaft_verl.reporting.markdown import ARROWS, Cell
from eaft_verl.reporting.tables import headline_table, rows_of
from eaft_verl.runs import Run, is_run, run_name

KINDS = ("base", "arm")


def summary(found: dict[str, Any]) -> list[str]:
    """The headline's numbers and the seconds of training as a small table: arm, target, general, KL, s.

    Changes are against the base, with the mark that the report gives them; intervals stand in the report.
    """
    table = headline_table(found)
    seconds = {row["arm"]: number(row["train_seconds"], 0) for row in found["cost"]}
    rows = [["", *(_heading(cell) for cell in table.header[1:]), "training, s"]]
    for arm, cells in zip(rows_of(found), table.rows, strict=True):
        rows.append([arm, *(_value(cell) for cell in cells[1:]), seconds.get(arm, DASH)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _heading(cell: Cell) -> str:
    return ", ".join([cell.text, *cell.lines]).lower().replace("kl to base", "KL to base").replace("nll", "NLL")


def _value(cell: Cell) -> str:
    return f"{cell.text} {ARROWS[cell.mark]}" if cell.mark in ARROWS else cell.text


def runs_of(given: Sequence[Path], *, evaluated: bool = False) -> list[Path]:
    """Run directories as they are; of any other folder the runs in it, the base and every arm.

    evaluated: without those, named in a warning, that have not been and did not fail either; with the models that
    were evaluated beside them. RunError for a folder without runs.
    """
    return [run for path in given for run in ([path] if is_run(path) else _inside(path, evaluated))]


def _inside(folder: Path, evaluated: bool) -> list[Path]:
    infos = {run: Run(run).info for run in sorted(folder.glob("*/")) if is_run(run)}
    found = {run: info for run, info in infos.items() if info.get("kind") in KINDS}
    if not found:
        raise RunError(f"{folder} is no run directory and holds none; give runs, or the output folder of a comparison")
    ready = [run for run, info in found.items() if info.get("evaluated") or info.get("status") == "failed"]
    if not evaluated:
        return list(found)
    models = models_beside(folder / "base")
    if len(ready) == len(found):
        return [*found, *models]
    left = ", ".join(run.name for run in found if run not in ready)
    if not ready:
        raise RunError(
            f"{folder}: none of its runs is evaluated yet ({left}); the same `eaft compare` goes on, or "
            "`eaft evaluate RUN` for one that is trained"
        )
    print(f"eaft: warning: not evaluated yet and left out: {left}", file=sys.stderr)
    return [*ready, *models]


def models_beside(base: Path) -> list[Path]:
    """Runs of `eaft evaluate MODEL` in the folder of this base that may stand beside it; a warning for each other."""
    found = [run for run in sorted(base.parent.glob("models/*/")) if is_run(run) and Run(run).info.get("evaluated")]
    keys = Run(base).info.get("keys", {}) if is_run(base) else {}
    fits = []
    for run in found:
        if other := other_keys(keys, Run(run).info.get("keys", {})):
            print(f"eaft: warning: {run} is left out, it was evaluated otherwise: {'; '.join(other)}", file=sys.stderr)
        else:
            fits.append(run)
    return fits


def place_of(output: Path, runs: Sequence[Path]) -> Path:
    """Where a comparison of these runs is reported: OUTPUT/report, or beside it where that tells of others, too.

    Those others are still there; `eaft report OUTPUT` reports all.
    """
    usual, names = output / "report", {run.name for run in runs}
    file = usual / "report.json"
    try:
        known = read_json(file)["seeds"] if file.is_file() else {}
        there = {
            name for arm, seeds in known.items() for seed in seeds if is_run(output / (name := run_name(arm, seed)))
        }
    except (RunError, KeyError, AttributeError, TypeError):
        return usual
    return output / f"report-{'-'.join(sorted(names))}"[:120] if there - names else usual
