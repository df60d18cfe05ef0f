"""Tables of the report: rows of cells built from report.json's data."""

from typing import Any

from eaft_verl.pages.numbers import DASH, number, percent
from eaft_verl.reporting.markdown import Cell, Table
from eaft_verl.reporting.wording import AXES_IN_WORDS, arm_name, direction, floor, score, span

Row = dict[str, Any]
SIDES = {"target": "target", "general": "general", "drift": "drift from the base"}
UNITS = ("updates", "tokens", "samples", "device_seconds")


def headline_table(report: Row) -> Table:
    """Up to three numbers an arm: change of the target and of general skill, KL to the base; with their intervals."""
    columns = {column["id"]: column for column in report["columns"]}
    target = "target_mean" if "target_mean" in columns else "heldout"
    named = "Target" if target == "target_mean" else "Held-out NLL"
    shown = {target: named, "general_mean": "General", "drift.kl": "KL to base"}
    shown = {name: title for name, title in shown.items() if name in columns}
    units = ["points" if columns[name]["percent"] else "nats" for name in shown]
    units = [
        unit if name == "drift.kl" else f"{unit} against the base" for name, unit in zip(shown, units, strict=True)
    ]
    header = [Cell(title, (unit,)) for title, unit in zip(shown.values(), units, strict=True)]
    rows = [
        [_name(report, arm), *(_key_figure(columns[name], report["results"][arm].get(name)) for name in shown)]
        for arm in rows_of(report)
    ]
    return Table([Cell(""), *header], rows)


def rows_of(report: Row) -> list[str]:
    """The arms, then the models that were evaluated beside them."""
    return [*report["arms"], *report["models"]]


def _key_figure(column: Row, cell: Row | None) -> Cell:
    if cell is None or "delta" not in cell:
        return Cell(DASH)
    if column["id"] == "drift.kl":
        return Cell(score(column, cell["score"]), (span(column, cell, signed=False),))
    return _difference(column, cell["delta"], strong=False)


def results_table(report: Row) -> Table:
    """Base and arms by measure: score and standard error, change against the base with its interval."""
    columns, results = report["columns"], report["results"]
    rows = [
        [_name(report, arm), *(_score(column, results[arm].get(column["id"])) for column in columns)]
        for arm in ["base", *rows_of(report)]
    ]
    return Table([Cell(""), *map(_heading, columns)], rows)


def _heading(column: Row) -> Cell:
    better = "\u2191" if column["higher_is_better"] else "\u2193"
    what = column["metric"] if not column["members"] and column["name"] == column["id"] else ""
    size = f"n = {column['n']:,}" if column["n"] else ""
    noise = f"noise {floor(column)}" if column["floor"] is not None else ""
    lines = (SIDES[column["side"]], what, column["unit"], size, noise)
    return Cell(f"{column['name']} {better}", tuple(line for line in lines if line))


def _name(report: Row, arm: str) -> Cell:
    seeds = report["seeds"].get(arm, [])
    lines = [f"{len(seeds)} seeds"] if len(seeds) > 1 else []
    lines += [f"control of {arm_name(item['of'])}" for item in report["controls"] if item["arm"] == arm]
    if arm in report["models"]:
        lines.append("a model as it is, not trained here")
    return Cell(arm_name(arm), tuple(lines), arm=arm, strong=True)


def _score(column: Row, cell: Row | None) -> Cell:
    if cell is None:
        return Cell(DASH)
    text = score(column, cell["score"])
    if cell["stderr"] is not None:
        text += f" \u00b1{score(column, cell['stderr'])}"
    if "delta" not in cell:
        return Cell(text, strong=bool(column["members"]))
    change = score(column, cell["delta"]["delta"], signed=True)
    lines = (change, span(column, cell["delta"]))
    return Cell(text, lines, direction(column, cell["delta"]), strong=bool(column["members"]))


def versus_table(report: Row) -> Table:
    """Paired difference of every arm to the reference arm."""
    return _differences(report, [(_name(report, arm), cells) for arm, cells in report["versus"]["arms"].items()])


def moved_table(report: Row) -> Table:
    """Loss of conflicts and of other tokens, by run and step; below it the change to the base."""
    first, *rows = report["analysis"]["moved"]
    header = [Cell("run"), Cell("step"), Cell("conflicts"), Cell("all others")]
    lines = [[Cell(first["arm"], strong=True), Cell("0"), *(Cell(number(_nll(first, group))) for group in _MOVED)]]
    for row in rows:
        cells = []
        for group in _MOVED:
            before, after = _nll(first, group), _nll(row, group)
            known = before is not None and after is not None
            cells.append(Cell(number(after), (number(after - before, signed=True),) if known else ()))
        lines.append([Cell(row["arm"], strong=True), Cell(f"{row['step']:,}"), *cells])
    return Table(header, lines)


_MOVED = ("conflict", "no_conflict")


def _nll(row: Row, group: str) -> Any:
    return row["fixed"][group]["nll"]


def controls_table(report: Row) -> Table:
    """Paired difference of an arm to each of its controls; no row if no control stands beside its arm."""
    rows = [
        (Cell(f"{arm_name(item['of'])} \u2212 {item['arm']}", arm=item["of"], strong=True), item["versus"])
        for item in report["controls"]
        if item["versus"]
    ]
    return _differences(report, rows)


def _differences(report: Row, rows: list[tuple[Cell, Row]]) -> Table:
    columns = report["columns"]
    header = [Cell(column["name"], (SIDES[column["side"]],)) for column in columns]
    filled = [[name, *(_difference(column, cells.get(column["id"])) for column in columns)] for name, cells in rows]
    return Table([Cell(""), *header], filled)


def _difference(column: Row, bounds: Row | None, strong: bool = True) -> Cell:
    if bounds is None:
        return Cell(DASH)
    text = score(column, bounds["delta"], signed=True)
    strong = strong and bool(column["members"])
    return Cell(text, (span(column, bounds),), direction(column, bounds), strong=strong)


def equal_gain_table(report: Row) -> Table:
    """KL and step where each arm reaches the same gain, with the paired difference to the first arm."""
    columns = {column["id"]: column for column in report["columns"]}
    header = [Cell("")]
    rows = [[_name(report, arm)] for arm in report["arms"]]
    for axis, title in AXES_IN_WORDS.items():
        for level in report["equal_gain"].get(axis, {}).get("levels", []):
            gain, unit = columns[axis], " points" if columns[axis]["percent"] else " nats"
            reached = score(gain, level["level"]) + unit
            header.append(Cell(percent(level["fraction"]), (f"of the gain in {title}", f"gain {reached}")))
            for row, arm in zip(rows, report["arms"], strict=True):
                row.append(_reached(columns["drift.kl"], level["arms"][arm], report["arms"][0]))
    return Table(header, rows)


def _reached(kl: Row, item: Row | None, reference: str) -> Cell:
    if item is None:
        return Cell("not reached")
    if "withheld" in item:
        return Cell("before its first evaluation")
    step = number(item["step"], 0 if item["step"] == int(item["step"]) else 1)
    text, lines = f"KL {score(kl, item['kl'])}", [_bracket(kl, item, signed=False), f"step {step}"]
    mark = ""
    if "difference" in item:
        apart = item["difference"]
        mark = direction(kl, apart)
        lines += [f"against {arm_name(reference)} {score(kl, apart['delta'], signed=True)}", _bracket(kl, apart)]
    return Cell(text, tuple(line for line in lines if line), mark)


def _bracket(column: Row, bounds: Row, *, signed: bool = True) -> str:
    return "" if bounds["low"] is None else span(column, bounds, signed=signed)


def config_table(report: Row) -> Table:
    """Config keys that differ between arm runs, declared or not."""
    found = [item for item in report["config_differences"] if not item["of_trainer"] and _is_set(item)]
    labels = {arm: [f"{arm} seed {seed}" for seed in seeds] for arm, seeds in report["seeds"].items()}
    if all(len({item["values"][label] for label in group}) == 1 for item in found for group in labels.values()):
        shown = {arm_name(arm): group[0] for arm, group in labels.items()}
    else:
        shown = {label: label for group in labels.values() for label in group}
    rows = []
    for item in found:
        verdict = Cell("declared") if item["declared"] else Cell("UNDECLARED", mark="worse")
        rows.append([Cell(item["key"]), *(Cell(_short(item["values"][label])) for label in shown.values()), verdict])
    return Table([Cell("Key"), *map(Cell, shown), Cell("")], rows, numeric=False)


def _is_set(item: Row) -> bool:
    """Whether an arm gives the key a value; else keys below it stand in the table, or nothing differs."""
    return not set(item["values"].values()) <= {"null", "(absent)"} or not item["declared"]


def _short(text: str) -> str:
    """A number of many digits to six significant ones; report.json keeps them all."""
    try:
        return text if len(text) < 9 else f"{float(text):.6g}"
    except ValueError:
        return text


def budgets_table(report: Row) -> Table:
    """What each arm spent in the four units, and its ratio to the arm it is matched to."""
    found = report["budgets"]
    header = [
        Cell(unit.replace("_", " ").capitalize(), ("matched",) if unit == found["match"] else ()) for unit in UNITS
    ]
    rows = [
        [_name(report, item["arm"]), *(_amount(item, unit) for unit in UNITS), _ratio(found, item)]
        for item in found["arms"]
    ]
    return Table([Cell(""), *header, Cell("Of the budget")], rows)


def _amount(item: Row, unit: str) -> Cell:
    value, made, before = item["spent"][unit], item["generated_tokens"], (item["before"] or {}).get(unit)
    lines: tuple[str, ...] = (f"{number(made, 0)} generated",) if unit == "tokens" and made else ()
    if before is not None:
        lines += (f"after {number(before, 0)} of its chain",)
    digits = int(value is not None and value % 1 > 0) if unit == "updates" else int(unit == "device_seconds")
    return Cell(number(value, digits), lines)


def _ratio(found: Row, item: Row) -> Cell:
    if item["ratio"] is None:
        return Cell(DASH)
    if item["control"]:
        said = "control, exempt"
    elif item["average"]:
        said = "average, not trained"
    elif item["alarmed"]:
        said = "ended by its meter, exempt"
    elif item["arm"] == found["to"]:
        said = "the others are matched to it"
    else:
        said = {True: "matched", False: "NOT MATCHED", None: "not known"}[item["equal"]]
    return Cell(percent(item["ratio"], 1), (said,), "worse" if item["equal"] is False else "")


def failed_table(report: Row) -> Table:
    """Runs that failed, with what they said."""
    rows = [[Cell(f"{row['arm']} seed {row['seed']}", mark="worse"), Cell(row["error"])] for row in report["failed"]]
    return Table([Cell("Run"), Cell("Cause")], rows, numeric=False)


def cost_table(report: Row) -> Table:
    """Training and evaluation seconds, speed and memory of each arm; the share of generation where there is any."""
    header = {
        "train_seconds": "Training, s",
        "generation_share": "of it generation",
        "eval_seconds": "Evaluation, s",
        "tokens_per_s": "Trained tokens per s",
        "memory_gib": "Peak memory, GiB",
        "seeds": "Seeds",
    }
    if all(item["generation_share"] is None for item in report["cost"]):
        del header["generation_share"]
    rows = [
        [Cell(arm_name(item["arm"]), arm=item["arm"], strong=True), *(Cell(_cost(name, item[name])) for name in header)]
        for item in report["cost"]
    ]
    return Table([Cell(""), *map(Cell, header.values())], rows)


def _cost(name: str, value: Any) -> str:
    if name == "seeds":
        return ", ".join(map(str, value))
    return percent(value) if name == "generation_share" else number(value, 2 if name == "memory_gib" else 0)


def sources_table(report: Row) -> Table:
    """Of each part of the training data: rows taken and left, and what it trains."""
    header = ("Source", "Rows", "left out", "rejected", "Examples", "Trained tokens", "Share")
    found = report["sources"]
    total = sum(one["tokens"]["trained"] for one in found.values())
    rows = []
    for name, one in found.items():
        trained = one["tokens"]["trained"]
        counts = (one["kept"], one["left_out"], sum(one["rejected"].values()), one["examples"], trained)
        rows.append([Cell(name), *(Cell(f"{count:,}") for count in counts), Cell(percent(trained / max(total, 1)))])
    return Table([*map(Cell, header)], rows)


def environment_tables(report: Row) -> list[Table]:
    """Where the runs lie, then what differs between them, then what is equal in all."""
    found = report["environment"]
    differing = [(key, *row.values()) for key, row in found["differing"].items()]
    return [
        _texts(["Run", "Folder, relative to this report"], [*found["runs"].items()]),
        _texts(["Differs between runs", *found["runs"]], differing),
        _texts(["Equal in all runs", ""], [*found["equal"].items()]),
    ]


def _texts(header: list[str], rows: list[tuple[str, ...]]) -> Table:
    return Table([*map(Cell, header)], [[*map(Cell, row)] for row in rows], numeric=False)
