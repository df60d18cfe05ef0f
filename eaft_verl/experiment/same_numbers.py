"""Every number of a run beside that of the same run made once more: equal, within tolerance, or different."""

from collections import Counter
from typing import Any

from eaft_verl.files import read_json
from eaft_verl.runs import Run

BIT_EQUAL, ROUNDING, FLOOR, DIFFERENT = VERDICTS = ("bit-equal", "rounding", "noise floor", "different")
RELATIVE = 1e-5  # of two numbers that sums of float32 in another order give
ABSOLUTE = 1e-8
MEASURED = ("split", "step", "time", "seconds", "memory_gib", "rollout_memory_gib")  # and *_s: of the machine

Row = dict[str, Any]


def compared(first: Run, second: Run) -> list[Row]:
    """[{metric, first, second, difference, floor, verdict, changed}] of all that the first run logged and scored.

    first, second: the last value. difference: absolute, the largest over steps or of the score. floor: what the base
    differs from itself by, None where that is not known or not of this metric. changed: 'k of n' values or answers.
    verdict: 'bit-equal' if no value differs; 'rounding' within RELATIVE of each value; 'noise floor' if the difference
    of the score, and the share of answers that became right or wrong, is no larger; else 'different', also for what is
    missing.
    """
    rows = [row for split in ("train", "val") for row in _logged(first, second, split)]
    return rows + _scored(first, second)


def summary(rows: list[Row]) -> str:
    """'24 numbers: 20 bit-equal, 4 rounding'."""
    counts = Counter(row["verdict"] for row in rows)
    return f"{len(rows)} numbers: " + ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name])


def table(rows: list[Row]) -> list[str]:
    """Aligned lines with a header; bit-equal numbers are only counted."""
    shown = [row for row in rows if row["verdict"] != BIT_EQUAL]
    cells = [("metric", "first", "now", "difference", "floor", "verdict", "changed")] if shown else []
    for row in shown:
        numbers = (_text(row[name]) for name in ("first", "second", "difference", "floor"))
        cells.append((row["metric"], *numbers, row["verdict"], row["changed"]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _logged(first: Run, second: Run, split: str) -> list[Row]:
    old, new = ({row["step"]: row for row in run.metrics(split)} for run in (first, second))
    names = sorted({name for row in old.values() for name in row if not _of_machine(name)})
    found = []
    for name in names:
        steps = sorted(step for step in old.keys() | new.keys() if name in old.get(step, {}) or step not in old)
        pairs = [(old.get(step, {}).get(name), new.get(step, {}).get(name)) for step in steps]
        found.append(_row(f"{split} {name}", pairs, *pairs[-1]))
    return found


def _of_machine(name: str) -> bool:
    return name in MEASURED or name.endswith("_s")


def _scored(first: Run, second: Run) -> list[Row]:
    old, new, floors = first.evals(), second.evals(), _floors(first)
    found = []
    for step, records in old.items():
        for benchmark, record in records.items():
            other = new.get(step, {}).get(benchmark, {"metrics": {}})
            answers = _answers(first, step, benchmark), _answers(second, step, benchmark)
            for metric, entry in record["metrics"].items():
                score, again = entry["score"], other["metrics"].get(metric, {}).get("score")
                ids = sorted(answers[0].keys() | answers[1].keys())
                both = ((answers[0].get(key, {}).get(metric), answers[1].get(key, {}).get(metric)) for key in ids)
                pairs = [pair for pair in both if pair != (None, None)]
                floor = floors.get(f"{benchmark}.{metric}", floors.get(benchmark))
                found.append(_row(f"step {step} {benchmark} {metric}", [*pairs, (score, again)], score, again, floor))
    return found


def _answers(run: Run, step: int, benchmark: str) -> dict[str, Row]:
    """{id: scores} of one benchmark."""
    return {sample["id"]: sample["scores"] for sample in run.samples(step, benchmark)}


def _floors(run: Run) -> dict[str, float]:
    """{benchmark or benchmark.metric: size} that the base, beside the run, differs from itself by; {} if not known."""
    path = next(
        (
            folder / "eval" / "noise.json"
            for folder in (run.path, run.path.parent / "base")
            if (folder / "eval" / "noise.json").is_file()
        ),
        None,
    )
    if path is None:
        return {}
    noise = read_json(path)
    found = {"heldout": noise["nll"], "drift.kl": noise["kl"], "drift.nll": noise["nll"]}
    if noise["agreement"] is not None:
        found["drift.agreement"] = abs(noise["agreement"] - 1.0)
    found |= {name: max(row["difference"], row["changed"] / row["n"]) for name, row in noise["accuracy"].items()}
    return {name: abs(size) for name, size in found.items() if size is not None}


def _row(metric: str, pairs: list[tuple[Any, Any]], first: Any, second: Any, floor: float | None = None) -> Row:
    """pairs: every value behind the number, of which `first` and `second` are the last or the mean."""
    changed = sum(one != other for one, other in pairs)
    row = {"metric": metric, "first": first, "second": second, "floor": floor, "changed": f"{changed} of {len(pairs)}"}
    sizes = [_distance(one, other) for one, other in pairs]
    gap = _distance(first, second) if floor is not None else max(sizes, default=0.0)
    if floor is not None and all(value in (0.0, 1.0) for pair in pairs[:-1] for value in pair):
        gap = max(gap, sum(sizes[:-1]) / max(len(pairs) - 1, 1))  # right and wrong may change places
    if not changed:
        verdict = BIT_EQUAL
    elif all(size <= ABSOLUTE + RELATIVE * _size(one) for size, (one, _) in zip(sizes, pairs, strict=True)):
        verdict = ROUNDING
    else:
        verdict = FLOOR if floor and gap <= floor else DIFFERENT  # a floor of 0 excuses nothing
    return {**row, "difference": gap, "verdict": verdict}


def _distance(one: Any, other: Any) -> float:
    """|one - other|, the largest of a list; infinite where they are not both numbers and differ."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((_distance(*pair) for pair in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other)
    return 0.0 if one == other else float("inf")


def _size(value: Any) -> float:
    """|value|, the smallest of a list."""
    if isinstance(value, list):
        return min(map(_size, value), default=0.0)
    return abs(value) if isinstance(value, int | float) else 0.0
