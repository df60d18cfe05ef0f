"""Resampling against exact enumeration, crossings and fronts against drawings on paper."""

import itertools

import numpy as np
import pytest

from eaft_verl.reporting.statistics import (
    Interval,
    at_positions,
    crossing_positions,
    first_crossing,
    over_seeds,
    pareto_front,
    percentile_interval,
    resampled_means,
    seed_picks,
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
    assert interval == Interval(0.5, 0.0, 1.0)
    assert not interval.excludes_zero


def test_three_examples_give_the_percentiles_of_the_enumeration():
    # all-equal draws have probability 1/27 = 3.7 % each > 2.5 %, so the bounds are the smallest and largest value
    interval = interval_of([1.0, 2.0, 6.0])
    assert interval == pytest.approx((3.0, 1.0, 6.0))
    assert interval.excludes_zero


def test_weights_are_tokens():
    assert interval_of([1.0, 4.0], [3, 1]) == pytest.approx((1.75, 1.0, 4.0))


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
    monkeypatch.setattr("eaft_verl.reporting.statistics._DRAWS_IN_MEMORY", 6)
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
    assert percentile_interval(1.0, draws, tolerated=0.01) == (1.0, 1.0, 1.0)
    assert np.isnan(percentile_interval(1.0, np.full(3, np.nan), tolerated=1.0).low)


def test_two_seeds_are_resampled_as_enumerated_with_their_full_variance():
    draws = np.tile([0.0, 1.0], (RESAMPLES, 1))  # no spread over examples
    means = over_seeds(draws, seed_picks((0, 1), RESAMPLES, 0))
    # picked means 0, 0.5, 1 with 1/4, 1/2, 1/4, their distance to 0.5 times sqrt(2)
    expected = [0.5 - np.sqrt(0.5), 0.5, 0.5 + np.sqrt(0.5)]
    assert [np.mean(np.isclose(means, value)) for value in expected] == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    assert means.var() == pytest.approx(np.var([0.0, 1.0], ddof=1) / 2, rel=0.02)  # of the mean of two seeds


@pytest.mark.parametrize("number", [2, 3, 5])
def test_the_spread_over_seeds_is_the_unbiased_one(number):
    scores = np.random.default_rng(number).normal(0.0, 1.0, number)
    means = over_seeds(np.tile(scores, (RESAMPLES, 1)), seed_picks(range(number), RESAMPLES, 0))
    assert means.var() == pytest.approx(scores.var(ddof=1) / number, rel=0.03)
    assert means.mean() == pytest.approx(scores.mean(), abs=0.02)


def test_examples_and_seeds_both_widen_the_interval():
    draw = np.random.default_rng(0)
    examples = draw.normal(0.0, 0.5, (RESAMPLES, 1))  # every seed answers the same examples
    means = over_seeds(examples + np.array([-1.0, 1.0]), seed_picks((0, 1), RESAMPLES, 0))
    assert means.var() == pytest.approx(0.5**2 + np.var([-1.0, 1.0], ddof=1) / 2, rel=0.03)


def test_equal_sets_of_seeds_are_paired_and_one_seed_has_no_spread():
    draws = np.random.default_rng(0).normal(0.0, 1.0, (500, 2))
    picks = seed_picks((0, 1), 500, 0)
    assert over_seeds(draws + 0.25, picks) - over_seeds(draws, picks) == pytest.approx(0.25)
    assert (over_seeds(draws[:, 1:], seed_picks((7,), 500, 0)) == draws[:, 1]).all()


def test_pareto_front_by_hand():
    #        A         B         C dominated by B   D twin of B  E         F dominated by all but A
    points = [(1, 9.0), (5, 5.0), (4, 5.0), (5, 5.0), (9, 1.0), (1, 1.0)]
    assert pareto_front(points) == [True, True, False, True, True, False]
    assert pareto_front([(float("nan"), 1.0), (0.0, 0.0)]) == [False, True]
    assert pareto_front([]) == []


def test_first_crossing_by_hand():
    gain, cost, steps = [0, 2, 6, 4], [0, 1, 5, 9], [0, 10, 20, 30]
    assert first_crossing(gain, cost, steps, 1) == (0.5, 5.0)  # half of the first segment
    assert first_crossing(gain, cost, steps, 2) == (1.0, 10.0)  # a point itself
    assert first_crossing(gain, cost, steps, 5) == (4.0, 17.5)  # the first time up, not the way down
    assert first_crossing(gain, cost, steps, 6) == (5.0, 20.0)
    assert first_crossing(gain, cost, steps, 6.1) is None


def test_first_crossing_of_a_path_that_falls_first():
    assert first_crossing([0, -2, 2], [0, 3, 4], [0, 8, 16], 1) == (3.75, 14.0)
    assert first_crossing([0, -1], [0, 1], [0, 8], 0.5) is None


def test_vectorised_crossings_equal_the_single_ones():
    draw = np.random.default_rng(3)
    gain, cost = np.cumsum(draw.normal(0.4, 1, (50, 6)), axis=1), draw.random((50, 6))
    level = draw.random(50) * 2
    found = at_positions(cost, crossing_positions(gain, level))
    for row in range(50):
        single = first_crossing(gain[row], cost[row], range(6), level[row])
        assert np.isnan(found[row]) if single is None else found[row] == pytest.approx(single.cost)
