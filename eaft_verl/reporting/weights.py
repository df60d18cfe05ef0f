"""How far the weights moved and in how many directions: read from what the evaluation left, secondary evidence."""

from typing import Any

from eaft_verl.files import read_json
from eaft_verl.pages.numbers import DASH, percent
from eaft_verl.reporting.collect import Arm
from eaft_verl.reporting.markdown import Cell, Table
from eaft_verl.reporting.wording import arm_name

Row = dict[str, Any]
NAMES = ("relative", "stable_rank", "effective_rank")


def weights(arms: list[Arm]) -> list[Row]:
    """[{arm, relative, layers: [{layer, relative, stable_rank, effective_rank}]}], means over seeds, at the end."""
    found = []
    for arm in arms:
        files = [run.run.path / "eval" / "weights.json" for run in arm.runs]
        if not all(file.is_file() for file in files):
            continue
        read = [read_json(file) for file in files]
        if any([row["layer"] for row in one["layers"]] != [row["layer"] for row in read[0]["layers"]] for one in read):
            continue
        layers = [
            {"layer": rows[0]["layer"], **{name: _mean([row[name] for row in rows]) for name in NAMES}}
            for rows in zip(*(one["layers"] for one in read), strict=True)
        ]
        found.append({"arm": arm.name, "relative": _mean([one["relative"] for one in read]), "layers": layers})
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def weights_table(report: Row) -> Table:
    """Per arm: relative distance of all weights, and over its layers the range of distance and of both ranks."""
    header = ("", "Distance / norm", "Of a layer", "Stable rank", "Effective rank")
    rows = []
    for row in report["weights"]:
        layers = [layer for layer in row["layers"] if layer["layer"] is not None] or row["layers"]
        spans = [_span([layer[name] for layer in layers], scale=100 if name == "relative" else 1) for name in NAMES]
        spans[0] += " %" if spans[0] != DASH else ""
        rows.append([Cell(arm_name(row["arm"]), strong=True), Cell(percent(row["relative"], 2)), *map(Cell, spans)])
    return Table([*map(Cell, header)], rows)


def _span(values: list[float | None], scale: float) -> str:
    known = [scale * value for value in values if value is not None]
    return f"{min(known):.3g}\u2013{max(known):.3g}" if known else DASH
