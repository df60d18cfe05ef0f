"""What every arm spent, in the four units of `budgets`, and whether that is equal in the unit the recipe matches."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from eaft_verl.recipe.budgets import TOLERANCE, UNITS, Spent, matches, spent
from eaft_verl.reporting.collect import Arm, RunData

Row = dict[str, Any]
WORDS = {"device_seconds": "device seconds"}


def budgets(arms: list[Arm]) -> Row:
    """{match, to, tolerance, arms: [{arm, control, spent: {unit: mean over seeds}, generated_tokens, ratio, equal}]}.

    ratio: to the arm the others are matched to, in the matched unit; None where one is not known or nothing is matched.
    equal: whether that is within the tolerance for every seed; None where it is not judged, as for controls.
    """
    match, reference = matching(arms)
    rows = []
    for arm in arms:
        own, other = _mean(arm), _mean(reference)
        known = match != "none" and own[match] is not None and other[match]
        verdicts = [] if match == "none" or arm.control else [item[-1] for item in _pairs(arm, reference, match)]
        rows.append(
            {
                "arm": arm.name,
                "control": arm.control and arm.control["of"],
                "spent": own,
                "generated_tokens": _generated(arm),
                "ratio": own[match] / other[match] if known else None,
                "equal": None if not verdicts or None in verdicts else all(verdicts),
            }
        )
    return {"match": match, "to": reference.name, "tolerance": TOLERANCE, "arms": rows}


def matching(arms: list[Arm]) -> tuple[str, Arm]:
    """(unit, arm whose spend is the budget) of a comparison; the first arm where that one is not among them."""
    said = arms[0].runs[0].run.config.get("compare", {"match": "updates", "to": None})
    return said["match"], next((arm for arm in arms if arm.name == said["to"]), arms[0])


def unequal(arms: list[Arm]) -> Iterator[str]:
    """Every finished run, controls aside, whose budget is not that of the arm it is matched to."""
    match, reference = matching(arms)
    if match == "none":
        return
    unit = WORDS.get(match, match)
    for arm in arms:
        if arm.control is not None:
            continue
        for run, other, mine, theirs, equal in _pairs(arm, reference, match):
            if equal is None:
                yield f"budget: the {unit} of {run.label} or {other.label} are not logged, and compare.match={match}"
            elif not equal:
                yield (
                    f"budget: {run.label} has {mine:,.6g} {unit}, {other.label} {theirs:,.6g} "
                    f"({mine / theirs - 1:+.1%}), and compare.match={match} allows {TOLERANCE:.0%}; train with "
                    "`eaft compare`, which matches them, or set compare.match"
                )


def _pairs(
    arm: Arm, reference: Arm, match: str
) -> Iterator[tuple[RunData, RunData, float | None, float | None, bool | None]]:
    """(run, reference's run, their amounts, equal) per seed that both have and have finished."""
    others = {run.info["seed"]: run for run in reference.runs}
    for run in arm.runs:
        other = others.get(run.info["seed"])
        if other is None or other is run or {run.info["status"], other.info["status"]} != {"finished"}:
            continue
        mine, theirs = of_run(run), of_run(other)
        yield run, other, mine[match], theirs[match], matches(match, mine, theirs)


def of_run(run: RunData) -> Spent:
    """{unit: amount} of one run; updates also where nothing was logged."""
    found = spent(run.info, run.run.metrics())
    return found | {"updates": found["updates"] or run.info["total_steps"]}


def _mean(arm: Arm) -> Spent:
    found = [of_run(run) for run in arm.runs]
    return {unit: _average([item[unit] for item in found]) for unit in UNITS}


def _average(values: list[float | None]) -> float | None:
    return None if any(value is None for value in values) else float(np.mean(values))


def _generated(arm: Arm) -> float:
    last = [rows[-1] if (rows := run.run.metrics()) else {} for run in arm.runs]
    return float(np.mean([row.get("generated_tokens") or 0 for row in last]))
