"""Sign-flip test, quantiles over clustered tokens, joint resamples over seeds: each found another way."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest, t

from eaft_verl.pages.statistics import clustered_quantiles, jointly_over_seeds, over_seeds, sign_flip_p


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 9), (12, 12), (40, 11), (5, 0)])
def test_of_right_and_wrong_it_is_mcnemars_exact_test(lost: int, gained: int) -> None:
    found = sign_flip_p([-1] * lost + [1] * gained + [0] * 50)
    known = binomtest(gained, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert found == pytest.approx(known, abs=1e-12)


@pytest.mark.parametrize("differences", [[2, -1, 3, 0], [1, 1, -2, 3, 3], [-3, -3, -1], [2, -2]])
def test_larger_differences_by_every_assignment_of_signs(differences: list[int]) -> None:
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    assert sign_flip_p(differences) == pytest.approx(np.mean([total >= abs(sum(differences)) for total in sums]))


def test_it_rejects_no_more_often_than_it_says() -> None:
    """Base and two seeds that are right with the same probability on each question: no change to be found."""
    rng = np.random.default_rng(0)
    p = []
    for _ in range(400):
        right = rng.random(60) < 0.5
        skill = np.where(right, 0.8, 0.3)
        base, first, second = (rng.random(60) < skill for _ in range(3))
        p.append(sign_flip_p((first.astype(int) + second - 2 * base).tolist()))
    shares = [np.mean(np.array(p) <= level) for level in (0.05, 0.2)]
    assert shares[0] <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400) and shares[1] <= 0.2 + 3 * np.sqrt(0.16 / 400)
    assert np.mean(np.array(p) <= 0.5) > 0.25  # and not because it never does


def test_quantiles_are_those_of_numpy() -> None:
    values = np.random.default_rng(1).gamma(0.4, size=101)
    found = clustered_quantiles(values, np.arange(101) % 7, (0.5, 0.95, 0.99), 0, np.random.default_rng(0))
    assert found[0].tolist() == np.quantile(values, (0.5, 0.95, 0.99), method="inverted_cdf").tolist()
    shuffled = np.random.default_rng(2).permutation(101)
    again = clustered_quantiles(values[shuffled], (np.arange(101) % 7)[shuffled], (0.5,), 0, np.random.default_rng(0))
    assert again[0, 0] == found[0, 0]


def test_their_intervals_cover_the_true_quantile_although_tokens_hang_together() -> None:
    """ln KL of a token = its example's level + its own noise: normal with variance 2, so quantiles are known."""
    rng = np.random.default_rng(3)
    truth = np.exp(np.sqrt(2) * np.array([0.0, 1.6448536]))
    hits = []
    for _ in range(200):
        level = rng.standard_normal(40)
        owners = np.repeat(np.arange(40), 25)
        values = np.exp(level[owners] + rng.standard_normal(1000))
        drawn = clustered_quantiles(values, owners, (0.5, 0.95), 300, rng)[1:]
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        hits.append((low <= truth) & (truth <= high))
    covered = np.mean(hits, axis=0)
    assert covered[0] > 0.9  # 95 % less 3 standard errors of 200
    assert covered[1] > 0.82  # few examples reach the tail, so percentile bounds are too narrow there: about 88 %


def test_one_seed_is_resampled_over_examples_only() -> None:
    values = np.random.default_rng(4).standard_normal((50, 1, 3))
    assert (jointly_over_seeds(values, np.random.default_rng(0)) == values[:, 0]).all()


def test_every_column_has_the_law_of_the_single_one_and_columns_stay_together() -> None:
    rng = np.random.default_rng(5)
    scores = np.array([[1.0, 1.1], [1.4, 1.5], [1.2, 1.3]])
    draws = scores + 0.01 * rng.standard_normal((20000, 1, 1))
    found = jointly_over_seeds(np.concatenate([scores[None], draws]), rng)
    assert found[0] == pytest.approx([1.2, 1.3])
    single = over_seeds(scores[:, 0], draws[:, :, 0])
    points = [0.1, 0.25, 0.75, 0.9]
    assert np.quantile(found[1:, 0], points) == pytest.approx(np.quantile(single, points), abs=0.01)
    student = 1.2 + t.ppf(points, 2) * 0.2 / np.sqrt(3)
    assert np.quantile(found[1:, 0], points) == pytest.approx(student, abs=0.015)
    assert np.abs(found[1:, 1] - found[1:, 0] - 0.1).max() < 1e-9  # two checkpoints of the same seeds move together
