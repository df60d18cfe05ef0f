"""Which checkpoint to ship by the recipe's rule, why, and how likely that is right.

Dimension letters: R as measured, then resamples; C candidates, an arm at one evaluation each; S seeds.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_verl.pages.statistics import Floats, jointly_over_seeds
from eaft_verl.recipe.choose import Rule, rule_of
from eaft_verl.reporting.collect import Arm, Point, RunData
from eaft_verl.reporting.measures import Board
from eaft_verl.runs import step_name

Row = dict[str, Any]
NONE = -1  # index of 'no candidate'
SHOWN = 3


@dataclass
class Candidates:
    """Every arm at every evaluation that has both measures: what it learnt, and its cost by the rule's bound.

    gain: change of the aim against the base, larger better. cost: what must not exceed `limit`.
    """

    names: list[tuple[Arm, Point]]
    gain_RC: Floats
    cost_RC: Floats
    limit: float

    def decide(self) -> NDArray[np.int64]:
        """[R] the candidate of largest gain of those that cost at most the limit and gain anything, or NONE."""
        allowed_RC = self.meets()
        best_R = np.where(allowed_RC, self.gain_RC, -np.inf).argmax(axis=1)
        return np.where(allowed_RC.any(axis=1), best_R, NONE)

    def meets(self) -> NDArray[np.bool_]:
        """[R, C] whether a candidate is allowed: within the bound, and better than the base."""
        return (self.cost_RC <= self.limit) & (self.gain_RC > 0)

    def closest(self) -> int:
        """The candidate that comes nearest to the bound: of those that gain anything, if there are any."""
        gaining = self.gain_RC[0] > 0
        return int(np.where(gaining | ~gaining.any(), self.cost_RC[0], np.inf).argmin())


def choice(board: Board, rule: Rule | None, runs: Sequence[RunData], seed: int) -> Row:
    """What report.json holds of the decision.

    {rule, changed: lines about runs that recorded another rule, unjudged: why nothing can be decided or None,
    candidates: number, allowed: number, chosen: candidate or None, closest: candidate or None, probability: that the
    rule would decide the same on the true scores, bound_probability: that the chosen one truly is allowed, others:
    [candidate with share]}. A candidate is {arm, step, steps: {seed: step}, gain, cost, score, seed, run, checkpoint}.

    Right is the choice that the rule makes of scores without error: those of endless examples, of the seeds' own mean.
    Every resample of the examples (paired over all models) and of the seeds is one guess at those scores; the
    probability is the share of them in which the rule chooses the same. With nothing known beforehand of the true
    scores this is how often such a choice is right; tests simulate it.
    """
    found: Row = {"rule": rule and rule.stated(), "changed": changed_rules(rule, runs), "unjudged": None}
    found |= {"candidates": 0, "allowed": 0, "chosen": None, "closest": None, "others": []}
    found |= {"probability": None, "bound_probability": None}
    if rule is None:
        return found
    known = [name for name in board.measures if board.has(name, board.base, board.base.end)]
    missing = [name for name in (rule.measure, rule.aim) if name not in known]
    if missing or (rule.bound == "general" and not board.measures[rule.measure].percent):
        lacking = f"the runs have no {missing[0]}" if missing else "the general mean is not in percent"
        return found | {"unjudged": lacking}
    candidates = _candidates(board, rule, seed)
    if candidates is None:
        return found | {"unjudged": "no arm has an evaluation with both measures"}
    return found | _decided(board, rule, candidates)


def _decided(board: Board, rule: Rule, candidates: Candidates) -> Row:
    """What the rule says of the candidates, and how sure that is."""
    decided_R, allowed_RC = candidates.decide(), candidates.meets()
    mine = int(decided_R[0])
    found: Row = {"candidates": len(candidates.names), "allowed": int(allowed_RC[0].sum())}
    if mine != NONE:
        found["chosen"] = _described(board, rule, candidates, mine)
    elif (near := candidates.closest()) is not None:
        found["closest"] = _described(board, rule, candidates, near)
    if np.isfinite(candidates.gain_RC).all() and np.isfinite(candidates.cost_RC).all():
        found["probability"] = float((decided_R[1:] == mine).mean())
        found["bound_probability"] = None if mine == NONE else float(allowed_RC[1:, mine].mean())
        found["others"] = _others(candidates, decided_R, mine)
    return found


def _candidates(board: Board, rule: Rule, seed: int) -> Candidates | None:
    names: list[tuple[Arm, Point]] = []
    gains, costs = [], []
    sign = 1.0 if board.measures[rule.aim].higher_is_better else -1.0
    for arm in board.arms:
        points = [p for p in arm.points() if all(board.has(name, arm, p) for name in (rule.measure, rule.aim))]
        if not points:
            continue
        gain = [sign * board.columns(rule.aim, arm, point, board.base) for point in points]
        cost = [_cost(board, rule, arm, point) for point in points]
        rng = np.random.default_rng([seed, zlib.crc32(arm.name.encode())])
        both_RM = jointly_over_seeds(np.stack([*gain, *cost], axis=-1), rng)
        names += [(arm, point) for point in points]
        gains.append(both_RM[:, : len(points)])
        costs.append(both_RM[:, len(points) :])
    limit = -rule.limit if rule.bound == "general" else rule.limit
    return Candidates(names, np.hstack(gains), np.hstack(costs), limit + 1e-12) if names else None


def _cost(board: Board, rule: Rule, arm: Arm, point: Point) -> Floats:
    """[R, S] nats, or the points of the general mean that were lost."""
    if rule.bound == "general":
        return -100 * board.columns(rule.measure, arm, point, board.base)
    return board.columns(rule.measure, arm, point)


def _described(board: Board, rule: Rule, candidates: Candidates, index: int) -> Row:
    """A candidate in numbers, with the run to take: of the seeds that are allowed the one that learnt most."""
    arm, point = candidates.names[index]
    sign = 1.0 if board.measures[rule.aim].higher_is_better else -1.0
    gain_S = sign * board.columns(rule.aim, arm, point)[0]
    cost_S = _cost(board, rule, arm, point)[0]
    allowed_S = cost_S <= candidates.limit
    best = int(np.where(allowed_S | ~allowed_S.any(), gain_S, -np.inf).argmax())
    run, step = arm.runs[best], point[best]
    return {
        **_name(arm, point),
        "gain": float(candidates.gain_RC[0, index]),
        "cost": float(candidates.cost_RC[0, index]),
        "score": float(board.columns(rule.aim, arm, point)[0].mean()),
        "seed": int(run.info["seed"]),
        "run": run.run.path.name,
        "checkpoint": f"checkpoints/{step_name(step)}",
    }


def _name(arm: Arm, point: Point) -> Row:
    step = point[0] if len(set(point)) == 1 else sum(point) / len(point)
    return {"arm": arm.name, "step": step, "steps": dict(zip(map(str, arm.seeds), point, strict=True))}


def _others(candidates: Candidates, decided_R: NDArray[np.int64], mine: int) -> list[Row]:
    """What else the rule would choose, most often first: [{arm, step, steps, share}], arm None for no candidate."""
    indices, counts = np.unique(decided_R[1:], return_counts=True)
    rows = []
    for index, count in sorted(zip(indices.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1]):
        if index != mine:
            named = {"arm": None} if index == NONE else _name(*candidates.names[index])
            rows.append({**named, "share": count / (len(decided_R) - 1)})
    return rows[:SHOWN]


def changed_rules(rule: Rule | None, runs: Sequence[RunData]) -> list[str]:
    """'LABEL, LABEL recorded RULE' for every other rule than this one that runs were started with."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if (own := rule_of(run.run.config.get("choose"))) != rule:
            found.setdefault(_stated(own), []).append(run.label)
    return [f"{', '.join(labels)} recorded {said}" for said, labels in found.items()]


def recorded_rule(arms: Sequence[Arm]) -> Rule | None:
    """The rule that the first run of the first arm was started with."""
    return rule_of(arms[0].runs[0].run.config.get("choose"))


def _stated(rule: Rule | None) -> str:
    if rule is None:
        return "no rule"
    return f"forget_at_most {rule.bound} {rule.limit:g}, by {rule.by}"
