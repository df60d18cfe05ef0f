"""Arms that begin at another arm's checkpoint, are an average, or train on rows of their own: what a reader is told."""

from collections.abc import Iterator
from typing import Any

from eaft_verl.pages.numbers import number
from eaft_verl.recipe.budgets import UNITS
from eaft_verl.recipe.matching import OWN_DATA
from eaft_verl.reporting.collect import Arm, RunData

Row = dict[str, Any]
WORDS = {"device_seconds": "device seconds"}


def start_of(run: RunData) -> Row:
    """{arm, run, step, key, before: {unit: amount}} of a run that begins at a checkpoint; {} for the others."""
    found: Row = (run.info.get("derived") or {}).get("start") or {}
    return found


def own_rows(run: RunData) -> Row:
    """The blocks by which a run trains on other rows than the recipe's, by their key; {} for the others."""
    config = run.run.config
    return {key: config[key] for key in OWN_DATA if config.get(key)}


def lineage(arms: list[Arm], run: RunData) -> list[tuple[RunData, int, int]]:
    """[(run of the chain, its step at which the next one begins, updates before it)], the oldest first, `run` left out.

    It begins where the first run that is not among `arms` is left.
    """
    start = start_of(run)
    seed = run.info["seed"]
    parents = [
        other for arm in arms if arm.name == start.get("arm") for other in arm.runs if other.info["seed"] == seed
    ]
    if not parents:
        return []
    older = lineage(arms, parents[0])
    return [*older, (parents[0], start["step"], sum(step for _, step, _ in older))]


def before(arm: Arm) -> Row | None:
    """{unit: mean over the seeds} of what the chain had cost before the arm began; None for an arm without a start."""
    starts = [start_of(run).get("before") for run in arm.runs]
    known = [start for start in starts if start]
    if not known:
        return None
    return {
        unit: None if any(one.get(unit) is None for one in known) else sum(one[unit] for one in known) / len(known)
        for unit in UNITS
    }


def chain_notes(arms: list[Arm]) -> Iterator[str]:
    """One line per arm that is not trained from the base on the rows of the others."""
    for arm in arms:
        first = arm.runs[0]
        if start := start_of(first):
            steps = sorted({start_of(run)["step"] for run in arm.runs})
            at = f"step {', '.join(map(str, steps))}"
            spent = ", ".join(
                f"{number(amount, 0)} {WORDS.get(unit, unit)}"
                for unit, amount in (before(arm) or {}).items()
                if amount is not None
            )
            yield (
                f"{arm.name} begins at {start['arm']}, {at}: its budget and cost are its own, and the chain had spent "
                f"{spent} before; its path begins with that of {start['arm']}"
            )
        if average := arm.average:
            weights = ", ".join(f"step {step} = {weight:g}" for step, weight in average["weights"].items())
            yield (
                f"{arm.name} was not trained: it is the weight average of {average['of']} and {average['with']}, with "
                f"these weights of {average['of']}: {weights}; the tables show the last, the paths all"
            )
        for key, block in own_rows(first).items():
            rows = _rows(first, key, block)
            yield f"{arm.name} was trained on other rows ({key}: {rows}), and a difference may come from them"


def _rows(run: RunData, key: str, block: Row) -> str:
    drawn = run.info.get("drawn") or {}
    if key not in drawn:
        return str(block["data"])
    found = drawn[key]
    return (
        f"{block['data']}, share {block['share']:g} asked, {found['examples']:.3g} of the examples and "
        f"{found['tokens']:.3g} of the trained tokens drawn"
    )
