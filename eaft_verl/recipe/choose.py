"""The rule by which one checkpoint is chosen, as the recipe fixes it before training. No torch, no files."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from eaft_verl.errors import ConfigError, require
from eaft_verl.recipe.config import Config, plain

BOUNDS = {  # what may be bounded: its measure in the report, and its unit
    "kl": ("drift.kl", "nats per token"),
    "task_kl": ("drift_task.kl", "nats per token"),
    "general": ("general_mean", "points"),
}
AIMS = {"heldout": "heldout", "target": "target_mean"}  # what the best of those within the bound is best by
_POINTS = re.compile(r"([+\-\u2212]?\d+(?:\.\d+)?)\s*(?:points?|pp)?")
EXAMPLE = "choose: {forget_at_most: {kl: 0.02}, by: heldout}"


@dataclass(frozen=True)
class Rule:
    """Of the checkpoints that forget at most `limit` in `bound`, the one that is best `by` what was to be learnt.

    limit: of kl and task_kl nats per token, at most; of general the change of the general mean in percentage points,
    at least, so that -1 allows the loss of one point.
    """

    bound: str
    limit: float
    by: str

    @property
    def measure(self) -> str:
        """The report's name of what is bounded."""
        return BOUNDS[self.bound][0]

    @property
    def aim(self) -> str:
        """The report's name of what the best one is best by."""
        return AIMS[self.by]

    def stated(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def rule_of(choose: Any) -> Rule | None:
    """The rule of a recipe's `choose`; None where there is none. ConfigError says what is wrong with it."""
    choose = plain(choose)
    if choose is None:
        return None
    require(isinstance(choose, Mapping), f"choose={choose!r} must be a mapping, e.g. {EXAMPLE}")
    if unknown := sorted(map(str, choose.keys() - {"forget_at_most", "by"})):
        raise ConfigError(f"choose.{unknown[0]} is unknown; it takes forget_at_most and by, e.g. {EXAMPLE}")
    bounds, by = choose.get("forget_at_most"), choose.get("by", "heldout")
    require(
        isinstance(bounds, Mapping) and len(bounds) == 1 and set(bounds) <= set(BOUNDS),
        f"choose.forget_at_most={bounds!r} must name one of {', '.join(BOUNDS)} with its limit, e.g. {EXAMPLE}",
    )
    require(isinstance(by, str) and by in AIMS, f"choose.by={by!r} is not one of {', '.join(AIMS)}")
    [(bound, given)] = bounds.items()
    limit = _limit(given)
    key = f"choose.forget_at_most.{bound}={given!r}"
    if bound == "general":
        require(limit is not None and limit <= 0, f"{key} must be a change in points of 0 or less, such as -1 point")
    else:
        require(limit is not None and limit > 0 and "point" not in str(given), f"{key} must be nats per token above 0")
    return Rule(bound, float(limit or 0.0), by)


def _limit(given: Any) -> float | None:
    """A finite number, or the number of '-1 point'; None for anything else."""
    if isinstance(given, str) and (found := _POINTS.fullmatch(given.strip())):
        given = float(found[1].replace("\u2212", "-"))
    good = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
    return float(given) if good else None


def check_rule(config: Config) -> None:
    """ConfigError for a rule that no arm of the recipe can be judged by: it names what is not evaluated."""
    if (rule := rule_of(config.choose)) is None:
        return
    evaluate, heldout, key = config.evaluate, config.data.heldout, f"choose.forget_at_most.{rule.bound}"
    if rule.bound == "general":
        require(evaluate.general, f"{key} needs general benchmarks, and evaluate.general is empty; name some there")
    else:
        require(evaluate.drift is not None, f"{key} needs evaluate.drift, the texts on which the KL is measured")
    if rule.bound == "task_kl":
        rows = plain(evaluate.drift).get("task_rows", 1)
        require(
            heldout and rows, f"{key} needs data.heldout, whose prompts are the task's, and drift.task_rows above 0"
        )
    if rule.by == "heldout":
        require(heldout, "choose.by=heldout needs data.heldout; set it, or choose by target")
    else:
        require(evaluate.target, "choose.by=target needs target benchmarks, and evaluate.target is empty")
