"""Settings of the forgetting meter, and of where metrics go besides the run directory."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eaft_verl.errors import ConfigError, require
from eaft_verl.recipe.config import Config, plain

THEN = ("warn", "stop", "keep_best")
TRACKERS = ("wandb", "mlflow", "swanlab", "trackio")  # of verl.utils.tracking, those that need an account or a server
EXAMPLE = "meter: {every: 20, alarm: {kl: 0.05, then: warn}}"


@dataclass(frozen=True)
class Meter:
    """Drift from the base model on a few fixed texts, while an arm trains.

    every: updates between two readings. rows, new_tokens: texts, and answer tokens of each, at most. limit: KL in nats
    per token above which the alarm goes off, None without one. then: what happens then.
    """

    every: int
    rows: int = 16
    new_tokens: int = 48
    limit: float | None = None
    then: str = "warn"


def meter_of(config: Config) -> Meter | None:
    """The meter of an arm; None where there is none. ConfigError says what is wrong with it."""
    given = plain(config.meter)
    if given is None:
        return None
    require(isinstance(given, Mapping), f"meter={given!r} must be a mapping, e.g. {EXAMPLE}")
    known = ("every", "rows", "new_tokens", "alarm")
    if unknown := sorted(map(str, given.keys() - set(known))):
        raise ConfigError(f"meter.{unknown[0]} is unknown; it takes {', '.join(known)}, e.g. {EXAMPLE}")
    require("every" in given, f"meter.every is missing: updates between two readings, e.g. {EXAMPLE}")
    numbers = {name: given[name] for name in known[:3] if name in given}
    for name, value in numbers.items():
        require(type(value) is int and value >= 1, f"meter.{name}={value!r} must be a whole number of at least 1")
    return Meter(**numbers, **_alarm(given.get("alarm")))


def _alarm(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    require(isinstance(given, Mapping) and set(given) <= {"kl", "then"}, f"meter.alarm={given!r} takes kl and then")
    limit, then = given.get("kl"), given.get("then", "warn")
    good = isinstance(limit, int | float) and not isinstance(limit, bool) and limit > 0
    require(good, f"meter.alarm.kl={limit!r} must be nats per token above 0")
    require(isinstance(then, str) and then in THEN, f"meter.alarm.then={then!r} is not one of {', '.join(THEN)}")
    return {"limit": float(limit), "then": then}


def check_meter(config: Config) -> None:
    """ConfigError for a meter or trackers that cannot be."""
    meter = meter_of(config)
    if meter and meter.then == "keep_best":
        require(
            config.data.heldout, "meter.alarm.then=keep_best keeps the best held-out NLL, and data.heldout is not set"
        )
    if meter and meter.then == "stop" and config.compare.match != "updates":
        require(
            config.compare.to != config.arm,
            f"meter.alarm.then=stop would cut short {config.arm}, whose spend is the budget of the others "
            "(compare.to); use warn or keep_best, or set another compare.to",
        )
    for name in plain(config.trackers):
        require(name in TRACKERS, f"trackers: {name!r} is not one of {', '.join(TRACKERS)}")


def absent_trackers(config: Config) -> list[str]:
    """One line per tracker whose package is not installed here, with the command that installs it."""
    return [
        f"trackers: {name} is not installed here; pip install {name}"
        for name in plain(config.trackers)
        if importlib.util.find_spec(name) is None
    ]
