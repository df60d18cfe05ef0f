"""logit_stats against the plain definition and against numpy in float64; entropy's properties; quantiles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_fixtures import EXACT, few, random_tokens
from torch.nn.functional import one_hot
from torch.testing import assert_close

from eaft_verl.tokens.logits import (
    CHUNK_TOKENS,
    Distribution,
    LogitStats,
    distribution_stats,
    largest,
    logit_stats,
    reference_stats,
    row_distribution,
    topk_entropy,
)
from eaft_verl.tokens.stats import BaseStats

SEEDS = st.integers(0, 2**31)


def numpy_stats(logits_TV: torch.Tensor, labels_T: torch.Tensor, k: int) -> LogitStats:
    """The definitions once more, token by token, with nothing of torch's."""
    rows = []
    for logits_V, label in zip(logits_TV.double().numpy(), labels_T.tolist(), strict=True):
        prob_V = np.exp(logits_V - logits_V.max()) / np.exp(logits_V - logits_V.max()).sum()
        entropies = []
        for size in (k, 20):
            best_K = np.sort(prob_V)[::-1][:size]
            share_K = best_K[best_K > 0] / best_K.sum()
            entropies.append(-(share_K * np.log(share_K)).sum())
        some_V = prob_V[prob_V > 0]
        full = -(some_V * np.log(some_V)).sum()
        rows.append([-np.log(prob_V[label]), *entropies, float(prob_V.argmax() == label), (prob_V**2).sum(), full])
    return LogitStats(*torch.tensor(np.array(rows)).unbind(-1))


def full_entropy(logits_TV: torch.Tensor) -> torch.Tensor:
    logprob_TV = logits_TV.log_softmax(-1)
    return -(logprob_TV.exp() * logprob_TV).sum(-1)


@few
@given(seed=SEEDS, k=st.sampled_from([2, 5, 20, 26, 27, 500]), scale=st.sampled_from([0.01, 1.0, 5.0]))
def test_both_paths_are_the_definition(seed, k, scale):
    logits_TV, labels_T, _, _ = random_tokens(seed, scale=scale)
    truth = numpy_stats(logits_TV, labels_T, k)
    fast = logit_stats(logits_TV, labels_T, torch.ones(12, dtype=torch.bool), k=k, sum_p2=True, full_entropy=True)
    for name, ours, plain, expected in zip(
        LogitStats._fields, fast, reference_stats(logits_TV, labels_T, k), truth, strict=True
    ):
        assert_close(ours, expected, **EXACT, msg=lambda text, name=name: f"logit_stats {name}: {text}")
        assert_close(plain, expected, **EXACT, msg=lambda text, name=name: f"reference_stats {name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
def test_error_against_float64_is_no_larger_than_the_plain_paths(dtype, scale):
    logits_TV, labels_T, _, _ = random_tokens(1, tokens=200, vocab=101, scale=scale)
    low_TV = logits_TV.to(dtype)
    truth = numpy_stats(low_TV, labels_T, 7)
    tolerance = 1e-6 + torch.finfo(torch.float32).eps * float(low_TV.abs().max())  # one rounding of a logit
    fast = logit_stats(low_TV, labels_T, torch.ones(200, dtype=torch.bool), k=7, sum_p2=True, full_entropy=True)
    for name, ours, plain, expected in zip(
        LogitStats._fields, fast, reference_stats(low_TV, labels_T, 7), truth, strict=True
    ):
        if name != "correct_T":  # equal largest logits, common in bfloat16, may be told apart either way
            assert ours.dtype == torch.float32
            error_T, eager_T = (ours - expected).abs(), (plain - expected).abs()
            assert (error_T <= eager_T + tolerance).all(), name


@pytest.mark.parametrize("trained", [1.0, 0.6])
@pytest.mark.parametrize("tokens", [1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 2])
def test_chunks_do_not_show(tokens, trained):
    logits_TV, labels_T, mask_T, _ = random_tokens(tokens, tokens=tokens, vocab=24, trained=trained)
    mask_T[-1] = True
    ours_TV, plain_TV = logits_TV.clone().requires_grad_(), logits_TV.clone().requires_grad_()
    fast = logit_stats(ours_TV, labels_T, mask_T, k=5, sum_p2=True, full_entropy=True)
    plain = reference_stats(plain_TV, labels_T, 5)
    fast.nll_T.sum().backward()
    plain.nll_T[mask_T].sum().backward()
    assert_close(ours_TV.grad, plain_TV.grad, **EXACT)
    for ours, expected in zip(fast, plain, strict=True):
        assert_close(ours, expected * mask_T, **EXACT)


@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_train_on(tokens):
    logits_TV = torch.full((tokens, 9), math.nan, requires_grad=True)
    stats = logit_stats(
        logits_TV,
        torch.zeros(tokens, dtype=torch.int64),
        torch.zeros(tokens, dtype=torch.bool),
        sum_p2=True,
        full_entropy=True,
    )
    stats.nll_T.sum().backward()
    assert all(value.tolist() == [0.0] * tokens for value in stats)
    assert logits_TV.grad.tolist() == [[0.0] * 9] * tokens


@few
@given(seed=SEEDS)
def test_gradient_is_that_of_log_softmax(seed):
    logits_TV, labels_T, mask_T, _ = random_tokens(seed)
    upstream_T = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours_TV, plain_TV = logits_TV.clone().requires_grad_(), logits_TV.clone().requires_grad_()
    (logit_stats(ours_TV, labels_T, mask_T).nll_T * upstream_T).sum().backward()
    nll_T = -plain_TV.log_softmax(-1)[torch.arange(12), labels_T]
    (nll_T * upstream_T)[mask_T].sum().backward()
    assert_close(ours_TV.grad, plain_TV.grad, **EXACT)


def test_gradient_norms_in_closed_form():
    logits_TV, labels_T, _, _ = random_tokens(3)
    logits_TV.requires_grad_()
    stats = logit_stats(logits_TV, labels_T, torch.ones(12, dtype=torch.bool), sum_p2=True, full_entropy=True)
    stats.nll_T.sum().backward()
    prob_T = (-stats.nll_T.detach()).exp()
    assert_close(logits_TV.grad.norm(dim=-1), (1 - 2 * prob_T + stats.sum_p2_T).sqrt(), **EXACT)
    assert_close(logits_TV.grad.abs().sum(-1), 2 * (1 - prob_T), **EXACT)


def test_low_precision_gradient_is_rounded_once():
    logits_TV, labels_T, _, _ = random_tokens(4, trained=1.0)
    low_TV = logits_TV.bfloat16().requires_grad_()
    logit_stats(low_TV, labels_T, torch.ones(12, dtype=torch.bool)).nll_T.sum().backward()
    truth_TV = low_TV.detach().float().softmax(-1) - one_hot(labels_T, 27)
    assert low_TV.grad.dtype == torch.bfloat16
    assert_close(low_TV.grad.float(), truth_TV, rtol=2**-8, atol=1e-7)


def test_only_nll_carries_a_gradient():
    logits_TV, labels_T, mask_T, _ = random_tokens(5)
    stats = logit_stats(logits_TV.requires_grad_(), labels_T, mask_T, sum_p2=True, full_entropy=True)
    assert [value.requires_grad for value in stats] == [True, False, False, False, False, False]
    with torch.no_grad():
        assert not logit_stats(logits_TV, labels_T, mask_T).nll_T.requires_grad


def test_sum_p2_is_none_unless_asked_for():
    logits_TV, labels_T, mask_T, _ = random_tokens(5)
    assert logit_stats(logits_TV, labels_T, mask_T).sum_p2_T is None


def test_backward_twice_is_an_error():
    logits_TV, labels_T, mask_T, _ = random_tokens(6)
    total = logit_stats(logits_TV.requires_grad_(), labels_T, mask_T).nll_T.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        total.backward()


def test_logits_overwritten_before_backward_change_nothing():
    logits_TV, labels_T, mask_T, _ = random_tokens(7)
    expected_TV = (logits_TV.softmax(-1) - one_hot(labels_T, 27)) * mask_T[:, None]
    logits_TV.requires_grad_()
    total = logit_stats(logits_TV, labels_T, mask_T).nll_T.sum()
    logits_TV.data.fill_(math.nan)
    total.backward()
    assert_close(logits_TV.grad, expected_TV, **EXACT)


def test_the_inputs_are_left_alone():
    tokens = random_tokens(8)
    copies = [value.clone() for value in tokens]
    logits_TV = tokens.logits_TV.requires_grad_()
    logit_stats(logits_TV, tokens.labels_T, tokens.mask_T, sum_p2=True, full_entropy=True).nll_T.sum().backward()
    assert all(torch.equal(value, copy) for value, copy in zip(tokens, copies, strict=True))


# --- top-K entropy ---------------------------------------------------------------------------------------------------


def test_entropy_by_hand():
    logits_TK = torch.tensor(
        [[0.0, 0.0, 0.0, -math.inf], [1e4, 0.0, -1e4, -math.inf], [math.log(3), 0.0, -math.inf, -1e4]],
        dtype=torch.float64,
    )
    expected = [math.log(3), 0.0, 2 * math.log(2) - 0.75 * math.log(3)]
    assert_close(topk_entropy(logits_TK), torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("k", [2, 20, 27])
def test_uniform_logits_have_the_largest_entropy(k):
    stats = logit_stats(
        torch.full((4, 27), -3.0, dtype=torch.float64), torch.arange(4), torch.ones(4, dtype=torch.bool), k=k
    )
    assert_close(stats.entropy_T, torch.full((4,), math.log(k), dtype=torch.float64), **EXACT)
    assert_close(stats.entropy20_T, torch.full((4,), math.log(20), dtype=torch.float64), **EXACT)


@few
@given(seed=SEEDS, scale=st.sampled_from([0.1, 2.0, 10.0]))
def test_entropy_grows_with_k_up_to_the_full_one(seed, scale):
    logits_TV, labels_T, _, _ = random_tokens(seed, vocab=40, scale=scale)
    every_T = torch.ones(12, dtype=torch.bool)
    ladder = torch.stack(
        [logit_stats(logits_TV, labels_T, every_T, k=k).entropy_T for k in (2, 3, 5, 10, 20, 30, 40, 41)]
    )
    assert (ladder.diff(dim=0) >= -1e-12).all()
    assert_close(ladder[-2], full_entropy(logits_TV), **EXACT)
    assert_close(ladder[-1], ladder[-2], rtol=0, atol=0)


@few
@given(seed=SEEDS, shift=st.floats(-100, 100))
def test_entropy_ignores_shift_and_order(seed, shift):
    logits_TV, labels_T, _, _ = random_tokens(seed, vocab=30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    every_T = torch.ones(12, dtype=torch.bool)
    plain, moved = (
        logit_stats(logits_TV, labels_T, every_T),
        logit_stats(logits_TV[:, order] + shift, labels_T, every_T),
    )
    assert_close(moved.entropy_T, plain.entropy_T, **EXACT)


@few
@given(seed=SEEDS)
def test_entropy_is_at_least_that_of_the_label_against_the_rest(seed):
    logits_TV, labels_T, _, _ = random_tokens(seed)
    prob_T = logits_TV.softmax(-1).gather(-1, labels_T[:, None])[:, 0]
    binary_T = -(prob_T * prob_T.log() + (1 - prob_T) * torch.log1p(-prob_T))
    entropy_T = logit_stats(logits_TV, labels_T, torch.ones(12, dtype=torch.bool), k=27).entropy_T
    assert (binary_T <= entropy_T + 1e-12).all()


@few
@given(seed=SEEDS)
def test_full_entropy_is_the_chain_rule_over_head_and_tail(seed):
    logits_TV, labels_T, _, _ = random_tokens(seed, vocab=40)
    head_TK = logits_TV.softmax(-1).sort(-1, descending=True).values[:, :20]
    tail_TK = logits_TV.sort(-1, descending=True).values[:, 20:]
    mass_T = head_TK.sum(-1)
    binary_T = -(mass_T * mass_T.log() + (1 - mass_T) * torch.log1p(-mass_T))
    head_T = logit_stats(logits_TV, labels_T, torch.ones(12, dtype=torch.bool)).entropy_T
    whole_T = binary_T + mass_T * head_T + (1 - mass_T) * full_entropy(tail_TK)
    assert_close(whole_T, full_entropy(logits_TV), rtol=0, atol=1e-9)


def test_topk_commutes_with_the_upcast_bit_for_bit():
    logits_TV = random_tokens(9, tokens=64, vocab=5000).logits_TV.bfloat16()
    assert torch.equal(logits_TV.topk(20).values.float(), logits_TV.float().topk(20).values)


def test_bfloat16_logits_give_the_entropy_of_their_upcast_bit_for_bit():
    logits_TV, labels_T, mask_T, _ = random_tokens(9, vocab=500)
    low = logit_stats(logits_TV.bfloat16(), labels_T, mask_T, sum_p2=True, full_entropy=True)
    wide = logit_stats(logits_TV.bfloat16().float(), labels_T, mask_T, sum_p2=True, full_entropy=True)
    assert all(torch.equal(a, b) for name, a, b in zip(low._fields, low, wide, strict=True) if name != "correct_T")


def test_an_impossible_label_costs_infinitely_and_the_rest_is_finite():
    logits_TV = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    stats = logit_stats(logits_TV, torch.tensor([2]), torch.tensor([True]), sum_p2=True, full_entropy=True)
    stats.nll_T.sum().backward()
    assert stats.nll_T.item() == math.inf
    assert float(stats.entropy_T) == pytest.approx(math.log(2)) and float(stats.sum_p2_T) == pytest.approx(0.5)
    assert logits_TV.grad[0].tolist() == pytest.approx([0.5, 0.5, -1.0])


# --- quantiles -------------------------------------------------------------------------------------------------------


@settings(few, max_examples=40)
@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40, unique=True),
    q=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.15, 0.5, 1.0])),
    name=st.sampled_from(["entropy", "prob", "mean_nll"]),
)
def test_quantile_is_numpys(values, q, name):
    filler = {"entropy": torch.tensor([7.0]), "prob": torch.tensor([8.0]), "mean_nll": torch.tensor([9.0])}
    base = BaseStats(**{**filler, name: torch.tensor(values)})
    assert base.quantile(name, q) == pytest.approx(np.quantile(np.array(values, dtype=np.float64), q), abs=1e-12)


# distribution_stats


def numpy_distribution(logits_TV: torch.Tensor, labels_T: torch.Tensor, k: int) -> Distribution:
    """The definitions token by token in float64, with nothing of torch's."""
    rows = []
    for logits_V, label in zip(logits_TV.double().numpy(), labels_T.tolist(), strict=True):
        prob_V = np.exp(logits_V - logits_V.max()) / np.exp(logits_V - logits_V.max()).sum()
        best_K = np.sort(prob_V)[::-1][:k]
        share_K, some_V = best_K[best_K > 0] / best_K.sum(), prob_V[prob_V > 0]
        entropies = [-(share * np.log(share)).sum() for share in (share_K, some_V)]
        rows.append([-np.log(prob_V[label]), *entropies, prob_V.max(), (prob_V**2).sum(), best_K.sum()])
    argmax = torch.tensor([int(row.argmax()) for row in logits_TV.double().numpy()])
    return Distribution(*torch.tensor(np.array(rows)).unbind(-1), argmax)


@few
@given(seed=SEEDS, k=st.sampled_from([2, 5, 20, 26, 27, 500]), scale=st.sampled_from([0.01, 1.0, 5.0, 100.0]))
def test_the_distribution_is_as_float64_numpy_has_it(seed, k, scale):
    logits_TV, labels_T, _, _ = random_tokens(seed, scale=scale)
    truth = numpy_distribution(logits_TV, labels_T, k)
    found = distribution_stats(logits_TV, labels_T, torch.ones(12, dtype=torch.bool), k=k)
    for name, ours, expected in zip(Distribution._fields, found, truth, strict=True):
        assert_close(ours, expected, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
def test_distribution_in_low_precision_is_float32_arithmetic(dtype, scale):
    logits_TV, labels_T, _, _ = random_tokens(1, tokens=200, vocab=101, scale=scale)
    low_TV = logits_TV.to(dtype)
    truth = numpy_distribution(low_TV, labels_T, 7)
    found = distribution_stats(low_TV, labels_T, torch.ones(200, dtype=torch.bool), k=7)
    tolerance = 2e-6 + 2 * torch.finfo(torch.float32).eps * float(low_TV.abs().max())
    for name, ours, expected in zip(Distribution._fields[:-1], found, truth, strict=False):
        assert ours.dtype == torch.float32
        assert ((ours - expected).abs() <= tolerance).all(), name


@pytest.mark.parametrize("vocab", [50, 64 * 40, 64 * 40 + 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_few_rows_at_a_time_say_what_all_at_once_say(monkeypatch, vocab, dtype):
    """17 rows in pieces that are no divisor of them; a largest logit behind the last whole group, -inf and NaN."""
    logits_TV, labels_T, _, _ = random_tokens(3, tokens=17, vocab=vocab, scale=3.0)
    logits_TV[4, -1], logits_TV[5, : vocab // 2], logits_TV[16, 3] = 40.0, -math.inf, math.nan
    logits_TV, labels_T = logits_TV.to(dtype), labels_T.clamp(min=vocab // 2)
    whole, best_R = row_distribution(logits_TV.clone(), labels_T, 7)
    monkeypatch.setattr("eaft_verl.tokens.logits._CACHED_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    pieces, likeliest_R = row_distribution(logits_TV.clone(), labels_T, 7)
    assert torch.equal(pieces[:, :16], whole[:, :16]) and torch.equal(likeliest_R[:16], best_R[:16])
    assert pieces[:, 16].isnan().all() and whole[:, 16].isnan().all()
    truth = numpy_distribution(logits_TV[:16], labels_T[:16], 7)
    for ours, expected in zip(pieces[:, :16], truth[:-1], strict=True):
        assert_close(ours.double(), expected.double(), rtol=1e-5, atol=1e-5)
    best_R = logits_TV[:16].gather(-1, likeliest_R[:16, None]).squeeze(-1)  # of equal ones any
    assert torch.equal(best_R, logits_TV[:16].amax(dim=-1))


@few
@given(seed=SEEDS)
def test_training_and_the_pass_say_the_same_of_a_token(seed):
    logits_TV, labels_T, mask_T, _ = random_tokens(seed)
    trained = logit_stats(logits_TV.float(), labels_T, mask_T, k=5, sum_p2=True, full_entropy=True)
    seen = distribution_stats(logits_TV.float(), labels_T, mask_T, k=5)
    assert torch.equal(trained.nll_T, seen.nll_T) and torch.equal(trained.entropy_T, seen.entropy_T)
    assert torch.equal(trained.correct_T.bool(), (seen.argmax_T == labels_T) & mask_T)
    assert_close(trained.sum_p2_T, seen.sum_p2_T, rtol=1e-6, atol=0)


def test_a_padded_vocabulary_has_no_share_in_the_distribution():
    logits_TV, labels_T, _, _ = random_tokens(5, tokens=3, vocab=30)
    labels_T = labels_T.clamp(max=9)
    padded_TV = logits_TV.clone()
    padded_TV[:, 10:] = -math.inf
    everything = torch.ones(3, dtype=torch.bool)
    padded = distribution_stats(padded_TV, labels_T, everything)
    cut = distribution_stats(logits_TV[:, :10], labels_T, everything)
    for ours, expected in zip(padded, cut, strict=True):
        assert_close(ours, expected, **EXACT)
    impossible = distribution_stats(padded_TV, torch.full((3,), 20), everything)
    assert impossible.nll_T.tolist() == [math.inf] * 3 and impossible.full_entropy_T.isfinite().all()


def test_masked_tokens_cost_nothing_and_nan_is_not_hidden():
    logits_TV, labels_T, _, _ = random_tokens(6, tokens=40)
    logits_TV[7] = math.nan
    mask_T = torch.arange(40) != 7
    found = distribution_stats(logits_TV, labels_T, mask_T)
    assert all(value[7] == 0 for value in found) and all(value.isfinite().all() for value in found)
    seen = distribution_stats(logits_TV, labels_T, torch.ones(40, dtype=torch.bool))
    assert all(value[7].isnan() for value in seen[:-1])


@pytest.mark.parametrize("vocab", [64 * 160, 64 * 200 + 1, 64 * 160 + 63, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_logits_are_those_of_topk(vocab, dtype):
    rows = torch.randn(7, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[1, 100:] = -torch.inf
    rows[2, -3:] = 50.0  # behind the last whole group, and equal
    rows[3, :40] = torch.linspace(60, 70, 40).to(dtype)  # all in one group
    rows[4] = 1.0
    rows[5, 5000 % vocab] = torch.nan
    values, places = largest(rows, 20)
    assert torch.equal(values.nan_to_num(99.0), rows.topk(20).values.nan_to_num(99.0))
    assert torch.equal(rows.gather(-1, places).nan_to_num(99.0), values.nan_to_num(99.0))
    assert all(len(set(row)) == 20 for row in places.tolist())
