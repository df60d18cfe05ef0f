"""The results table, the arm-versus-arm table and the Pareto plot as plain data."""

from collections.abc import Sequence
from typing import Any

from eaft_verl.pages.statistics import Interval, pareto_front
from eaft_verl.reporting.collect import Arm, shared_seeds
from eaft_verl.reporting.measures import Board, Measure

Row = dict[str, Any]
NAMES = {
    "target_mean": "Target mean",
    "general_mean": "General mean",
    "drift.kl": "KL to base",
    "drift.agreement": "Agreement",
    "drift.nll": "General NLL",
    "drift_task.kl": "KL, task prompts",
    "drift_task.agreement": "Agreement, task prompts",
    "heldout": "Held-out NLL",
}
DESCRIBED = {
    "drift.kl": "nats per token",
    "drift.agreement": "% of tokens",
    "drift.nll": "nats per token",
    "drift_task.kl": "nats per token",
    "drift_task.agreement": "% of tokens",
    "heldout": "nats per token",
}


def columns(board: Board) -> list[Row]:
    """What each measure is: id, name, side, metric, unit, direction, number of examples, decimals."""
    return [
        {
            "id": item.id,
            "name": NAMES.get(item.id, item.id),
            "side": item.side,
            "metric": item.metric,
            "unit": DESCRIBED.get(item.id, "%" if item.percent else ""),
            "percent": item.percent,
            "decimals": _decimals(item),
            "higher_is_better": item.higher_is_better,
            "n": item.n,
            "members": list(item.members),
        }
        for item in board.measures.values()
    ]


def _decimals(measure: Measure) -> int:
    """Enough digits for the largest score to show three significant ones; shares get one after percent."""
    largest = max((abs(score) for score in measure.scores.values()), default=1.0)
    return 1 if measure.percent else 3 if largest >= 0.1 else 4 if largest >= 0.01 else 5


def bounds(interval: Interval, seeds: int) -> Row:
    """{delta, low, high, excludes_zero, p, seeds: number that it is over}; low, high and p are None if not known."""
    low, high = interval.bounds
    known = {"delta": interval.delta, "low": low, "high": high, "excludes_zero": interval.excludes_zero}
    return {**known, "p": None if low is None else interval.p, "seeds": seeds}


def results(board: Board, models: Sequence[Arm] = ()) -> dict[str, dict[str, Row]]:
    """{arm: {measure: {score, low, high, stderr, seeds, delta: `bounds` against the base}}}, base and models too."""
    table: dict[str, dict[str, Row]] = {}
    for arm in [board.base, *board.arms, *models]:
        table[arm.name] = {name: _cell(board, arm, name) for name in board.measures if board.has(name, arm, arm.end)}
    return table


def _cell(board: Board, arm: Arm, name: str) -> Row:
    score = board.interval(name, arm, arm.end)
    cell = {
        "score": score.delta,
        "low": score.bounds[0],
        "high": score.bounds[1],
        "stderr": board.stderr(name, arm, arm.end),
        "seeds": {str(run.info["seed"]): board.measures[name].scores[run.label, run.step] for run in arm.runs},
    }
    if arm is not board.base and board.has(name, board.base, board.base.end):
        cell["delta"] = bounds(board.interval(name, arm, arm.end, board.base), len(arm.runs))
    return cell


def versus(board: Board) -> Row:
    """Paired differences of every arm to the first: {reference, arms: {arm: {measure: `bounds`}}}."""
    reference, *others = board.arms
    return {
        "reference": reference.name,
        "arms": {arm.name: differences(board, arm, reference) for arm in others},
    }


def differences(board: Board, arm: Arm, other: Arm) -> dict[str, Row]:
    """{measure: `bounds`} of arm - other at their ends, paired by example and seed; empty if they share no seed."""
    seeds = len(shared_seeds(arm, other))
    return {
        name: bounds(board.interval(name, arm, arm.end, other), seeds)
        for name in board.measures
        if seeds and board.has(name, arm, arm.end) and board.has(name, other, other.end)
    }


def pareto(table: dict[str, dict[str, Row]]) -> list[Row]:
    """[{arm, general, target, efficient}] of base and arms; empty if one of the two means is not measured."""
    points = {
        arm: (cells["general_mean"], cells["target_mean"])
        for arm, cells in table.items()
        if "general_mean" in cells and "target_mean" in cells
    }
    front = pareto_front([(general["score"], target["score"]) for general, target in points.values()])
    keep = ("score", "low", "high")
    return [
        {
            "arm": arm,
            "general": {key: general[key] for key in keep},
            "target": {key: target[key] for key in keep},
            "efficient": efficient,
        }
        for (arm, (general, target)), efficient in zip(points.items(), front, strict=True)
    ]
