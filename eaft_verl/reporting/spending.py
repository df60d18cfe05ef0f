"""What every run spent, read once: budgets in the four units of `budgets`, time, speed and memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from eaft_verl.recipe.budgets import TOLERANCE, UNITS, Spent, before_training, matches, spent
from eaft_verl.reporting.chains import before
from eaft_verl.reporting.collect import Arm, RunData
from eaft_verl.reporting.history import finite, series

Row = dict[str, Any]
WORDS = {"device_seconds": "device seconds"}


def ledger(run: RunData) -> Row:
    """One run: the four units of `spent`, trained and generated tokens, seconds, speed and peak memory.

    Speed is trained tokens per second from the first step on; None where something was not logged.
    """
    info, rows = run.info, run.rows
    last = rows[-1] if rows else {}
    trained, generation = finite(last.get("tokens")), _known(rows, "generation_s")
    seconds = finite(info.get("train_seconds")) or finite(last.get("seconds"))
    stepping = seconds - before_training(info) if seconds else None
    return {
        **spent(info, rows),
        "generated_tokens": last.get("generated_tokens") or 0,
        "trained_tokens": trained,
        "train_seconds": seconds,
        "eval_seconds": finite(info.get("eval_seconds")),
        "tokens_per_s": trained / stepping if trained and stepping else None,
        "generation_share": sum(generation) / seconds if generation and seconds else None,
        "memory_gib": max(_known(rows, "memory_gib"), default=None),
    }


def _known(rows: list[Row], name: str) -> list[float]:
    return [value for value in series(rows, name) if value is not None]


def budgets(arms: list[Arm]) -> Row:
    """{match, to, tolerance, arms: [{arm, control, average, before, alarmed, spent: {unit: mean over seeds},
    generated_tokens, ratio, equal}]}. alarmed: whether its forgetting meter ended it.

    before: {unit: what the chain had spent where this arm begins}; not part of `spent`, and not matched.

    ratio: to the arm the others are matched to, in the matched unit; None where one is not known or nothing is matched.
    equal: whether that is within the tolerance for every seed; None where it is not judged, as for controls, averages.
    """
    match, reference = matching(arms)
    budget, rows = _means(reference).get(match), []
    for arm in arms:
        own = _means(arm)
        mine = own.get(match)
        verdicts = [] if match == "none" or exempt(arm) else [item[-1] for item in _pairs(arm, reference, match)]
        rows.append(
            {
                "arm": arm.name,
                "control": arm.control and arm.control["of"],
                "average": arm.average and arm.average["of"],
                "before": before(arm),
                "spent": {unit: own[unit] for unit in UNITS},
                "generated_tokens": own["generated_tokens"],
                "ratio": mine / budget if mine is not None and budget else None,
                "alarmed": alarmed(arm),
                "equal": None if not verdicts or None in verdicts else all(verdicts),
            }
        )
    return {"match": match, "to": reference.name, "tolerance": TOLERANCE, "arms": rows}


def cost(arms: list[Arm]) -> list[Row]:
    """Per arm, means over its seeds: steps, trained tokens, seconds, tokens per second, share of the seconds spent on
    generation; the highest peak memory.
    """
    found = []
    for arm in arms:
        means = _means(arm)
        peaks = [peak for run in arm.runs if (peak := ledger(run)["memory_gib"]) is not None]
        row = {"arm": arm.name, "seeds": list(arm.seeds), "tokens": means["trained_tokens"]}
        row |= {
            "steps": 0.0 if arm.average else _mean([run.info["total_steps"] for run in arm.runs]),
            "memory_gib": max(peaks, default=None),
        }
        kept = ("train_seconds", "eval_seconds", "tokens_per_s", "generation_share")
        found.append(row | {name: means[name] for name in kept})
    return found


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
        if exempt(arm):
            continue
        for run, other, mine, theirs, equal in _pairs(arm, reference, match):
            if mine is None or theirs is None:
                yield f"budget: the {unit} of {run.label} or {other.label} are not logged, and compare.match={match}"
            elif not equal:
                yield (
                    f"budget: {run.label} has {mine:,.6g} {unit}, {other.label} {theirs:,.6g} "
                    f"({mine / theirs - 1:+.1%}), and compare.match={match} allows {TOLERANCE:.0%}; train with "
                    "`eaft compare`, which matches them, or set compare.match"
                )


def exempt(arm: Arm) -> bool:
    """Whether the arm's budget is not to be that of the others: a control, an average, or ended by its meter."""
    return arm.control is not None or arm.average is not None or alarmed(arm)


def alarmed(arm: Arm) -> bool:
    """Whether the forgetting meter has ended one of its runs."""
    return any((run.info.get("meter") or {}).get("stopped") for run in arm.runs)


def _pairs(
    arm: Arm, reference: Arm, match: str
) -> Iterator[tuple[RunData, RunData, float | None, float | None, bool | None]]:
    """(run, reference's run, their amounts, equal) per seed that both have and have finished."""
    others = dict(zip(reference.seeds, reference.runs, strict=True))
    for seed, run in zip(arm.seeds, arm.runs, strict=True):
        other = others.get(seed)
        if other is None or other is run or {run.info["status"], other.info["status"]} != {"finished"}:
            continue
        mine: Spent = ledger(run)
        theirs: Spent = ledger(other)
        yield run, other, mine[match], theirs[match], matches(match, mine, theirs)


def _means(arm: Arm) -> dict[str, float | None]:
    """The ledger's entries as means over the seeds; None where a seed lacks one."""
    found = [ledger(run) for run in arm.runs]
    return {name: _mean([item[name] for item in found]) for name in found[0]}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
