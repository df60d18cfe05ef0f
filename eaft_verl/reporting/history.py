"""What training logged, as curves on three common axes."""

import math
from typing import Any

from eaft_verl.recipe.budgets import paid_tokens
from eaft_verl.reporting.collect import Arm, RunData

STATISTICS = (
    "loss",
    "nll",
    "val_nll",
    "token_accuracy",
    "entropy",
    "weight_mean",
    "ess",
    "conflict_share",
    "nll_low_entropy",
    "nll_high_entropy",
    "grad_norm",
    "lr",
    "reward",
    "groups_equal_share",
    "generated_tokens",
    "generation_share",
)
SHARES = {"groups_equal_share": ("groups_equal", "groups"), "generation_share": ("generation_s", "step_s")}
BAND = ("weight_p10", "weight_p90")
AXES = ("step", "tokens", "seconds")
Row = dict[str, Any]
Series = list[float | None]


def curves(arms: list[Arm], notes: list[str]) -> list[Row]:
    """[{arm, seed, train: {axis or statistic: [..]}, val: {step, tokens, seconds, val_nll}}], missing values None."""
    found = []
    for arm in arms:
        for run in arm.runs:
            train, val = [_complete(row) for row in run.rows], run.run.metrics("val")
            if not train:
                notes.append(f"{run.label}: metrics.jsonl is missing or empty, so it has no curves and no budget")
            _note_non_finite(run, train, notes)
            logged = {name: series(train, name) for name in (*AXES, *STATISTICS, *BAND) if name != "val_nll"}
            found.append({"arm": arm.name, "seed": run.info["seed"], "train": logged, "val": _validation(train, val)})
    return found


def _complete(row: Row) -> Row:
    """The row with shares of two logged values, and tokens as they are paid for: trained and generated."""
    found = dict(row)
    for name, (part, whole) in SHARES.items():
        top, bottom = finite(row.get(part)), finite(row.get(whole))
        if top is not None and bottom:
            found[name] = top / bottom
    return found | {"tokens": paid_tokens(row)}


def series(rows: list[Row], name: str) -> Series:
    """One logged value of every row; None where it is missing or not finite."""
    return [finite(row.get(name)) for row in rows]


def finite(value: Any) -> float | None:
    """A finite number or None; metrics may be missing, null or the strings 'nan' and 'inf'."""
    if value is None or not math.isfinite(float(value)):
        return None
    return float(value)


def _note_non_finite(run: RunData, rows: list[Row], notes: list[str]) -> None:
    bad = [
        row["step"] for row in rows for name in STATISTICS if row.get(name) is not None and finite(row[name]) is None
    ]
    if bad:
        notes.append(f"{run.label}: logged values that are not finite at step {', '.join(map(str, sorted(set(bad))))}")


def _validation(train: list[Row], val: list[Row]) -> dict[str, Series]:
    """Validation rows carry the step only: tokens and seconds are those of the last training row up to it."""
    steps = [0, *(row["step"] for row in train)]
    axes = {name: [0.0, *series(train, name)] for name in ("tokens", "seconds")}
    found: dict[str, Series] = {"step": [], "tokens": [], "seconds": [], "val_nll": []}
    for row in val:
        last = max(index for index, step in enumerate(steps) if step <= row["step"])
        found["step"].append(row["step"])
        found["val_nll"].append(finite(row.get("nll")))
        for name, values in axes.items():
            found[name].append(values[last])
    return found
