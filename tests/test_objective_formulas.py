"""Weights worked out by hand, and gradients against the objective that each gate stands for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_fixtures import BASE, EXACT, few, gradient, random_tokens, ready, shipped
from torch.testing import assert_close

from eaft_verl.objectives import normalized_entropy
from eaft_verl.recipe.objective import build_objective
from eaft_verl.tokens.stats import BaseStats, TokenStats


def stats_of(entropy: float = 1.0, prob: float = 0.5, k: int = 20, **more) -> TokenStats:
    return TokenStats(
        torch.tensor([math.log(prob)], dtype=torch.float64), torch.tensor([entropy], dtype=torch.float64), k, **more
    )


def weight_of(name: str, stats: TokenStats, **params) -> float:
    return float(build_objective(name, **params).weight(stats))


# --- EAFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ratio"), [("eaft", 1.0), ("eaft_3", 1.0), ("eaft_llamafactory", 0.9985774), ("eaft_axolotl", 2.9957323)]
)
def test_uniform_logits_against_cross_entropy(name, ratio):
    tokens = random_tokens(0)._replace(logits_TV=torch.full((12, 27), 0.7, dtype=torch.float64))
    assert_close(shipped(ready(name), tokens, 9.0)[0], ratio * shipped(ready("sft"), tokens, 9.0)[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["eaft", "eaft_llamafactory", "eaft_axolotl"])
def test_one_hot_has_no_weight(name):
    tokens = random_tokens(0, trained=1.0)._replace(logits_TV=torch.eye(12, 27, dtype=torch.float64) * 100)
    assert (shipped(ready(name), tokens, 9.0)[1] < 1e-12).all()


def test_power_zero_is_sft_bit_for_bit():
    tokens = random_tokens(6)
    tokens.logits_TV[0] = torch.tensor([0.0] + [-math.inf] * 26)
    tokens.labels_T[0], tokens.mask_T[0] = 0, True
    for ours, sft in zip(
        gradient(ready("eaft", power=0), tokens, 9.0), gradient(ready("sft"), tokens, 9.0), strict=True
    ):
        assert torch.equal(ours, sft)


@pytest.mark.parametrize(("name", "expected"), [("eaft", 0.5), ("eaft_2", 0.25), ("eaft_3", 0.125)])
def test_powers_of_half_the_largest_entropy(name, expected):
    assert weight_of(name, stats_of(entropy=math.log(20) / 2)) == pytest.approx(expected, rel=1e-14)


def test_the_entropy_scale_follows_the_candidates():
    half = stats_of(entropy=math.log(2) / 2, k=2)
    assert weight_of("eaft", half) == pytest.approx(0.5, rel=1e-14)
    assert float(normalized_entropy(half, "3.0")) == pytest.approx(0.1155245, rel=1e-6)
    assert float(normalized_entropy(half, "none")) == pytest.approx(0.3465736, rel=1e-6)


def test_rounding_above_ln_k_or_below_zero_is_cut_off():
    assert weight_of("eaft", stats_of(entropy=math.log(20) * (1 + 1e-6))) == 1.0
    assert weight_of("eaft", stats_of(entropy=-1e-9)) == 0.0
    assert weight_of("eaft", stats_of(entropy=-1e-9), power=0.5) == 0.0


def test_a_vocabulary_of_one_entry_does_not_divide_by_zero():
    assert weight_of("eaft", stats_of(entropy=0.0, k=1)) == 0.0


@pytest.mark.parametrize(("scaled", "expected"), [(0.0, 0.00606), (0.17, 0.5), (0.25, 0.917), (0.30, 0.980)])
def test_sigmoid_gate(scaled, expected):
    assert weight_of("eaft_sigmoid", stats_of(entropy=scaled * math.log(20))) == pytest.approx(expected, abs=5e-4)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaled", "threshold", "kept"), [(0.0, 0.0, 0), (1e-9, 0.0, 1), (1.0, 1.0, 0), (1.0, 0.999, 1), (0.16, 0.17, 0)]
)
def test_masked_keeps_only_what_is_strictly_above(scaled, threshold, kept):
    assert weight_of("masked", stats_of(entropy=scaled * math.log(20)), threshold=threshold) == kept


@pytest.mark.parametrize(
    ("scaled", "prob", "kept"),
    [(0.0, 1.0, 0), (0.5, 1.0, 1), (0.0, 0.25, 0), (0.5, 0.25, 1)],
)
def test_pilot_mask_includes_both_bounds(scaled, prob, kept):
    stats = stats_of(entropy=scaled * math.log(20), prob=prob)
    assert weight_of("pilot_mask", stats, entropy_threshold=0.0, prob_threshold=1.0) == kept


def test_pilot_mask_needs_both_to_be_low():
    thresholds = {"entropy_threshold": 0.2, "prob_threshold": 0.3}
    for scaled, prob, kept in [(0.1, 0.1, 0), (0.1, 0.9, 1), (0.9, 0.1, 1), (0.9, 0.9, 1)]:
        assert weight_of("pilot_mask", stats_of(entropy=scaled * math.log(20), prob=prob), **thresholds) == kept


QUANTILE_BASE = BaseStats(
    entropy=torch.tensor([0.5, 0.0, 0.1, 0.3, 0.9]),
    prob=torch.tensor([1.0, 0.2, 0.6]),
    mean_nll=torch.tensor([3.0, 0.5, 2.0]),
)


def test_thresholds_come_from_the_base_model():
    masked = build_objective("masked").calibrate(QUANTILE_BASE)
    assert masked.threshold == pytest.approx(0.06)  # position 0.15 * 4 = 0.6 between 0 and 0.1
    assert not masked.needs
    pilot = build_objective("pilot_mask", quantile=0.25).calibrate(QUANTILE_BASE)
    assert (pilot.entropy_threshold, pilot.prob_threshold) == pytest.approx((0.1, 0.4))
    assert not pilot.needs


def test_a_threshold_given_is_kept():
    assert build_objective("masked", threshold=0.17).calibrate(QUANTILE_BASE).threshold == 0.17
    half = build_objective("pilot_mask", prob_threshold=0.2)
    assert half.needs == {"base"}
    calibrated = half.calibrate(QUANTILE_BASE)
    assert (calibrated.prob_threshold, calibrated.entropy_threshold) == (0.2, pytest.approx(0.06))
    assert build_objective("masked").needs == {"base"} and build_objective("masked", threshold=0.0).needs == frozenset()


# --- probability gates -----------------------------------------------------------------------------------------------


def potential_gradient(tokens, potential) -> torch.Tensor:
    """Gradient of the mean of an objective of p(label); the gate is right when its own gradient is this one."""
    logits_TV = tokens.logits_TV.clone().requires_grad_()
    prob_TV = logits_TV.softmax(-1)
    prob_T = prob_TV.gather(-1, tokens.labels_T[:, None])[:, 0]
    (potential(prob_T, prob_TV.detach())[tokens.mask_T].sum() / 9.0).backward()
    return logits_TV.grad


@few
@given(seed=st.integers(0, 2**31))
@pytest.mark.parametrize(
    ("name", "params", "potential"),
    [
        ("dft", {}, lambda p, _: -p),
        ("power_p", {}, lambda p, _: -(p**0.5) / 0.5),
        ("power_p", {"exponent": 3}, lambda p, _: -(p**3) / 3),
        ("power_p", {"exponent": 0}, lambda p, _: -p.log()),
        ("deft", {}, lambda p, full: -(p ** full.square().sum(-1)) / full.square().sum(-1)),
        ("chord", {}, lambda p, _: p.square() / 2 - p),
        ("talr", {"tau": 2.0, "floor": 0}, lambda p, _: -2 * p.sqrt()),
        ("talr", {"tau": 1, "floor": 0}, lambda p, _: -p),
        ("talr", {"tau": 1e15}, lambda p, _: -p.log()),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_gradient_is_that_of_the_objective_it_stands_for(seed, name, params, potential):
    tokens = random_tokens(seed)
    assert_close(gradient(ready(name, **params), tokens, 9.0)[1], potential_gradient(tokens, potential), **EXACT)


def test_two_equally_likely_tokens_halve_dft():
    tokens = random_tokens(0, vocab=2)._replace(logits_TV=torch.zeros(12, 2, dtype=torch.float64))
    assert_close(2 * shipped(ready("dft"), tokens, 9.0)[0], shipped(ready("sft"), tokens, 9.0)[0], **EXACT)


def test_talr_by_hand():
    assert weight_of("talr", stats_of(prob=0.25), tau=2.0) == pytest.approx(0.5, rel=1e-14)
    assert weight_of("talr", stats_of(prob=0.25, tau=2.0)) == pytest.approx(0.5, rel=1e-14)
    assert weight_of("talr", stats_of(prob=1e-9), tau=1.0) == pytest.approx(0.01)
    assert weight_of("talr", stats_of(prob=0.5, tau=0.0)) == pytest.approx(0.01)
    assert build_objective("talr").needs == {"tau"} and build_objective("talr", tau=1.5).needs == frozenset()


def test_flow_weighs_the_median_example_one_over_e():
    weights = build_objective("flow").sample_weights(QUANTILE_BASE)
    assert weights.tolist() == pytest.approx([math.exp(-1.5), math.exp(-0.25), math.exp(-1)])
    even = build_objective("flow").sample_weights(BASE)  # median of .5 1 2 4 is 1.5
    assert even.tolist() == pytest.approx([math.exp(-value / 1.5) for value in (0.5, 1, 2, 4)])
    fixed = build_objective("flow", temperature=2.0).sample_weights(QUANTILE_BASE)
    assert fixed.tolist() == pytest.approx([math.exp(-1.5), math.exp(-0.25), math.exp(-1)])


# --- the entropy of the whole vocabulary -----------------------------------------------------------------------------


def distributions(seed: int = 0, tokens: int = 9, vocab: int = 11) -> tuple[list[list[float]], list[int]]:
    """p of some tokens as plain lists, and their labels."""
    tokens_ = random_tokens(seed, tokens=tokens, vocab=vocab)
    return tokens_.logits_TV.softmax(-1).tolist(), tokens_.labels_T.tolist()


def full_stats(prob: list[float], label: int, **more) -> TokenStats:
    entropy = -math.fsum(p * math.log(p) for p in prob)
    full = torch.tensor([entropy], dtype=torch.float64)
    return stats_of(prob=prob[label], full_entropy_T=full, **more)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_mile_by_hand(power):
    for prob, label in zip(*distributions(), strict=True):
        entropy = -math.fsum(p * math.log(p) for p in prob)
        assert weight_of("mile", full_stats(prob, label), power=power) == pytest.approx((1 + entropy) ** power)
    assert build_objective("mile").weight_norm == "batch_mean"
    uniform = full_stats([0.25] * 4, 0)
    assert weight_of("mile", uniform) == pytest.approx(1 + math.log(4))


@pytest.mark.parametrize(
    ("progress", "blend"), [(0.0, 0.0), (0.2, 0.0), (0.25, 0.5), (0.3, 1.0), (0.99, 1.0)], ids=lambda value: str(value)
)
def test_idft_by_hand(progress, blend):
    for prob, label in zip(*distributions(1), strict=True):
        entropy, chosen = -math.fsum(p * math.log(p) for p in prob), prob[label]
        raw = min(2.0, max(0.1, 1.0 / (chosen * math.exp(entropy))))  # exp(-(ln p + H)) = 1 / (p e^H)
        expected = chosen ** (1.0 + blend * (raw - 1.0))
        found = weight_of("idft", full_stats(prob, label, progress=progress))
        assert found == pytest.approx(expected, rel=1e-9)


def test_idft_at_its_edges():
    sure = full_stats([1 - 1e-12, 1e-12], 0, progress=1.0)
    assert weight_of("idft", sure) == pytest.approx(1.0)
    switched = build_objective("idft", warmup=0.0, transition=0.0)
    assert switched.needs == {"full_entropy"}
    unlikely = full_stats([0.999, 0.001], 1)
    assert float(switched.weight(unlikely)) == pytest.approx(0.001**2)  # the exponent is at its largest
    assert weight_of("idft", full_stats([0.5, 0.5], 0, progress=0.4), transition=0.0, warmup=0.5) == pytest.approx(0.5)
    impossible = unlikely._replace(logprob_T=torch.tensor([-math.inf], dtype=torch.float64))
    assert float(switched.weight(impossible)) == 0.0


def soft_targets(base: list[float], label: int, boost: float) -> list[float]:
    """softmax(ln p_0 + boost * onehot), summed exactly."""
    raised = [p * (math.exp(boost) if v == label else 1.0) for v, p in enumerate(base)]
    return [x / math.fsum(raised) for x in raised]


@pytest.mark.parametrize("boost", [0.5, 3.0, 20.0])
def test_gift_is_the_cross_entropy_to_its_soft_target(boost):
    """Value up to the constant that the module names, and gradient p - q, both from q itself."""
    ours, theirs = random_tokens(2, tokens=9, vocab=11), random_tokens(3, tokens=9, vocab=11)
    objective = build_objective("gift", boost=boost)
    assert objective.stats == "base" and objective.anchor.kind == "forward_kl" and objective.anchor.coef == 1.0
    base_TV = theirs.logits_TV.log_softmax(-1)
    base = TokenStats(base_TV.gather(-1, ours.labels_T[:, None])[:, 0], torch.zeros(9), 11)
    weight_T = objective.weight(base)
    logits_TV = ours.logits_TV.clone().requires_grad_()
    logp_TV = logits_TV.log_softmax(-1)
    nll_T = -logp_TV.gather(-1, ours.labels_T[:, None])[:, 0]
    kl_T = (base_TV.exp() * (base_TV - logp_TV)).sum(-1)
    (weight_T * nll_T + objective.anchor_weight(weight_T) * kl_T).sum().backward()
    for t, (base_row, label) in enumerate(zip(base_TV.exp().tolist(), ours.labels_T.tolist(), strict=True)):
        target = torch.tensor(soft_targets(base_row, label, boost), dtype=torch.float64)
        assert_close(logits_TV.grad[t], logp_TV[t].detach().exp() - target, rtol=0, atol=1e-9)
        constant = (1 - weight_T[t]) * -(base_TV[t].exp() * base_TV[t]).sum()
        cross_entropy = -(target * logp_TV[t].detach()).sum()
        value = weight_T[t] * nll_T[t].detach() + (1 - weight_T[t]) * kl_T[t].detach()
        assert_close(value + constant, cross_entropy, rtol=1e-9, atol=1e-9)


def test_gift_switches_at_its_boost():
    for logprob, expected in [(-20.0, 0.5), (-10.0, 1.0), (-30.0, 0.0)]:
        stats = stats_of()._replace(logprob_T=torch.tensor([logprob], dtype=torch.float64))
        assert weight_of("gift", stats) == pytest.approx(expected, abs=1e-4)


# --- steps and statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nll", "factor"), [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0), (0.01, 2.0), (1e6, 0.1), (0.0, 2.0)])
def test_finch_follows_the_square_root_of_the_loss(nll, factor):
    finch = build_objective("finch")
    assert finch.step_factor(nll) == pytest.approx(factor)
    assert finch.sets_rates and not build_objective("sft").sets_rates
    assert build_objective("sft").step_factor(nll) == 1.0
    assert weight_of("finch", stats_of()) == 1.0


def test_finch_at_another_level():
    assert build_objective("finch", level=2.25).step_factor(4.0) == pytest.approx(0.75)


def test_who_needs_the_base_models_pass():
    for name, asked in [("eaft", False), ("dft", False), ("prift", True), ("gift", True), ("masked", True)]:
        assert build_objective(name).needs_base is asked, name
        if name != "gift":
            assert build_objective(name, stats="base").needs_base
    assert build_objective("prift") == build_objective("dft", stats="base")


def test_what_acts_on_tokens_is_told_from_what_acts_on_weights():
    l2 = build_objective("eaft", anchor={"kind": "l2", "coef": 3.0})
    assert l2.anchor is not None and l2.divergence is None and not l2.anchor.full
    masked = build_objective("mask_target")
    assert masked.divergence == masked.anchor and masked.anchor.full
