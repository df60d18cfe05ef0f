"""Resampling against exact enumeration, crossings and fronts against drawings on paper."""

import itertools

import numpy as np
import pytest

from eaft_verl.pages.statistics import (
    Interval,
    at_positions,
    crossing_positions,
    holm,
    over_seeds,
    pareto_front,
    percentile_interval,
    resampled_means,
    seeds_interval,
    variance_parts,
)

RESAMPLES = 40_000


def rng():
    return np.random.default_rng(0)


def enumerated(values, weights):
    """Mean of each of the n ** n equally likely resamples, in plain Python."""
    picks = itertools.product(range(len(values)), repeat=len(values))
    return [sum(values[i] * weights[i] for i in p) / sum(weights[i] for i in p) for p in picks]


@pytest.mark.parametrize(
    ("values", "weights"),
    [([0.0, 1.0], [1, 1]), ([0.0, 1.0, 5.0], [1, 1, 1]), ([0.0, 1.0, 5.0], [1, 4, 2]), ([-2.0, 0.0, 0.5], [3, 1, 9])],
)
def test_resampled_means_follow_the_exact_distribution(values, weights):
    exact = enumerated(values, weights)
    drawn = resampled_means(np.array(values)[:, None], np.array(weights, float), RESAMPLES, rng())[:, 0]
    for value in set(np.round(exact, 9)):
        share = np.mean(np.isclose(exact, value))
        seen = np.mean(np.isclose(drawn, value))
        assert abs(seen - share) < 5 * np.sqrt(share * (1 - share) / RESAMPLES)
    assert np.isclose(drawn[:, None], np.array(exact)[None, :]).any(axis=1).all()


def interval_of(values, weights=None):
    """Mean and interval of one column, as the report makes them."""
    column, weights = np.array(values, float), np.ones(len(values)) if weights is None else np.array(weights, float)
    draws = resampled_means(column[:, None], weights, RESAMPLES, rng())[:, 0]
    return percentile_interval(float(np.average(column, weights=weights)), draws)


def test_two_examples_give_the_bounds_of_the_enumeration():
    # 0 and 1: means 0, 0.5, 1 with probability 1/4, 1/2, 1/4, so both tails are the extremes
    interval = interval_of([0.0, 1.0])
    assert interval[:3] == (0.5, 0.0, 1.0)
    assert not interval.excludes_zero


def test_three_examples_give_the_percentiles_of_the_enumeration():
    # all-equal draws have probability 1/27 = 3.7 % each > 2.5 %, so the bounds are the smallest and largest value
    interval = interval_of([1.0, 2.0, 6.0])
    assert interval[:3] == pytest.approx((3.0, 1.0, 6.0))
    assert interval.excludes_zero


def test_weights_are_tokens():
    assert interval_of([1.0, 4.0], [3, 1])[:3] == pytest.approx((1.75, 1.0, 4.0))


def test_columns_are_paired_by_example():
    base = np.array([0.0, 1.0, 0.0, 1.0, 5.0])
    draws = resampled_means(np.column_stack([base, base + 0.25]), np.ones(5), 500, rng())
    assert draws[:, 1] - draws[:, 0] == pytest.approx(0.25)
    assert draws[:, 0].std() > 0.5


def test_the_interval_agrees_with_the_normal_one_for_many_examples():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    interval = interval_of(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_blocks_do_not_change_the_law_and_seeds_make_it_repeatable(monkeypatch):
    values, weights = np.array([[0.0], [1.0]]), np.ones(2)
    monkeypatch.setattr("eaft_verl.pages.statistics._DRAWS_IN_MEMORY", 6)
    small = resampled_means(values, weights, 20_000, rng())
    assert small.mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(small, resampled_means(values, weights, 20_000, rng()))


def test_noise_of_floating_point_is_not_an_effect():
    assert not Interval(1e-17, 1e-17, 2e-17).excludes_zero
    assert Interval(-0.2, -0.3, -0.1).excludes_zero
    assert not Interval(0.2, np.nan, np.nan).excludes_zero


def test_unknown_resamples_are_tolerated_up_to_a_share():
    draws = np.array([np.nan] + [1.0] * 99)
    assert np.isnan(percentile_interval(1.0, draws).low)
    one = np.array([1.0])
    assert np.isnan(seeds_interval(one, draws[:, None]).low)
    assert seeds_interval(one, draws[:, None], tolerated=0.01)[:3] == (1.0, 1.0, 1.0)
    assert np.isnan(seeds_interval(one, np.full((3, 1), np.nan), tolerated=1.0).low)


def test_p_values_count_the_rarer_side():
    draws = np.array([-1.0] * 10 + [1.0] * 990)
    assert percentile_interval(0.9, draws).p == pytest.approx(2 * 11 / 1001)
    assert percentile_interval(0.0, np.zeros(99)).p == 1.0
    assert np.isnan(percentile_interval(0.0, np.array([np.nan, 1.0])).p)


def test_holm_by_hand():
    # 0.05 / 4 = .0125, / 3 = .0167, / 2 = .025: .01 and .015 pass, .03 ends it, although .04 <= .05
    assert holm([0.04, 0.01, 0.03, 0.015]) == [False, True, False, True]
    assert holm([0.02, 0.02]) == [True, True]  # the second is compared with 0.05
    assert holm([0.03, 0.04]) == [False, False]
    assert holm([0.05]) == [True] and holm([]) == [] and holm([float("nan"), 0.02]) == [False, True]


# 95 % points of Student's t with 1, 2, 3, 4 degrees of freedom, from a printed table
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


@pytest.mark.parametrize("number", T_975)
def test_seeds_alone_give_students_interval(number):
    scores = np.random.default_rng(number).normal(0.3, 1.0, number)
    interval = seeds_interval(scores, np.tile(scores, (RESAMPLES, 1)))  # no spread over examples
    half = T_975[number] * scores.std(ddof=1) / np.sqrt(number)
    assert interval[:3] == pytest.approx((scores.mean(), scores.mean() - half, scores.mean() + half), rel=2e-3)


def test_the_two_parts_of_the_variance_are_found():
    draw = np.random.default_rng(0)
    examples = draw.normal(0.0, 0.5, (RESAMPLES, 1))  # every seed answers the same examples
    scores = np.array([-1.0, 1.0])
    assert variance_parts(scores, examples + scores) == pytest.approx((0.25, np.var(scores, ddof=1) / 2), rel=0.03)
    noise = draw.normal(0.0, 0.4, (RESAMPLES, 2))  # and answers them by chance: no part of what examples share
    assert variance_parts(scores, examples + noise + scores)[0] == pytest.approx(0.25, rel=0.05)
    assert variance_parts(scores, noise + scores)[0] == pytest.approx(0.0, abs=0.004)
    assert variance_parts(scores[:1], examples) == (pytest.approx(0.25, rel=0.03), 0.0)


def test_one_seed_has_no_spread_over_seeds():
    draws = np.random.default_rng(0).normal(0.0, 1.0, (500, 1))
    assert (over_seeds(np.zeros(1), draws) == draws[:, 0]).all()


REGIMES = {  # standard deviations of the effects of seed, example, and example x seed
    "seed": (1.0, 0.5, 0.5),
    "example": (0.0, 1.0, 0.05),
    "noise": (0.0, 0.0, 1.0),
}
TRIALS, EXAMPLES = 1200, 100


def trained(sd, draw, seeds):
    """[N, TRIALS, S] scores of an arm around a true mean of zero, less what the base scores on the same examples."""
    seed, example, noise = sd
    shape = (EXAMPLES, TRIALS, seeds)
    effects = seed * draw.normal(size=(1, TRIALS, seeds)) + example * draw.normal(size=(EXAMPLES, TRIALS, 1))
    return effects + noise * draw.normal(size=shape)


@pytest.fixture(scope="module")
def resampler():
    """[1000, N] shares of every example in each resample, as resampled_means draws them; shared by all trials."""
    return resampled_means(np.eye(EXAMPLES), np.ones(EXAMPLES), 1000, rng())


def covered(resampler, scores):
    """Shares of the trials whose interval holds the true mean, zero, and whose p-value is below 5 %."""
    draws = np.einsum("rn,nts->trs", resampler, scores, optimize=True)
    found = [seeds_interval(mean, drawn) for mean, drawn in zip(scores.mean(axis=0), draws, strict=True)]
    return np.mean([item.low <= 0 <= item.high for item in found]), np.mean([item.p < 0.05 for item in found])


@pytest.mark.parametrize("seeds", T_975)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("compared", ["base", "arm"])
def test_intervals_over_seeds_cover_the_truth(resampler, compared, regime, seeds):
    draw = np.random.default_rng([seeds, len(regime), len(compared)])
    scores = trained(REGIMES[regime], draw, seeds)
    if compared == "arm":  # what the two arms share of a seed and of an example cancels in their paired difference
        shared = 3.0 * draw.normal(size=(1, TRIALS, seeds)) + 3.0 * draw.normal(size=(EXAMPLES, TRIALS, 1))
        scores = (trained(REGIMES[regime], draw, seeds) + shared) - (scores + shared)
    share, rejected = covered(resampler, scores)
    assert 0.93 <= share <= 0.97
    assert rejected == pytest.approx(1 - share, abs=0.005)


@pytest.mark.parametrize("seeds", T_975)
def test_between_the_regimes_intervals_cover_no_less(resampler, seeds):
    scores = trained((0.1, 0.8, 0.5), np.random.default_rng(seeds), seeds)  # of the mean: .0064 + .0125 / seeds
    assert 0.945 <= covered(resampler, scores)[0] <= 0.995


@pytest.mark.parametrize("seeds", T_975)
@pytest.mark.parametrize("changed", [0.03, 0.3])
def test_seeds_that_tie_on_a_few_answers_prove_nothing(seeds, changed):
    # 40 questions, of which each seed answers a few differently for no reason: often all seeds have the same score
    draw = np.random.default_rng([seeds, round(100 * changed)])
    shape = (40, TRIALS, seeds)
    scores = (draw.random(shape) < changed) * draw.choice([-1.0, 1.0], shape)
    share, _ = covered(resampled_means(np.eye(40), np.ones(40), 1000, rng()), scores)
    assert share >= 0.945


def test_tied_seeds_by_hand():
    # three seeds at 0.1 whose resamples vary independently with variance 0.04: 0.04 / 3 for the mean
    noise = np.random.default_rng(0).normal(0.0, 0.2, (RESAMPLES, 3))
    interval = seeds_interval(np.full(3, 0.1), 0.1 + noise)
    assert interval.high - 0.1 == pytest.approx(T_975[3] * 0.2 / np.sqrt(3), rel=0.03)
    assert seeds_interval(np.full(3, 0.1), np.full((100, 3), 0.1))[:3] == pytest.approx((0.1, 0.1, 0.1))


def test_pareto_front_by_hand():
    #        A         B         C dominated by B   D twin of B  E         F dominated by all but A
    points = [(1, 9.0), (5, 5.0), (4, 5.0), (5, 5.0), (9, 1.0), (1, 1.0)]
    assert pareto_front(points) == [True, True, False, True, True, False]
    assert pareto_front([(float("nan"), 1.0), (0.0, 0.0)]) == [False, True]
    assert pareto_front([]) == []


def crossed(gain, cost, steps, level):
    """(cost, step) where one path first reaches the level; NaN where it never does."""
    rows = np.array([gain, cost, steps], dtype=np.float64)
    position = crossing_positions(rows[:1], np.array([float(level)]))
    return tuple(float(at_positions(row[None], position)[0]) for row in rows[1:])


def test_first_crossing_by_hand():
    gain, cost, steps = [0, 2, 6, 4], [0, 1, 5, 9], [0, 10, 20, 30]
    assert crossed(gain, cost, steps, 1) == (0.5, 5.0)  # half of the first segment
    assert crossed(gain, cost, steps, 2) == (1.0, 10.0)  # a point itself
    assert crossed(gain, cost, steps, 5) == (4.0, 17.5)  # the first time up, not the way down
    assert crossed(gain, cost, steps, 6) == (5.0, 20.0)
    assert np.isnan(crossed(gain, cost, steps, 6.1)).all()


def test_first_crossing_of_a_path_that_falls_first():
    assert crossed([0, -2, 2], [0, 3, 4], [0, 8, 16], 1) == (3.75, 14.0)
    assert np.isnan(crossed([0, -1], [0, 1], [0, 8], 0.5)).all()


def test_vectorised_crossings_equal_the_single_ones():
    draw = np.random.default_rng(3)
    gain, cost = np.cumsum(draw.normal(0.4, 1, (50, 6)), axis=1), draw.random((50, 6))
    level = draw.random(50) * 2
    found = at_positions(cost, crossing_positions(gain, level))
    for row in range(50):
        single, _ = crossed(gain[row], cost[row], range(6), level[row])
        assert found[row] == pytest.approx(single, nan_ok=True)
