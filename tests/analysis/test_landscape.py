"""The plane of probability and entropy: its bounds, counts, regimes, and intervals over samples."""

import math

import numpy as np
import pytest
from analysis.made_stores import random_columns, statistics, write_store

from eaft_verl.analysis.blocks import blocks, candidates
from eaft_verl.analysis.landscape import (
    Boxes,
    Landscape,
    binary_entropy,
    highest_topk_entropy,
    lowest_topk_entropy,
)
from eaft_verl.analysis.survey import Survey

COLUMNS = ("sample", "position", "token", "logprob", "entropy", "full_entropy", "max_prob", "sum_p2")


def read(store, part):
    for block in blocks(store, COLUMNS, {}):
        part.add(block)
    return part.result()


def landscape(store):
    return read(store, Landscape(store.meta["tokens"], candidates(store), store.meta["vocab"]))


def topk_entropy(prob, k):
    top = np.sort(prob, axis=-1)[..., ::-1][..., :k]
    share = top / top.sum(axis=-1, keepdims=True)
    return -(share * np.log(np.maximum(share, 1e-300))).sum(axis=-1)


@pytest.mark.parametrize(("vocab", "k"), [(3, 2), (6, 3), (12, 4), (40, 20), (5, 5)])
@pytest.mark.parametrize("p", [0.01, 0.08, 0.2, 0.35, 0.5, 0.65, 0.9, 0.99])
def test_no_distribution_leaves_the_bounds_and_one_reaches_each(vocab, k, p):
    rng = np.random.default_rng(0)
    rest = np.concatenate([rng.dirichlet(np.full(vocab - 1, a), 4000) for a in (0.02, 0.1, 0.5, 2.0, 50.0)])
    full = np.concatenate([np.full((len(rest), 1), p), rest * (1 - p)], axis=1)
    found = topk_entropy(full, k)
    low, high = lowest_topk_entropy(np.array([p]), k, vocab)[0], highest_topk_entropy(np.array([p]), k)[0]
    assert found.min() >= low - 1e-9
    assert found.max() <= high + 1e-9
    alone = np.array([p, 1 - p, *[0.0] * (vocab - 2)])
    spread = np.array([p, *[(1 - p) / (vocab - 1)] * (vocab - 1)])
    assert low == pytest.approx(min(topk_entropy(alone, k), topk_entropy(spread, k) if p >= 1 / vocab else 9), abs=1e-9)
    even = np.array([p, *[(1 - p) / (k - 1)] * (k - 1), *[0.0] * (vocab - k)])
    if p >= 1 / k:
        assert high == pytest.approx(topk_entropy(even, k), abs=1e-9)


def test_full_entropy_is_never_below_h_of_p(tmp_path):
    columns = random_columns(20, 50)
    assert (columns["full_entropy"] >= binary_entropy(np.exp(columns["logprob"])) - 1e-12).all()
    assert landscape(write_store(tmp_path / "s", **columns))["below_bound"] == 0
    columns["full_entropy"][:7] = 0.0
    columns["logprob"][:7] = math.log(0.4)
    assert landscape(write_store(tmp_path / "t", **columns))["below_bound"] == 7


def test_regimes_by_hand(tmp_path):
    p, h = [0.1, 0.19, 0.21, 0.9, 0.3, 0.05], [0.5, 0.51, 0.1, 0.2, 2.5, 0.0]
    sum_p2 = [0.8, 0.7, 0.7, 0.82, 0.2, 0.9]
    store = write_store(tmp_path, token=np.arange(6), logprob=np.log(p), entropy=h, sum_p2=sum_p2)
    found = landscape(store)
    rows = found["regimes"]
    assert {name: row["tokens"] for name, row in rows.items()} == {
        "conflict": 2,
        "settled": 1,
        "branching": 1,
        "other": 2,
    }
    errors = [math.sqrt(1 - 2 * a + b) for a, b in zip(p, sum_p2, strict=True)]
    assert rows["conflict"]["mean_nll"] == pytest.approx(-(math.log(0.1) + math.log(0.05)) / 2, rel=1e-6)
    assert rows["conflict"]["error_share"] == pytest.approx((errors[0] + errors[5]) / sum(errors), rel=1e-6)
    nll = -np.log(p)
    assert rows["conflict"]["nll_share"] == pytest.approx((nll[0] + nll[5]) / nll.sum(), rel=1e-6)
    assert found["nll"] == pytest.approx(nll.mean(), rel=1e-6)


def test_histograms_hold_every_token_where_numpy_puts_it(tmp_path):
    columns = random_columns(30, 40)
    found = landscape(write_store(tmp_path, **columns))
    p, h = np.exp(columns["logprob"]), columns["entropy"] / math.log(20)
    expected, *_ = np.histogram2d(p, h, bins=(50, 40), range=((0, 1), (0, 1)))
    assert np.abs(np.array(found["histogram"]) - expected).sum() <= 4  # float32 at a border
    logs = np.clip(columns["logprob"] / math.log(10), -8, 0)
    expected, *_ = np.histogram2d(logs, h, bins=(48, 40), range=((-8, 0), (0, 1)))
    assert np.abs(np.array(found["log_histogram"]) - expected).sum() <= 4
    assert sum(map(sum, found["histogram"])) == found["tokens"] == 1200


def test_shares_by_threshold_and_quantile(tmp_path):
    columns = random_columns(40, 100, seed=3)
    store = write_store(tmp_path, **columns)
    survey = Survey(store)
    rows = read(store, Boxes(survey, survey))
    p, h = np.exp(columns["logprob"]), columns["entropy"]
    assert rows[0]["share"] == pytest.approx(((h <= 0.5) & (p < 0.2)).mean())
    assert rows[3]["share"] == pytest.approx(((h / math.log(20) <= 0.17) & (p < 0.1)).mean())
    for row in rows[4:]:
        cut = np.quantile(p, row["quantile"]), np.quantile(h / math.log(20), row["quantile"])
        assert row["prob"] == pytest.approx(cut[0], rel=1e-3)
        assert row["share"] == pytest.approx(((p <= cut[0]) & (h / math.log(20) <= cut[1])).mean(), abs=0.002)


def test_intervals_resample_samples_and_not_tokens(tmp_path):
    """All conflicts in 4 of 40 samples: over tokens the interval would be far too narrow."""
    conflict = np.repeat(np.arange(40) < 4, 50)
    logprob = np.where(conflict, math.log(0.01), math.log(0.95))
    store = write_store(
        tmp_path, token=np.zeros(2000), logprob=logprob, entropy=np.full(2000, 0.1), sample=np.repeat(np.arange(40), 50)
    )
    survey = Survey(store)
    row = read(store, Boxes(survey, survey))[0]
    rng = np.random.default_rng(9)
    draws = [rng.choice(np.arange(40) < 4, 40).mean() for _ in range(4000)]
    assert row["share"] == pytest.approx(0.1)
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.026)
    assert row["high"] - row["low"] > 5 * 1.96 * math.sqrt(0.1 * 0.9 / 2000)


@pytest.mark.parametrize(("samples", "logprob", "share"), [(1, -5.0, 1.0), (40, -0.01, 0.0)])
def test_no_interval_where_resamples_have_no_spread(tmp_path, samples, logprob, share):
    columns = {"token": np.zeros(80), "logprob": np.full(80, logprob), "entropy": np.full(80, 0.1)}
    store = write_store(tmp_path, sample=np.repeat(np.arange(samples), 80 // samples), **columns)
    survey = Survey(store)
    row = read(store, Boxes(survey, survey))[0]
    assert (row["share"], row["low"], row["high"]) == (share, None, None)


def test_random_groups_give_the_interval_of_single_samples(tmp_path, monkeypatch):
    columns = random_columns(600, 8, seed=5)
    store = write_store(tmp_path, **columns)
    survey = Survey(store)
    single = read(store, Boxes(survey, survey))[0]
    monkeypatch.setattr("eaft_verl.analysis.landscape.GROUPS", 200)
    grouped = read(store, Boxes(survey, survey))[0]
    assert grouped["share"] == pytest.approx(single["share"])
    assert grouped["high"] - grouped["low"] == pytest.approx(single["high"] - single["low"], rel=0.2)


def test_numbers_do_not_depend_on_the_blocks(tmp_path, monkeypatch):
    store = write_store(tmp_path, **random_columns(30, 40))
    whole = landscape(store)
    monkeypatch.setattr("eaft_verl.analysis.blocks.ROWS", 37)
    parts = landscape(store)
    assert parts["histogram"] == whole["histogram"]
    assert parts["points"] == whole["points"]
    assert parts["regimes"]["conflict"] == pytest.approx(whole["regimes"]["conflict"])


def test_statistics_of_the_helper_are_those_of_training():
    import torch

    from eaft_verl.tokens.logits import reference_stats

    logits, labels = np.random.default_rng(1).normal(size=(9, 50)) * 3, np.arange(9)
    mine, theirs = statistics(logits, labels, 20), reference_stats(torch.tensor(logits), torch.tensor(labels))
    assert mine["entropy"] == pytest.approx(theirs.entropy_T.numpy(), abs=1e-12)
    assert mine["logprob"] == pytest.approx(-theirs.nll_T.numpy(), abs=1e-12)
