"""What an arm may spend, in four units, and how long it trains for it. Pure arithmetic: no torch, no files.

updates         optimizer updates
tokens          trained tokens + generated tokens: generation is a cost
samples         sequences trained on
device_seconds  seconds of training, generation included, times devices
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

UNITS = ("updates", "tokens", "samples", "device_seconds")
MATCHES = (*UNITS, "none")
TOLERANCE = 0.05  # relative difference up to which two budgets count as equal
NEAREST = {"updates": 0.0, "tokens": 0.5, "samples": 0.5, "device_seconds": 1.0}  # of a step: how near an arm can stop
WINDOW_SHARE = 0.1  # of the reference's updates: the trailing mean over which a training NLL is read

Row = dict[str, Any]
Spent = dict[str, float | None]


def spent(info: Row, rows: Sequence[Row]) -> Spent:
    """{unit: amount} of one run, from its run.json and its training rows; None where the run did not log it."""
    last = rows[-1] if rows else {}
    tokens, seconds = last.get("tokens"), info.get("train_seconds")
    return {
        "updates": last.get("step"),
        "tokens": None if tokens is None else tokens + (last.get("generated_tokens") or 0),
        "samples": last.get("samples"),
        "device_seconds": None if seconds is None or "workers" not in info else seconds * info["workers"],
    }


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


def mean_weight(rows: Sequence[Row]) -> float:
    """Mean weight over all trained tokens of a run: sum of weight_mean * step_tokens over sum of step_tokens."""
    tokens = sum(row["step_tokens"] for row in rows)
    return sum(float(row["weight_mean"]) * row["step_tokens"] for row in rows) / tokens


def nll_window(updates: int) -> int:
    """Steps of the trailing mean: a tenth of the reference's updates, at least one."""
    return max(1, round(WINDOW_SHARE * updates))


def smoothed_nll(rows: Sequence[Row], window: int) -> float:
    """Mean training NLL, nats per token, over all tokens of the last `window` rows."""
    part = rows[-window:]
    return sum(float(row["nll"]) * row["step_tokens"] for row in part) / sum(row["step_tokens"] for row in part)


def evaluation_points(total: int, points: int) -> list[int]:
    """Steps at which the arm is evaluated: evenly spaced, the last at the end; fewer where there are fewer steps."""
    return sorted({max(1, round(total * point / points)) for point in range(1, points + 1)})


class Moment(NamedTuple):
    """What happens after a step: the model is exported for evaluation, training ends."""

    evaluate: bool
    last: bool


class FixedSteps:
    """A number of updates known beforehand, evaluated at evenly spaced ones. `expected`: updates in the end."""

    def __init__(self, total: int, points: int) -> None:
        self.expected = total
        self.points = set(evaluation_points(total, points))

    def after(self, row: Row) -> Moment:
        """What happens after this training row; rows come in order, after a restart from the first one again."""
        return Moment(row["step"] in self.points, row["step"] >= self.expected)

    def outcome(self) -> Row:
        """What run.json is to say of how training ended."""
        return {}


class DeviceSeconds:
    """Training until a budget of device seconds is used, evaluated whenever another share of it is.

    It ends with the step whose end is nearest to the budget, taking the next step to last as long as this one.
    """

    def __init__(self, amount: float, devices: int, points: int, expected: int) -> None:
        self.amount, self.devices, self.points, self.expected = amount, devices, points, expected
        self.evaluated = 0

    def after(self, row: Row) -> Moment:
        """As in FixedSteps."""
        used = row["seconds"] * self.devices
        reached = (used + row["step_s"] * self.devices / 2) / self.amount
        shares = min(self.points, math.floor(reached * self.points + 1e-9))
        moment = Moment(shares > self.evaluated, shares == self.points)
        self.evaluated = max(self.evaluated, shares)
        self.expected = row["step"] if moment.last else max(row["step"] + 1, round(row["step"] * self.amount / used))
        return moment

    def outcome(self) -> Row:
        """As in FixedSteps."""
        return {}


class UntilNll(FixedSteps):
    """At most `total` updates, ending with the first one at which the smoothed training NLL is down to `level`."""

    def __init__(self, total: int, points: int, level: float, window: int) -> None:
        super().__init__(total, points)
        self.level, self.window = level, window
        self.rows: deque[Row] = deque(maxlen=window)
        self.reached = False

    def after(self, row: Row) -> Moment:
        """As in FixedSteps."""
        self.rows.append(row)
        full = len(self.rows) == self.window
        self.reached = full and smoothed_nll(list(self.rows), self.window) <= self.level
        if self.reached:
            self.expected = row["step"]
        return Moment(True, True) if self.reached else super().after(row)

    def outcome(self) -> Row:
        """Whether the level was reached: without that the run is no control of what it was meant to be."""
        return {"nll_reached": self.reached}
