"""Every reported number with its resampled distribution: benchmarks, their means, and drift.

A `Measure` is one column of the results table. Examples are drawn once per benchmark and shared by all models
and steps, so any difference taken later is paired by example id.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eaft_verl.pages.statistics import (
    Floats,
    Interval,
    resampled_means,
    seeds_interval,
    variance_parts,
)
from eaft_verl.reporting.collect import Arm, Point, RunData, shared_seeds

Key = tuple[str, int]  # run label, step
SIDES = ("target", "general")
DRIFT_METRICS = ("kl", "agreement", "nll")
_SAME = {"rel_tol": 1e-3, "abs_tol": 5e-4}  # records may be rounded


@dataclass
class Measure:
    """Scores and resampled scores of one metric. `id` is the benchmark, 'drift.kl' or 'target_mean'."""

    id: str
    side: str
    metric: str
    higher_is_better: bool
    n: int | None
    scores: dict[Key, float] = field(default_factory=dict)
    stderrs: dict[Key, float | None] = field(default_factory=dict)
    draws: dict[Key, Floats] = field(default_factory=dict)
    members: tuple[str, ...] = ()

    @property
    def percent(self) -> bool:
        """True if the scores are shares, which tables print as percent."""
        return self.higher_is_better and all(0 <= score <= 1 for score in self.scores.values())


@dataclass
class Board:
    """All measures of a report, looked up by id, and the arms they are known for."""

    base: Arm
    arms: list[Arm]
    measures: dict[str, Measure]
    resamples: int
    notes: list[str]

    def has(self, name: str, arm: Arm, point: Point) -> bool:
        """True if every seed of the arm has the measure at that evaluation."""
        return all(key in self.measures[name].scores for key in _keys(arm, point))

    def resampled(self, name: str, key: Key) -> Floats:
        """[1 + R] the score and its resamples over examples; those are NaN if the samples are not known."""
        measure = self.measures[name]
        draws = measure.draws.get(key, np.full(self.resamples, np.nan))
        return np.concatenate([[measure.scores[key]], draws])

    def interval(self, name: str, arm: Arm, point: Point, other: Arm | None = None) -> Interval:
        """The arm's mean score, or with `other` its paired difference to the end of that arm, with its interval.

        Differences of two arms are over the seeds that both have, at least one; the base has no seeds.
        """
        columns = self.columns(name, arm, point, other)
        return seeds_interval(columns[0], columns[1:])

    def columns(self, name: str, arm: Arm, point: Point, other: Arm | None = None) -> Floats:
        """[1 + R, S] scores or differences of every seed, and their resamples."""
        own = self._by_seed(name, arm, point)
        if other is None:
            return np.column_stack(list(own.values()))
        theirs = self._by_seed(name, other, other.end)
        if other is self.base:
            return np.column_stack([column - theirs[0] for column in own.values()])
        return np.column_stack([own[seed] - theirs[seed] for seed in shared_seeds(arm, other)])

    def _by_seed(self, name: str, arm: Arm, point: Point) -> dict[int, Floats]:
        return {seed: self.resampled(name, key) for seed, key in zip(arm.seeds, _keys(arm, point), strict=True)}

    def stderr(self, name: str, arm: Arm, point: Point) -> float | None:
        """The recorded standard error of a single run, else that of the mean over seeds and examples."""
        first, *others = _keys(arm, point)
        if not others and (known := self.measures[name].stderrs.get(first)) is not None:
            return known
        columns = self.columns(name, arm, point)
        spread = math.sqrt(sum(variance_parts(columns[0], columns[1:])))
        return spread if math.isfinite(spread) else None


def _keys(arm: Arm, point: Point) -> list[Key]:
    return [(run.label, step) for run, step in zip(arm.runs, point, strict=True)]


def build_board(base: Arm, arms: list[Arm], models: Sequence[Arm] = (), *, resamples: int, seed: int) -> Board:
    """Measure everything: primary metrics per benchmark, means over benchmarks, drift metrics, in table order."""
    notes: list[str] = []
    runs = [base.runs[0], *(run for arm in (*arms, *models) for run in arm.runs)]
    found = [measure for name in _names(runs) for measure in _benchmark(name, runs, resamples, seed, notes)]
    ordered: list[Measure] = []
    for side in SIDES:
        members = [item for item in found if item.side == side and item.higher_is_better]
        ordered += [*members, *_mean(side, members, notes)]
        ordered += [item for item in found if item.side == side and not item.higher_is_better]
    ordered += [item for item in found if item.side == "drift"]
    return Board(base, arms, {item.id: item for item in ordered}, resamples, notes)


def _names(runs: list[RunData]) -> list[str]:
    return sorted({name for run in runs for records in run.evals.values() for name in records})


def _entries(name: str, runs: list[RunData]) -> Iterator[tuple[RunData, int, dict[str, Any]]]:
    for run in runs:
        for step, records in run.evals.items():
            if name in records and (step > 0 or run.info["kind"] != "arm"):
                yield run, step, records[name]


def _benchmark(name: str, runs: list[RunData], resamples: int, seed: int, notes: list[str]) -> Iterator[Measure]:
    entries = list(_entries(name, runs))
    if not entries:
        return
    first = entries[0][2]
    drift = first["side"] == "drift"
    rows = [run.samples(step, name) for run, step, _ in entries]
    ids = sorted(set.intersection(*(set(found) for found in rows)))
    for metric in (DRIFT_METRICS if name == "drift" else DRIFT_METRICS[:2]) if drift else (first["metric"],):
        entered = [entry for entry in entries if metric in entry[2]["metrics"]]
        if len(entered) < len(entries) or not entries:
            notes.append(f"{name}: some evaluations lack the metric {metric}; it is left out")
            continue
        kind = first["metrics"][metric]
        measure = Measure(
            f"{name}.{metric}" if drift else name, first["side"], metric, bool(kind["higher_is_better"]), first["n"]
        )
        for run, step, record in entries:
            measure.scores[run.label, step] = float(record["metrics"][metric]["score"])
            measure.stderrs[run.label, step] = _number(record["metrics"][metric].get("stderr"))
        _resample(measure, name, ids, rows, np.random.default_rng([seed, zlib.crc32(name.encode())]), resamples, notes)
        _drop_non_finite(measure, notes)
        yield measure


def _drop_non_finite(measure: Measure, notes: list[str]) -> None:
    for key in [key for key, score in measure.scores.items() if not math.isfinite(score)]:
        notes.append(f"{key[0]}, step {key[1]}: {measure.id} is {measure.scores[key]}, so it is left out")
        for known in (measure.scores, measure.stderrs, measure.draws):
            known.pop(key, None)


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(float(value)) else float(value)


def _resample(
    measure: Measure,
    name: str,
    ids: list[str],
    rows: list[dict[str, dict[str, Any]]],
    rng: np.random.Generator,
    resamples: int,
    notes: list[str],
) -> None:
    """Fill `draws`, if the recorded score is the (token-weighted) mean of the samples; else say why not."""
    if not ids or any(measure.metric not in found[key].get("scores", {}) for found in rows for key in ids):
        notes.append(f"{name}: no per-example {measure.metric} in the samples, so no intervals")
        return
    values = np.array([[_float(found[key]["scores"][measure.metric]) for found in rows] for key in ids])
    keys = list(measure.scores)
    if any(len(found) != len(ids) for found in rows):
        notes.append(f"{name}: only the {len(ids)} examples shared by all runs are used")
        measure.n, measure.stderrs = len(ids), {}
        measure.scores = dict(
            zip(keys, np.average(values, axis=0, weights=_tokens(rows[0], ids)).tolist(), strict=True)
        )
    weights = next((w for w in (_tokens(rows[0], ids), np.ones(len(ids))) if _reproduces(measure, values, w)), None)
    if weights is None:
        notes.append(f"{name}: the recorded {measure.metric} is not the mean of its samples, so no intervals")
        return
    measure.draws = dict(zip(keys, resampled_means(values, weights, resamples, rng).T, strict=True))


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _tokens(found: dict[str, dict[str, Any]], ids: list[str]) -> Floats:
    """[N] number of tokens of each example, or ones: teacher-forced metrics are means over tokens."""
    if all("tokens" in found[key] for key in ids):
        return np.array([float(found[key]["tokens"]) for key in ids])
    return np.ones(len(ids))


def _reproduces(measure: Measure, values: Floats, weights: Floats) -> bool:
    if weights.sum() <= 0:
        return False
    means = np.average(values, axis=0, weights=weights)
    pairs = zip(means.tolist(), measure.scores.values(), strict=True)
    return all(math.isclose(mean, score, **_SAME) or not math.isfinite(score) for mean, score in pairs)


def _mean(side: str, members: list[Measure], notes: list[str]) -> Iterable[Measure]:
    """The plain mean of the side's benchmarks, each resampled independently; nothing if there are none."""
    if not members:
        return
    if len({item.percent for item in members}) > 1:
        notes.append(f"the {side} mean mixes shares with other units; read its benchmarks one by one")
    mean = Measure(f"{side}_mean", side, "mean", True, None, members=tuple(item.id for item in members))
    for key in set.intersection(*(set(item.scores) for item in members)):
        mean.scores[key] = float(np.mean([item.scores[key] for item in members]))
        if all(key in item.draws for item in members):
            mean.draws[key] = np.mean([item.draws[key] for item in members], axis=0)
    yield mean
