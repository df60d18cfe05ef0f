"""Properties that every entry of OBJECTIVES must have; a new entry is covered by being listed there."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_fixtures import BASE, EXACT, few, gradient, random_tokens, ready, shipped, with_graph
from torch.autograd import gradcheck
from torch.nn.functional import one_hot
from torch.testing import assert_close

from eaft_verl.objectives import OBJECTIVES, weighted_nll
from eaft_verl.recipe.objective import build_objective
from eaft_verl.tokens.logits import logit_stats
from eaft_verl.tokens.stats import TokenStats

EVERY = pytest.mark.parametrize("name", sorted(OBJECTIVES))
SEEDS = st.integers(0, 2**31)
BARE = TokenStats(torch.tensor([-0.5]), torch.tensor([1.0]), 20)


@EVERY
@few
@given(seed=SEEDS, scale=st.sampled_from([0.01, 1.0, 30.0, 1e4]), holes=st.integers(0, 26))
def test_weights_are_finite_and_not_negative(name, seed, scale, holes):
    tokens = random_tokens(seed, scale=scale, trained=1.0)
    tokens.logits_TV[:, :holes] = -math.inf
    tokens.labels_T.clamp_(min=holes)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        loss, weight_T = shipped(ready(name), tokens._replace(logits_TV=tokens.logits_TV.to(dtype)), 12.0)
        assert weight_T.shape == (12,)
        assert weight_T.isfinite().all() and (weight_T >= 0).all()
        assert loss.isfinite() and loss >= 0


@EVERY
def test_weight_stays_finite_where_the_label_is_impossible(name):
    tokens = random_tokens(1, trained=1.0)
    tokens.logits_TV.scatter_(1, tokens.labels_T[:, None], -math.inf)
    _, weight_T = shipped(ready(name), tokens, 12.0)
    assert weight_T.isfinite().all() and (weight_T >= 0).all()


@EVERY
@few
@given(seed=SEEDS)
def test_weights_are_constants_of_the_gradient(name, seed):
    tokens = random_tokens(seed)
    truth_TV = tokens.logits_TV.softmax(-1) - one_hot(tokens.labels_T, 27)
    for path in (shipped, with_graph):
        logits_TV = tokens.logits_TV.clone().requires_grad_()
        loss, weight_T = path(ready(name), tokens._replace(logits_TV=logits_TV), 9.0)
        loss.backward()
        expected_TV = (weight_T.detach().double() * tokens.mask_T / 9.0)[:, None] * truth_TV
        assert_close(logits_TV.grad, expected_TV, **EXACT)


def total_derivative_agrees(name: str) -> tuple[bool, bool]:
    """Is the gradient the derivative of the loss, weights included; do the weights move with the logits at all."""
    tokens, objective = random_tokens(3, tokens=6, vocab=9, trained=1.0), ready(name)

    def loss_and_weights(logits_TV):
        return with_graph(objective, tokens._replace(logits_TV=logits_TV), 6.0)

    nudge_TV = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-6
    before_T, after_T = (loss_and_weights(tokens.logits_TV + nudge)[1] for nudge in (0.0, nudge_TV))
    leaf_TV = tokens.logits_TV.clone().requires_grad_()
    agrees = gradcheck(lambda z: loss_and_weights(z)[0], leaf_TV, atol=1e-7, raise_exception=False)
    return agrees, not torch.allclose(before_T, after_T, rtol=0, atol=1e-11)  # gift is a switch: flat at these logits


@EVERY
def test_gradcheck_fails_exactly_where_the_weight_moves(name):
    agrees, moves = total_derivative_agrees(name)
    assert agrees is not moves


def test_the_moving_weights_are_known():
    moving = {name for name in OBJECTIVES if total_derivative_agrees(name)[1]}
    assert moving >= {"eaft", "eaft_3", "eaft_sigmoid", "eaft_axolotl", "dft", "talr", "power_p", "deft", "chord"}
    assert moving >= {"mile", "idft", "prift"}
    assert not moving & {"sft", "masked", "pilot_mask", "flow", "finch"}


@EVERY
def test_gradient_is_the_finite_difference_with_the_weights_held(name):
    tokens = random_tokens(3, tokens=5, vocab=9, scale=1.0)
    _, grad_TV, weight_T = gradient(ready(name), tokens, 5.0)

    def held_loss(logits_TV):
        nll_T = logit_stats(logits_TV, tokens.labels_T, tokens.mask_T).nll_T
        return weighted_nll(nll_T, weight_T, tokens.mask_T, 5.0)

    for place in range(tokens.logits_TV.numel()):
        step_TV = torch.zeros_like(tokens.logits_TV)
        step_TV.view(-1)[place] = 1e-5
        slope = (held_loss(tokens.logits_TV + step_TV) - held_loss(tokens.logits_TV - step_TV)) / 2e-5
        assert_close(grad_TV.view(-1)[place], slope, rtol=0, atol=1e-9)


@EVERY
@few
@given(seed=SEEDS, cuts=st.lists(st.integers(0, 12), max_size=4))
def test_any_split_of_the_tokens_sums_to_the_whole(name, seed, cuts):
    tokens, objective = random_tokens(seed), ready(name)
    whole, whole_grad_TV, _ = gradient(objective, tokens, 9.0)
    edges = [0, *sorted(cuts), 12]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    parts = [order[low:high] for low, high in pairwise(edges)]
    results = [gradient(objective, tokens.rows(part), 9.0) for part in parts]
    assert_close(sum(loss for loss, _, _ in results), whole, **EXACT)
    assert_close(torch.cat([grad for _, grad, _ in results]), whole_grad_TV[order], **EXACT)


@EVERY
def test_empty_mask_is_a_zero_with_a_graph(name):
    tokens = random_tokens(0)
    loss, grad_TV, _ = gradient(ready(name), tokens._replace(mask_T=torch.zeros(12, dtype=torch.bool)), 9.0)
    assert loss == 0 and not grad_TV.any()


@EVERY
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_tokens_leak_nothing(name, poison):
    tokens, objective = random_tokens(4), ready(name)
    assert not tokens.mask_T.all()
    loss, grad_TV, _ = gradient(objective, tokens, 9.0)
    poisoned_TV = tokens.logits_TV.masked_fill(~tokens.mask_T[:, None], poison)
    poisoned = tokens._replace(logits_TV=poisoned_TV, labels_T=tokens.labels_T.where(tokens.mask_T, -100))
    again, again_TV, _ = gradient(objective, poisoned, 9.0)
    assert torch.equal(loss, again) and torch.equal(grad_TV, again_TV)
    assert not again_TV[~tokens.mask_T].any()
    assert_close(with_graph(objective, poisoned._replace(labels_T=tokens.labels_T), 9.0)[0], loss, **EXACT)


@EVERY
def test_nan_of_a_trained_token_is_not_hidden(name):
    tokens = random_tokens(4, trained=1.0)
    tokens.logits_TV[3, 5] = math.nan
    assert shipped(ready(name), tokens, 12.0)[0].isnan()


@EVERY
@pytest.mark.parametrize(("dtype", "grad_error"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_low_precision_logits_lose_only_their_own_rounding(name, dtype, grad_error):
    tokens, objective = random_tokens(5), ready(name)
    low = tokens._replace(logits_TV=tokens.logits_TV.to(dtype))
    loss, grad_TV, weight_T = gradient(objective, low, 9.0)
    truth, truth_TV, truth_T = gradient(objective, low._replace(logits_TV=low.logits_TV.double()), 9.0)
    assert (loss.dtype, grad_TV.dtype) == (torch.float32, dtype)
    assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    assert_close(weight_T.double(), truth_T.double(), rtol=1e-4, atol=1e-6)
    assert_close(grad_TV.double(), truth_TV, rtol=2 * grad_error, atol=grad_error / 100)


@EVERY
@few
@given(seed=SEEDS, shift=st.floats(-50, 50))
def test_shift_and_vocabulary_order_do_not_matter(name, seed, shift):
    tokens, objective = random_tokens(seed), ready(name)
    order = torch.randperm(27, generator=torch.Generator().manual_seed(seed))
    moved = tokens._replace(logits_TV=tokens.logits_TV[:, order] + shift, labels_T=order.argsort()[tokens.labels_T])
    loss, grad_TV, weight_T = gradient(objective, tokens, 9.0)
    again, again_TV, again_T = gradient(objective, moved, 9.0)
    assert_close(again, loss, **EXACT)
    assert_close(again_T, weight_T, **EXACT)
    assert_close(again_TV, grad_TV[:, order], **EXACT)


@EVERY
def test_a_declared_need_that_is_absent_is_an_error(name):
    objective = build_objective(name)
    if objective.needs:
        with pytest.raises(ValueError, match="is not set"):
            objective.weight(BARE)
    else:
        assert objective.weight(BARE).shape == (1,)


@EVERY
def test_calibration_leaves_no_need_of_thresholds(name):
    objective = ready(name)
    assert objective.calibrate(BASE) == objective
    if "sample_weight" in objective.needs:
        assert objective.sample_weights(BASE).shape == BASE.mean_nll.shape
    else:
        assert objective.sample_weights(BASE) is None


def test_weighted_nll_by_hand():
    nll_T = torch.tensor([1.0, 2.0, math.nan, 4.0], requires_grad=True)
    weight_T = torch.tensor([0.5, 0.25, math.nan, 1.0], requires_grad=True)
    loss = weighted_nll(nll_T, weight_T, torch.tensor([True, True, False, False]), 8.0)
    loss.backward()
    assert loss.item() == 0.125
    assert nll_T.grad.tolist() == [0.0625, 0.03125, 0.0, 0.0]
    assert weight_T.grad is None
