"""Forgetting at equal gain against learners whose KL at every gain is known by construction."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eaft_verl.reporting.collect import Arm, RunData
from eaft_verl.reporting.measures import Board, Measure
from eaft_verl.reporting.paths import equal_gain

GEOMETRIC = (1, 2, 4, 8, 16, 32, 64)
RESAMPLES = 400


class Learner:
    """Moves away from the base by `distance` of its step; gains in proportion, forgets with the square.

    gain = distance, KL = forgetting * distance ** 2, so KL at gain g is forgetting * g ** 2 however fast it learns.
    """

    def __init__(self, name: str, speed: float, forgetting: float, steps: tuple[int, ...] = GEOMETRIC) -> None:
        self.name, self.speed, self.forgetting, self.steps = name, speed, forgetting, steps

    def distance(self, step: int) -> float:
        return 1.0 - float(np.exp(-self.speed * step))

    def kl(self, gain: float) -> float:
        return self.forgetting * gain**2


def run_of(name: str, seed: int, steps: tuple[int, ...]) -> RunData:
    info = {"kind": "base" if name == "base" else "arm", "arm": name, "seed": seed, "total_steps": max(steps)}
    return RunData(None, info, {step: {} for step in steps})  # type: ignore[arg-type]  # nothing is read from disk


def board(
    learners: list[Learner], seeds: int = 1, noise: Callable[[], float] = lambda: 0.0, spread: float = 0.0
) -> Board:
    """The learners measured at their steps; `noise` is added to every score, examples spread by `spread`."""
    base = Arm("base", (run_of("base", 0, (0,)),))
    arms = [Arm(item.name, tuple(run_of(item.name, seed, item.steps) for seed in range(seeds))) for item in learners]
    x = Measure("target_mean", "target", "mean", True, None)
    kl = Measure("drift.kl", "drift", "kl", False, None)
    draw = np.random.default_rng(1)
    shared = spread * draw.normal(size=RESAMPLES)
    for measure in (x, kl):
        measure.scores["base", 0], measure.draws["base", 0] = 0.0, np.zeros(RESAMPLES)
    for item, arm in zip(learners, arms, strict=True):
        for run in arm.runs:
            for step in item.steps:
                gain = item.distance(step) + noise()
                x.scores[run.label, step], x.draws[run.label, step] = gain, gain + shared
                forgotten = item.kl(item.distance(step))
                kl.scores[run.label, step] = forgotten
                kl.draws[run.label, step] = forgotten * np.exp(spread * draw.normal(size=RESAMPLES))
    return Board(base, arms, {"target_mean": x, "drift.kl": kl}, RESAMPLES, [])


def test_an_arm_that_learns_nothing_is_named_and_leaves_the_others_to_compare() -> None:
    pair = [Learner("sft", 0.25, 0.4), Learner("eaft", 0.05, 0.2)]
    found = equal_gain(board([*pair, Learner("grpo", -0.1, 0.3)]), "target_mean")
    assert found["unlearnt"] == ["grpo"] and found["levels"][-1]["arms"]["grpo"] is None
    alone = equal_gain(board(pair), "target_mean")
    assert alone["unlearnt"] == [] and found["common_gain"] == alone["common_gain"]
    for mixed, two in zip(found["levels"], alone["levels"], strict=True):
        assert mixed["arms"]["eaft"]["difference"]["delta"] == two["arms"]["eaft"]["difference"]["delta"]
    assert equal_gain(board([pair[0], Learner("grpo", -0.1, 0.3)]), "target_mean")["levels"] == []
    assert equal_gain(board([Learner("grpo", -0.1, 0.3), *pair]), "target_mean")["levels"] == []  # the reference


def test_an_arm_that_learns_little_does_not_set_the_level_for_all() -> None:
    pair = [Learner("sft", 0.25, 0.4), Learner("eaft", 0.05, 0.2)]
    slow = Learner("talr", 0.004, 0.3)  # 1 - exp(-0.256) = 0.226 of the way at its end, below a quarter of sft's 1.0
    less = Learner("dft", 0.005, 0.3)  # 1 - exp(-0.32) = 0.274
    alone = equal_gain(board(pair), "target_mean")
    found = equal_gain(board([*pair, slow]), "target_mean")
    assert found["unlearnt"] == ["talr"] and found["common_gain"] == alone["common_gain"]
    assert found["levels"][-1]["arms"]["talr"] is None
    kept = equal_gain(board([*pair, less]), "target_mean")
    assert kept["unlearnt"] == [] and kept["common_gain"] == pytest.approx(less.distance(64))
    two = equal_gain(board([pair[0], slow]), "target_mean")  # nobody else is left to compare
    assert two["unlearnt"] == [] and two["common_gain"] == pytest.approx(slow.distance(64))


def levels(learners: list[Learner], **options: Any) -> list[dict[str, Any]]:
    found = equal_gain(board(learners, **options), "target_mean")
    return [level["arms"] for level in found["levels"]]


@pytest.mark.parametrize("slow", [0.02, 0.05, 0.1, 0.2])
def test_equal_learners_forget_equally_however_fast_they_are(slow: float) -> None:
    sft, eaft = Learner("sft", 0.25, 0.3), Learner("eaft", slow, 0.3)
    found = equal_gain(board([sft, eaft]), "target_mean")
    assert found["common_gain"] == pytest.approx(eaft.distance(64))
    for level in found["levels"]:
        for row in level["arms"].values():
            assert row["kl"] == pytest.approx(0.3 * level["level"] ** 2)
        assert level["arms"]["eaft"]["difference"]["delta"] == pytest.approx(0.0, abs=1e-12)


def test_a_learner_that_forgets_half_as_much_is_found_to() -> None:
    for level in levels([Learner("sft", 0.2, 0.4), Learner("eaft", 0.03, 0.2)]):
        assert level["eaft"]["kl"] == pytest.approx(level["sft"]["kl"] / 2)
        assert level["eaft"]["difference"]["delta"] == pytest.approx(-level["sft"]["kl"] / 2)


@pytest.mark.parametrize("power", [0.8, 1.25])
def test_equal_learners_are_nearly_equal_where_the_root_is_not_linear(power: float) -> None:
    class Bent(Learner):
        def kl(self, gain: float) -> float:
            return self.forgetting * gain ** (2 * power)

    for level in levels([Bent("sft", 0.25, 0.3), Bent("eaft", 0.05, 0.3)]):
        # linear interpolation of KL from the base with the old points was off by a factor of five
        assert level["eaft"]["kl"] == pytest.approx(level["sft"]["kl"], rel=0.05)


def test_a_level_before_the_first_evaluation_is_withheld() -> None:
    late = Learner("sft", 0.25, 0.3, (8, 16))  # gains 0.86 by its first evaluation
    half, three_quarters, full = levels([late, Learner("eaft", 0.05, 0.3)])
    assert half["sft"] == three_quarters["sft"] == {"withheld": True}
    assert half["eaft"]["kl"] > 0 and "difference" not in half["eaft"]
    assert full["sft"]["kl"] == pytest.approx(0.3 * Learner("", 0.05, 0).distance(64) ** 2)
    assert "difference" in full["eaft"]
    exactly = levels([Learner("sft", 0.25, 0.3, (8,)), Learner("eaft", 0.25, 0.3, (8,))])[-1]
    assert exactly["sft"]["step"] == 8  # at the first evaluation itself it is known


def test_gain_is_the_best_so_far() -> None:
    class Unsteady(Learner):
        def distance(self, step: int) -> float:
            return {1: 0.2, 2: 0.5, 4: 0.3, 8: 0.9}[step]

        def kl(self, gain: float) -> float:
            return {0.2: 0.01, 0.5: 0.04, 0.3: 0.09, 0.9: 0.16}[gain]

    _, three_quarters, full = levels([Unsteady("sft", 1, 1, (1, 2, 4, 8))])
    # 0.675 lies between the best so far at step 4, still 0.5, and 0.9: (0.675 - 0.5) / 0.4 of the way from .3 to .4
    share = (0.675 - 0.5) / 0.4
    assert three_quarters["sft"]["kl"] == pytest.approx((0.3 + 0.1 * share) ** 2)
    assert three_quarters["sft"]["step"] == pytest.approx(4 + 4 * share)
    assert (full["sft"]["kl"], full["sft"]["step"]) == (pytest.approx(0.16), 8)


def test_seeds_are_compared_within_themselves_and_over_those_that_all_have() -> None:
    found = board([Learner("sft", 0.25, 0.3), Learner("eaft", 0.05, 0.2)], seeds=3)
    found.arms[1] = Arm("eaft", found.arms[1].runs[:2])
    rows = [level["arms"]["eaft"] for level in equal_gain(found, "target_mean")["levels"]]
    assert [row["difference"]["seeds"] for row in rows] == [2, 2, 2]


def test_a_slower_learner_is_not_favoured_when_gains_are_noisy() -> None:
    # equal learners at a fifth of the speed, both noisy in what they gain, three seeds: no difference on average, and
    # the intervals hold zero about as often as they say
    draw = np.random.default_rng(7)
    pair = [Learner("sft", 0.25, 0.3), Learner("eaft", 0.05, 0.3)]
    apart, held = [], []
    for _ in range(150):
        half = levels(pair, seeds=3, noise=lambda: 0.03 * float(draw.normal()), spread=0.02)[0]
        apart.append(half["eaft"]["difference"]["delta"] / half["sft"]["kl"])
        held.append(half["eaft"]["difference"]["low"] <= 0 <= half["eaft"]["difference"]["high"])
    assert abs(np.mean(apart)) < 0.05
    assert np.mean(held) > 0.92
