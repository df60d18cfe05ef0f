"""When an arm is evaluated and when its training ends."""

import time
from collections import deque
from typing import NamedTuple

from eaft_verl.recipe.budgets import Row, is_evaluated, smoothed_nll
from eaft_verl.recipe.config import Config

MAX_NONFINITE_STEPS = 5  # in a row; verl skips such an update and goes on for ever


class SaveClock:
    """When a state is to be saved because of the time: whenever another step would make the last one too old."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """A state has been saved."""
        self.saved = time.monotonic()

    def due(self, step_s: float) -> bool:
        """Whether the last state would be too old after another step of `step_s` seconds."""
        return time.monotonic() - self.saved + step_s >= self.seconds


class Moment(NamedTuple):
    """What happens after a step: the model is exported for evaluation, training ends."""

    evaluate: bool
    last: bool


class FixedSteps:
    """A number of updates known beforehand. `expected`: updates in the end."""

    def __init__(self, total: int) -> None:
        self.expected = total

    def after(self, row: Row) -> Moment:
        """What happens after this training row; rows come in order, after a restart from the first one again."""
        return Moment(is_evaluated(row["step"], self.expected), row["step"] >= self.expected)

    def outcome(self) -> Row:
        """What run.json is to say of how training ended."""
        return {}


class DeviceSeconds:
    """Training until a budget of device seconds is used; how many steps that takes is foretold by the pace so far.

    It ends with the step whose end is nearest to the budget, taking the next step to last as long as this one.
    """

    def __init__(self, amount: float, devices: int, expected: int) -> None:
        self.amount, self.devices, self.expected = amount, devices, expected

    def after(self, row: Row) -> Moment:
        """As in FixedSteps."""
        used = row["seconds"] * self.devices
        last = used + row["step_s"] * self.devices / 2 >= self.amount * (1 - 1e-9)
        self.expected = row["step"] if last else max(row["step"] + 1, round(row["step"] * self.amount / used))
        return Moment(is_evaluated(row["step"], self.expected), last)

    def outcome(self) -> Row:
        """As in FixedSteps."""
        return {}


class UntilNll(FixedSteps):
    """At most `total` updates, ending with the first one at which the smoothed training NLL is down to `level`."""

    def __init__(self, total: int, level: float, window: int) -> None:
        super().__init__(total)
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


Plan = FixedSteps | DeviceSeconds | UntilNll


def training_plan(config: Config, steps: int, devices: int) -> Plan:
    """When the arm is evaluated and ends; `steps`: updates its learning rate schedule is laid over."""
    if config.control:
        return UntilNll(steps, config.control.level, config.control.window)
    if config.budget and config.budget.unit == "device_seconds":
        return DeviceSeconds(config.budget.amount, devices, steps)
    return FixedSteps(steps)
