"""Divergences from a frozen reference: by hand, against autograd on the textbook formula, and their bounds."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from eaft_verl.objectives import DIVERGENCES, TOPK_KIND
from eaft_verl.tokens import reference_kl as module
from eaft_verl.tokens.reference_kl import TopReference, top_reference

TOKENS, VOCAB = 40, 23
LABELS = torch.arange(TOKENS) % 4  # of mask_target; no test poisons these columns


def reference_kl(kind: str, logits: Tensor, reference: Tensor | TopReference, mask: Tensor) -> Tensor:
    return module.reference_kl(kind, logits, reference, mask, LABELS[: len(logits)])


def plain_kl(kind: str, logits: Tensor, reference: Tensor | TopReference) -> Tensor:
    return module.plain_kl(kind, logits, reference, LABELS[: len(logits)])


def pair(seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(TOKENS, VOCAB, generator=source, dtype=torch.float64) * scale for _ in range(2))
    return ours.to(dtype), theirs.to(dtype)


def constant(kind: str, theirs: Tensor, k: int = 6) -> Tensor | TopReference:
    return top_reference(theirs, k) if kind == TOPK_KIND else theirs


def everything(tokens: int = TOKENS) -> Tensor:
    return torch.ones(tokens, dtype=torch.bool)


def test_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), r = (1/4, 1/2, 1/4)."""
    ours = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    theirs = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    forward = 0.25 * math.log(0.5) + 0.5 * math.log(2.0)
    for kind in ("forward_kl", "reverse_kl"):  # equal here by symmetry
        assert reference_kl(kind, ours, theirs, everything(1)).item() == pytest.approx(forward, abs=1e-12)
    without_the_first = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)  # of (1/2, 1/4) and (1/4, 1/4), renormalised
    assert reference_kl("mask_target", ours, theirs, everything(1)).item() == pytest.approx(
        without_the_first, abs=1e-12
    )
    one_bucket = 0.5 * math.log(2.0) + 0.5 * math.log(0.5 / 0.75)  # candidate 1, and 0 and 2 together
    found = reference_kl(TOPK_KIND, ours, top_reference(theirs, 1), everything(1))
    assert found.item() == pytest.approx(one_bucket, abs=1e-12)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_are_those_of_the_plain_formula(kind: str, seed: int) -> None:
    ours, theirs = pair(seed)
    upstream = torch.linspace(0.1, 2.0, TOKENS, dtype=torch.float64)
    reference = constant(kind, theirs)
    grads, values = [], []
    for function in (
        lambda z: plain_kl(kind, z, reference),
        lambda z: reference_kl(kind, z, reference, everything()),
    ):
        logits = ours.clone().requires_grad_()
        value = function(logits)
        (value * upstream).sum().backward()
        grads.append(logits.grad)
        values.append(value.detach())
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_models_have_exactly_no_divergence_and_no_gradient(kind: str, dtype: torch.dtype) -> None:
    ours, _ = pair(1, dtype)
    logits = ours.clone().requires_grad_()
    value = reference_kl(kind, logits, constant(kind, ours), everything())
    value.sum().backward()
    assert not value.detach().any() and not logits.grad.any()


@pytest.mark.parametrize("k", [1, 2, 5, VOCAB - 1, VOCAB, VOCAB + 4])
def test_top_k_lies_between_zero_and_the_full_divergence(k: int) -> None:
    ours, theirs = pair(2)
    full = reference_kl("forward_kl", ours, theirs, everything())
    found = reference_kl(TOPK_KIND, ours, top_reference(theirs, k), everything())
    assert (found >= -1e-12).all() and (found <= full + 1e-12).all()
    if k >= VOCAB - 1:
        torch.testing.assert_close(found, full, rtol=0, atol=1e-9)


def test_top_k_grows_with_k() -> None:
    ours, theirs = pair(3)
    values = [reference_kl(TOPK_KIND, ours, top_reference(theirs, k), everything()) for k in range(1, VOCAB)]
    assert all((small <= large + 1e-12).all() for small, large in itertools.pairwise(values))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_rows_outside_the_mask_cost_nothing_and_may_be_nan(kind: str) -> None:
    ours, theirs = pair(4)
    mask = torch.arange(TOKENS) % 3 == 0
    expected = reference_kl(kind, ours, constant(kind, theirs), everything())
    reference = constant(kind, theirs)
    ours[~mask] = math.nan
    logits = ours.requires_grad_()
    found = reference_kl(kind, logits, reference, mask)
    found.sum().backward()
    assert torch.equal(found.detach(), torch.where(mask, expected, 0.0))
    assert torch.isfinite(logits.grad).all() and not logits.grad[~mask].any()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(5)
    whole = reference_kl(kind, ours, constant(kind, theirs), everything())
    monkeypatch.setattr(module, "CHUNK_TOKENS", 7)  # of top_reference too
    torch.testing.assert_close(reference_kl(kind, ours, constant(kind, theirs), everything()), whole, rtol=0, atol=0)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_overwriting_the_logits_before_backward_does_no_harm(kind: str) -> None:
    """flash-attention's cross-entropy writes its gradient into the logits."""
    ours, theirs = pair(6)
    grads = []
    for overwrite in (False, True):
        leaf = ours.clone().requires_grad_()
        logits = leaf * 1.0
        value = reference_kl(kind, logits, constant(kind, theirs), everything())
        if overwrite:
            logits.data.fill_(1e3)
        value.sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_padded_vocabularies(kind: str) -> None:
    ours, theirs = pair(8)
    expected = reference_kl(kind, ours, constant(kind, theirs), everything())
    padding = torch.full((TOKENS, 3), -math.inf, dtype=torch.float64)
    ours, theirs = (torch.cat([part, padding], dim=-1) for part in (ours, theirs))
    logits = ours.requires_grad_()
    found = reference_kl(kind, logits, constant(kind, theirs), everything())
    found.sum().backward()
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-12)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("broken", ["ours", "theirs"])
def test_nan_is_never_a_divergence_of_zero(kind: str, broken: str) -> None:
    ours, theirs = pair(11)
    (ours if broken == "ours" else theirs)[3, 5] = math.nan
    found = reference_kl(kind, ours, constant(kind, theirs), everything())
    plain = plain_kl(kind, ours, constant(kind, theirs))
    for value in (found, plain):
        assert value[3].isnan() and torch.isfinite(torch.cat([value[:3], value[4:]])).all()


@pytest.mark.parametrize(("kind", "impossible"), [("forward_kl", "ours"), ("reverse_kl", "theirs")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_the_second_model_calls_impossible_is_infinitely_far(kind: str, impossible: str, dtype) -> None:
    ours, theirs = pair(12, dtype)
    (ours if impossible == "ours" else theirs)[7, 2] = -math.inf
    found = reference_kl(kind, ours, theirs, everything())
    assert found[7] == math.inf and torch.isfinite(found[torch.arange(TOKENS) != 7]).all()
    assert plain_kl(kind, ours, theirs)[7] == math.inf
    # the other way round it is a term of 0: sum over the words that are possible, by hand
    turned = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl"}[kind]
    p, r = (part[7].double().softmax(-1).tolist() for part in (ours, theirs))
    pairs = zip(p, r, strict=True) if turned == "reverse_kl" else zip(r, p, strict=True)
    by_hand = math.fsum(a * math.log(a / b) for a, b in pairs if a > 0)
    assert reference_kl(turned, ours, theirs, everything())[7].item() == pytest.approx(by_hand, rel=1e-5)


def test_top_k_bounds_an_empty_tail_and_not_an_impossible_candidate() -> None:
    theirs = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    tailless = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    found = reference_kl(TOPK_KIND, tailless, top_reference(theirs, 2), everything(1)).item()
    bound = 0.6 * math.log(0.6 / 0.5) + 0.3 * math.log(0.3 / 0.5) + 0.1 * math.log(0.1 / module.TINY)
    assert found == pytest.approx(bound, rel=1e-12)
    candidate = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64).log()
    assert reference_kl(TOPK_KIND, candidate, top_reference(theirs, 2), everything(1)).item() == math.inf
    # a candidate that the reference itself calls impossible adds nothing
    short = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    assert reference_kl(TOPK_KIND, short, top_reference(short, 3), everything(1)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_run_in_float32_under_autocast(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(9, dtype)
    expected = reference_kl(kind, ours.double(), constant(kind, theirs.double()), everything())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reference_kl(kind, ours, constant(kind, theirs), everything())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_k1_on_given_data_is_plain_sft_scaled() -> None:
    """Why label-token estimators are refused: cross-entropy + beta * (ln p(y) - ln r(y)) has gradient (1 - beta)."""
    ours, theirs = pair(10)
    labels, beta = torch.arange(TOKENS) % VOCAB, 0.5
    logits = ours.clone().requires_grad_()
    logp = logits.log_softmax(-1).gather(-1, labels[:, None])
    logr = theirs.log_softmax(-1).gather(-1, labels[:, None])
    (plain,) = torch.autograd.grad(-logp.sum(), logits, retain_graph=True)
    (anchored,) = torch.autograd.grad((-logp + beta * (logp - logr)).sum(), logits)
    torch.testing.assert_close(anchored, (1 - beta) * plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_mask_target_leaves_the_label_alone(seed: int) -> None:
    """Re-derived from probabilities: r' and p' over the others; what the label's logit is makes no difference."""
    ours, theirs = pair(seed)
    moved = ours.scatter_add(-1, LABELS[:, None], torch.linspace(-5, 5, TOKENS, dtype=torch.float64)[:, None])
    values, grads = [], []
    for logits in (ours, moved):
        logits = logits.clone().requires_grad_()
        value = reference_kl("mask_target", logits, theirs, everything())
        value.sum().backward()
        values.append(value.detach())
        grads.append(logits.grad)
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-12)
    assert not grads[0].gather(-1, LABELS[:, None]).any()
    for t, label in enumerate(LABELS.tolist()):
        p, r = (part[t].softmax(-1).tolist() for part in (ours, theirs))
        others = [v for v in range(VOCAB) if v != label]
        by_hand = math.fsum(
            r[v] / (1 - r[label]) * math.log(r[v] / (1 - r[label]) / (p[v] / (1 - p[label]))) for v in others
        )
        assert values[0][t].item() == pytest.approx(by_hand, abs=1e-10)


def test_mask_target_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the labels"):
        module.reference_kl("mask_target", *pair(), everything())


def test_different_vocabularies_are_refused() -> None:
    ours, theirs = pair()
    with pytest.raises(ValueError, match="differ in shape"):
        reference_kl("forward_kl", ours, theirs[:, :-1], everything())


def test_backward_twice_is_an_error() -> None:
    ours, theirs = pair()
    value = reference_kl("forward_kl", ours.requires_grad_(), theirs, everything()).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        value.backward()
