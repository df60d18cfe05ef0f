"""What an arm may spend, in four units, and how long it trains for it. Pure arithmetic: no torch, no files.

updates         optimizer updates
tokens          trained tokens + generated tokens: generation is a cost
samples         sequences trained on
device_seconds  seconds of training times devices, with generation and the passes over the data before the first step
"""

from collections.abc import Iterable, Sequence
from typing import Any

UNITS = ("updates", "tokens", "samples", "device_seconds")
MATCHES = (*UNITS, "none")
TOLERANCE = 0.05  # relative difference up to which two budgets count as equal
NEAREST = {"updates": 0.0, "tokens": 0.5, "samples": 0.5, "device_seconds": 1.0}  # of a step: how near an arm can stop
PASSES = ("base_pass", "reference_cache")  # of run.json: the base model's statistics, the stored reference
WINDOW_SHARE = 0.1  # of the reference's updates: the trailing mean over which a training NLL is read

Row = dict[str, Any]
Spent = dict[str, float | None]


def spent(info: Row, rows: Sequence[Row]) -> Spent:
    """{unit: amount} of one run, from its run.json and its training rows; None where the run did not log it.

    An average is made without an update.
    """
    last = rows[-1] if rows else {}
    seconds = info.get("train_seconds")
    if "average" in info:
        return {**dict.fromkeys(UNITS, 0.0), "device_seconds": seconds}
    return {
        "updates": last.get("step", info.get("total_steps")),
        "tokens": paid_tokens(last),
        "samples": last.get("samples"),
        "device_seconds": None if seconds is None or "workers" not in info else seconds * info["workers"],
    }


def paid_tokens(row: Row) -> float | None:
    """Trained and generated tokens up to this training row; None where it does not say."""
    tokens = row.get("tokens")
    return None if tokens is None else tokens + (row.get("generated_tokens") or 0)


def before_training(info: Row) -> float:
    """Seconds of `train_seconds` that went into passes over the data before the first step."""
    return float(sum(info[name]["seconds"] for name in PASSES if name in info))


def steps_for(amount: float, costs: Iterable[float]) -> int:
    """Number of steps, at least 1, whose summed cost is nearest to `amount`; of two equally near the smaller.

    costs: of step 1, 2, ...; must not end before the amount is reached.
    """
    used = 0.0
    for steps, cost in enumerate(costs, 1):
        if used + cost >= amount:
            return steps if steps == 1 or used + cost - amount < amount - used else steps - 1
        used += cost
    raise ValueError(f"the costs end at {used}, before {amount} is reached")


def matches(unit: str, own: Spent, reference: Spent) -> bool | None:
    """Whether two budgets are equal within TOLERANCE, or as near as the arm can stop; None if one is not known.

    It stops between two steps: in tokens and samples at the nearest one, in seconds at the first beyond the budget.
    """
    mine, other = own[unit], reference[unit]
    if mine is None or other is None:
        return None
    step = mine / own["updates"] if own["updates"] else 0.0
    return abs(mine - other) <= max(TOLERANCE * other, NEAREST[unit] * step)


def nll_window(updates: int) -> int:
    """Steps of the trailing mean: a tenth of the reference's updates, at least one."""
    return max(1, round(WINDOW_SHARE * updates))


def smoothed_nll(rows: Sequence[Row], window: int) -> float:
    """Mean training NLL, nats per token, over all tokens of the last `window` rows."""
    part = rows[-window:]
    return sum(float(row["nll"]) * row["step_tokens"] for row in part) / sum(row["step_tokens"] for row in part)


def is_evaluated(step: int, total: int) -> bool:
    """Whether the model is exported and evaluated after this step: the 1st, 2nd, 4th, 8th, ... and the last.

    Learners of different speed are compared at equal gain, which a slow one reaches late and a fast one within its
    first steps: equal ratios serve both. A power of two with more than 2/3 of the steps behind it leaves it to the end.
    """
    return step == total or (step & (step - 1) == 0 and 3 * step <= 2 * total)


def evaluation_points(total: int) -> list[int]:
    """All steps at which the arm is evaluated: 16 -> [1, 2, 4, 8, 16]."""
    return [step for step in range(1, total + 1) if is_evaluated(step, total)]
