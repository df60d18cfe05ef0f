"""The paper's tables as data, what in them does not follow, and our numbers beside theirs (arXiv 2601.02151v1).

paper.json: scores in percent as printed, `printed` the averages and the general drop beside them. What contradicts
itself is computed here, from the rows; what only the text says is listed in `elsewhere`.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.pages.numbers import number
from eaft_verl.reporting.markdown import Cell, Table

HALF = 0.05  # a printed number is the exact one to half a unit of its last digit
QUESTIONS, RUNS = 30, 3  # of AIME; the scores are said to be means over three runs
OURS = {"BFCL_v3": "bfcl"}  # column: how our benchmarks for it begin, where that is not its own name
METHODS = {"SFT_KL": "sft_kl"}  # method: our arm, where that is not its name in small letters

Row = dict[str, Any]


@cache
def published() -> Row:
    """paper.json: {source, unit, elsewhere, tables: {number: {domain, target, general, rows}}}."""
    return dict(json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8")))


def require_table(name: str) -> None:
    """RunError for a table that does not exist."""
    if name not in published()["tables"]:
        found = "; ".join(f"{key}: {one['domain']}" for key, one in published()["tables"].items())
        raise RunError(f"--paper {name} is no table of scores of the paper; it has {found}")


def inconsistencies(name: str) -> list[str]:
    """Every printed number of a table that cannot follow from the others, whatever their rounding; then the text's."""
    table = published()["tables"][name]
    found = [line for row in table["rows"] for line in (*_averages(table, row), *_aime(row), *_drop(table, row))]
    said = [f"{row['where']}: {row['what']}" for row in published()["elsewhere"] if row["table"] == name]
    return found + _alike(table) + said


def _label(row: Row) -> str:
    return f"{row['model']}, {row['method'].replace('_', '-')}"


def mean(row: Row, benchmarks: list[str]) -> float:
    """Of the printed scores: within HALF of the exact one."""
    return sum(row["scores"][one] for one in benchmarks) / len(benchmarks)


def _averages(table: Row, row: Row) -> list[str]:
    sides = [(side, row["printed"][side], mean(row, table[side])) for side in ("target", "general")]
    return [
        f"{_label(row)}: the {side} mean is printed as {printed:.1f}, its scores give {ours:.2f}"
        for side, printed, ours in sides
        if printed is not None and abs(printed - ours) > 2 * HALF + 1e-9
    ]


def _drop(table: Row, row: Row) -> list[str]:
    """The drop against the means that the scores give: two means to HALF, and its own rounding."""
    base = next(one for one in table["rows"] if one["model"] == row["model"] and one["method"] == "base")
    printed, ours = row["printed"]["drop"], mean(row, table["general"]) - mean(base, table["general"])
    if printed is None or abs(printed - ours) <= 3 * HALF + 1e-9:
        return []
    return [f"{_label(row)}: the general drop is printed as {printed:.1f}, the scores give {ours:.2f}"]


def _aime(row: Row) -> list[str]:
    """A mean of three runs over thirty questions is a multiple of 1/90."""
    step = 100 / (QUESTIONS * RUNS)
    return [
        f"{_label(row)}: {name} {score:.1f} is no number of right answers out of {QUESTIONS * RUNS}"
        for name, score in row["scores"].items()
        if name.startswith("AIME") and abs(score - round(score / step) * step) > HALF + 1e-9
    ]


def _alike(table: Row) -> list[str]:
    """How many AIME scores one run alone could give, though all are said to be means of three."""
    scores = [score for row in table["rows"] for name, score in row["scores"].items() if name.startswith("AIME")]
    single = sum(abs(score - round(score * 0.3) / 0.3) <= HALF + 1e-9 for score in scores)
    if not scores:
        return []
    what = f"{single} of {len(scores)} AIME scores are multiples of 1/{QUESTIONS}"
    return [f"{what}, as of single runs; of means of three, a third would be by chance"]


def beside(report: Row, name: str) -> Row:
    """{table, domain, unit, inconsistencies, columns, rows: [{model, method, theirs, arm, ours}], missing,
    other_model}.

    theirs, ours: {column: percent}; ours: {score, low, high} of the arm of that method. Rows are those of the report's
    model; of a model that the table does not have, all of it, and our arms for themselves.
    """
    table = published()["tables"][name]
    columns = [*table["target"], *table["general"]]
    shared = {one: name_here for one in columns if (name_here := _benchmark(report, one))}
    model = Path(str(report["model"]).partition("@")[0]).name.lower()
    rows = [row for row in table["rows"] if row["model"].lower() == model.replace("glm-4-", "glm4-")]
    found: list[Row] = [
        {"model": row["model"], "method": row["method"], "theirs": row["scores"], "arm": None, "ours": {}}
        for row in rows or table["rows"]
    ]
    _set_ours(found, report, shared, matched=bool(rows))
    missing = [column for column in columns if column not in shared]
    about = {"table": name, "domain": table["domain"], "unit": published()["unit"]}
    return about | {
        "inconsistencies": inconsistencies(name), "columns": columns, "rows": found,
        "missing": missing, "other_model": not rows,
    }  # fmt: skip


def _set_ours(found: list[Row], report: Row, shared: dict[str, str], *, matched: bool) -> None:
    """Our arms into the rows of their methods where the table has the model, else as rows of their own."""
    for arm in ["base", *report["arms"]]:
        cells = report["results"][arm]
        ours = {column: _percent(cells[one]) for column, one in shared.items() if one in cells}
        theirs = (row for row in found if matched and arm == METHODS.get(row["method"], row["method"].lower()))
        if same := next(theirs, None):
            same |= {"arm": arm, "ours": ours}
        elif ours:
            found.append({"model": report["model"], "method": arm, "theirs": {}, "arm": arm, "ours": ours})


def _benchmark(report: Row, column: str) -> str | None:
    """Our benchmark for a column: gsm8k, gsm8k_boxed and gsm8k_cot are GSM8K."""
    begins = OURS.get(column, column.lower())
    ids = [one["id"] for one in report["columns"] if one["percent"] and not one["members"]]
    return next((one for one in ids if one == begins or one.startswith(f"{begins}_")), None)


def _percent(cell: Row) -> Row:
    return {key: None if cell[key] is None else 100 * cell[key] for key in ("score", "low", "high")}


def paper_table(report: Row) -> Table:
    """Theirs, ours and the difference, a line for each method, a column for each benchmark."""
    found = report["paper"]
    rows = []
    for row in found["rows"]:
        cells = [Cell(row["model"], (row["method"].replace("_", "-"),))]
        cells += [_both(row["theirs"].get(column), row["ours"].get(column)) for column in found["columns"]]
        rows.append(cells)
    return Table([Cell("Model, method"), *(Cell(column, ("paper", "here")) for column in found["columns"])], rows)


def _both(theirs: float | None, ours: Row | None) -> Cell:
    if ours is None:
        return Cell(number(theirs, 1), (number(None),))
    interval = f" [{number(ours['low'], 1)}, {number(ours['high'], 1)}]" if ours["low"] is not None else ""
    less = "" if theirs is None else f"here less paper {number(ours['score'] - theirs, 1, signed=True)}"
    return Cell(number(theirs, 1), (number(ours["score"], 1) + interval, *filter(None, [less])))
