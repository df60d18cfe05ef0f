"""Arms as paths on the plane (target learning, forgetting), and their forgetting at equal target gain."""

from typing import Any, NamedTuple

import numpy as np

from eaft_verl.pages.statistics import Floats, Interval, at_positions, crossing_positions, seeds_interval
from eaft_verl.reporting.chains import lineage
from eaft_verl.reporting.collect import Arm, Point, RunData, shared_seeds
from eaft_verl.reporting.measures import Board
from eaft_verl.reporting.results import bounds

Row = dict[str, Any]
COST = "drift.kl"
FRACTIONS = (0.5, 0.75, 1.0)
LEARNT = 0.25  # of the first arm's gain: one below it would set a level that the others pass before an evaluation
TOLERATED = 0.05  # share of resamples that may lack a common gain before intervals are withheld


def axes(board: Board) -> list[str]:
    """Measures of target learning that can be the x axis: the target mean and the held-out NLL, where known."""
    if COST not in board.measures:
        return []
    return [name for name in ("target_mean", "heldout") if name in board.measures]


def paths(board: Board, axis: str) -> dict[str, list[Row]]:
    """{arm: [{step, x, x_low, x_high, kl, kl_low, kl_high}]}; the first point is the base at step 0.

    The path of an arm that begins at another one's checkpoint begins with the other's path up to there; steps count
    from the beginning of the chain.
    """
    found = {}
    for arm in board.arms:
        points = [_point(board, axis, board.base, board.base.end), *_before(board, axis, arm)]
        own = [_point(board, axis, arm, point) for point in _known(board, axis, arm)]
        done = sum(step for _, step, _ in lineage(board.arms, arm.runs[0]))
        points += [{**point, "step": point["step"] + done} for point in own]
        if own:
            found[arm.name] = points
    return found


def _before(board: Board, axis: str, arm: Arm) -> list[Row]:
    """The points of the arms that the arm's runs come from, as far as they are the same for every seed."""
    chains = [lineage(board.arms, run) for run in arm.runs]
    found = []
    for links in zip(*chains, strict=False):
        older = Arm(links[0][0].arm, tuple(run for run, _, _ in links))
        for point in _known(board, axis, older):
            if all(step <= last for step, (_, last, _) in zip(point, links, strict=True)):
                row = _point(board, axis, older, point)
                found.append({**row, "step": row["step"] + links[0][2]})
    return found


def _known(board: Board, axis: str, arm: Arm) -> list[Point]:
    return [point for point in arm.points() if board.has(axis, arm, point) and board.has(COST, arm, point)]


def _point(board: Board, axis: str, arm: Arm, point: Point) -> Row:
    x, kl = board.interval(axis, arm, point), board.interval(COST, arm, point)
    return {
        "step": point[0] if len(set(point)) == 1 else sum(point) / len(point),
        "x": x.delta,
        "x_low": x.bounds[0],
        "x_high": x.bounds[1],
        "kl": kl.delta,
        "kl_low": kl.bounds[0],
        "kl_high": kl.bounds[1],
    }


def equal_gain(board: Board, axis: str) -> Row:
    """KL of each arm where its path first reaches 50, 75 and 100 % of the gain that all arms reach.

    Every seed is compared within itself, over the seeds that all arms but controls and averages have. gain = the best x
    so far, as a distance to the base; common gain = min over arms of the last gain, controls and averages aside: one
    that is stopped early, or that is mostly the base, would lower the level for all. So would an arm that in some seed
    gains less than LEARNT of what the first arm does (GRPO in the NLL of demonstrations): those are `unlearnt`. One
    that gains something is kept where no other arm is left to compare.
    Between two evaluations sqrt(KL) is linear in the gain: both grow about in proportion to the distance moved, KL with
    its square. Before an arm's first evaluation nothing is known but that, so a level that it reaches there is
    withheld. Numbers are means over the seeds; intervals compute gain, level, crossing and KL again in every resample.
    Returns {common_gain, unlearnt: [arm], levels: [{fraction, level, arms: {arm: row or None where not reached}}]}; a
    row is {kl, step, low, high, difference: `bounds` to the first arm}, or {withheld: True}.
    """
    tracks = {arm.name: _tracks(board, axis, arm) for arm in board.arms}
    judged = _judged(board.arms)
    learning = _learning(judged, tracks)
    unlearnt = [arm.name for arm in judged if arm not in learning]
    common = {} if len(learning) == 1 < len(judged) else _common_gain(learning, tracks)
    if not common or min(common_R[0] for common_R in common.values()) <= 0:
        return {"common_gain": 0.0, "unlearnt": unlearnt, "levels": []}
    gain = float(np.mean([common_R[0] for common_R in common.values()]))
    levels = [
        {"fraction": fraction, "level": gain * fraction, "arms": _rows(tracks, common, fraction)}
        for fraction in FRACTIONS
    ]
    return {"common_gain": gain, "unlearnt": unlearnt, "levels": levels}


def _judged(arms: list[Arm]) -> list[Arm]:
    return [arm for arm in arms if arm.control is None and arm.average is None] or arms


def _learning(judged: list[Arm], tracks: dict[str, dict[int, "_Track"]]) -> list[Arm]:
    """The first arm and those that learn enough to be compared with it: every seed, as measured."""
    gains = {arm.name: [float(track.gain_RP[0, -1]) for track in tracks[arm.name].values()] for arm in judged}
    first, *others = judged
    for least in (max(0.0, LEARNT * float(np.mean(gains[first.name] or [0.0]))), 0.0):
        if found := [arm for arm in others if all(gain > least for gain in gains[arm.name])]:
            return [first, *found]
    return [first]


def _common_gain(arms: list[Arm], tracks: dict[str, dict[int, "_Track"]]) -> dict[int, Floats]:
    """{seed: the least of the arms' last gains, as measured and of every resample}."""
    seeds = [seed for seed in shared_seeds(*arms) if all(seed in tracks[arm.name] for arm in arms)]
    return {seed: np.min([tracks[arm.name][seed].gain_RP[:, -1] for arm in arms], axis=0) for seed in seeds}


def _rows(tracks: dict[str, dict[int, "_Track"]], common: dict[int, Floats], fraction: float) -> Row:
    """{arm: row} at that share of every seed's common gain; the first arm is the reference."""
    reached = {
        name: {seed: own[seed].at(level_R * fraction) for seed, level_R in common.items() if seed in own}
        for name, own in tracks.items()
    }
    first = next(iter(reached.values()))
    return {name: _row(found, None if found is first else first) for name, found in reached.items()}


class _Reached(NamedTuple):
    """Where one run reaches a level: KL as measured and of every resample, step, whether an evaluation precedes it."""

    kl_R: Floats
    step: float
    evaluated: bool


class _Track(NamedTuple):
    """One run along its evaluations, the base first: R is the run as measured, then its resamples."""

    gain_RP: Floats
    root_kl_RP: Floats
    steps_P: Floats

    def at(self, level_R: Floats) -> _Reached:
        """Where the gain first reaches the level; NaN where it does not, or where the level is no gain."""
        position_R = crossing_positions(self.gain_RP, np.where(level_R > 0, level_R, np.nan))
        step = float(at_positions(self.steps_P[None], position_R[:1])[0])
        return _Reached(at_positions(self.root_kl_RP, position_R) ** 2, step, not position_R[0] < 1)


def _tracks(board: Board, axis: str, arm: Arm) -> dict[int, _Track]:
    """{seed: its track} of the runs with an evaluation of both measures."""
    sign = 1.0 if board.measures[axis].higher_is_better else -1.0
    base = (board.base.runs[0].label, board.base.runs[0].step)
    found = {}
    for run in arm.runs:
        older = lineage(board.arms, run)
        places = [
            (link, step, before + step)
            for link, last, before in [*older, (run, run.step, sum(step for _, step, _ in older))]
            for step in sorted(link.evals)
            if 0 < step <= last and _both(board, axis, link, step)
        ]
        if not places or places[-1][0] is not run:
            continue
        keys = [base, *((link.label, step) for link, step, _ in places)]
        steps = [total for _, _, total in places]
        x_RP, kl_RP = (np.column_stack([board.resampled(name, key) for key in keys]) for name in (axis, COST))
        gain_RP = np.maximum.accumulate(sign * (x_RP - x_RP[:, :1]), axis=1)
        found[int(run.info["seed"])] = _Track(gain_RP, np.sqrt(np.maximum(kl_RP, 0.0)), np.array([0.0, *steps]))
    return found


def _both(board: Board, axis: str, run: RunData, step: int) -> bool:
    return all((run.label, step) in board.measures[name].scores for name in (axis, COST))


def _row(found: dict[int, _Reached], first: dict[int, _Reached] | None) -> Row | None:
    """What the table says of an arm at a level; `first`: the reference arm there, None for itself."""
    if not found or any(np.isnan(item.step) for item in found.values()):
        return None
    if not all(item.evaluated for item in found.values()):
        return {"withheld": True}
    kl = _interval([item.kl_R for item in found.values()])
    row: Row = {"kl": kl.delta, "step": float(np.mean([item.step for item in found.values()]))}
    row |= {"low": kl.bounds[0], "high": kl.bounds[1]}
    if first is not None and all(item.evaluated for item in first.values()):
        apart = _interval([item.kl_R - first[seed].kl_R for seed, item in found.items()])
        row["difference"] = bounds(apart, len(found))
    return row


def _interval(columns: list[Floats]) -> Interval:
    values_RS = np.column_stack(columns)
    return seeds_interval(values_RS[0], values_RS[1:], TOLERATED)
