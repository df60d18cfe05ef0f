"""The fused head by the Triton kernels on a GPU, at a real vocabulary: the numbers of float64, and what is chosen."""

import pytest
import torch
from torch import Tensor

from eaft_verl.objectives import Eaft, weighted_nll
from eaft_verl.tokens import row_kernels
from eaft_verl.tokens.head import Head, head_statistics
from eaft_verl.tokens.logits import LogitStats, reference_stats
from eaft_verl.tokens.row_kernels import CHUNKED, RowKernels, triton_kernels, verified
from eaft_verl.tokens.stats import TokenStats

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOKENS, HIDDEN = 1700, 96  # two chunks of Qwen's vocabulary


def weight_of(stats: LogitStats) -> Tensor:
    return Eaft().weight(TokenStats(-stats.nll_T.detach(), stats.entropy_T, 20))


def inputs(dtype: torch.dtype, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(vocab, HIDDEN, device="cuda") * 0.3
    labels = torch.randint(vocab, (TOKENS,), device="cuda")
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda") + torch.rand(TOKENS, 1, device="cuda") * weight[labels]
    mask = torch.rand(TOKENS, device="cuda") > 0.1
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, mask


@pytest.mark.parametrize("kernels", ["triton", "chunked"])
@pytest.mark.parametrize("vocab", [151_936, 49_152, 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_and_gradients(dtype: torch.dtype, vocab: int, kernels: str) -> None:
    hidden, weight, labels, mask = inputs(dtype, vocab)
    by: RowKernels = triton_kernels() if kernels == "triton" else CHUNKED
    stats = head_statistics(hidden, Head(weight), labels, mask, gate=lambda made, _: weight_of(made), kernels=by)
    weighted_nll(stats.nll_T, weight_of(stats), mask, 1000.0).backward()
    rows = mask.nonzero().squeeze(-1)
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    truth = reference_stats(exact[0][rows] @ exact[1].T, labels[rows])
    weighted_nll(truth.nll_T, weight_of(truth), torch.ones_like(rows, dtype=torch.bool), 1000.0).backward()
    close = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.05}
    )  # of rounded logits
    torch.testing.assert_close(stats.nll_T[rows].double(), truth.nll_T, **close)
    torch.testing.assert_close(stats.entropy_T[rows].double(), truth.entropy_T.double(), **close)
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        error = float((ours.grad.double() - theirs.grad).norm() / theirs.grad.norm())
        assert error < (1e-5 if dtype == torch.float32 else 1.5e-2), error
    assert not hidden.grad[~mask].any()


@pytest.mark.parametrize("k", [1, 20, 64, 65, 1003])
def test_every_number_of_candidates(k: int) -> None:
    logits = torch.randn(40, 1003, device="cuda").mul_(3).round_()  # many ties
    labels = torch.arange(40, device="cuda")
    ours, _, _ = triton_kernels().statistics(logits.clone(), labels, k, True, True)
    for got, expected in zip(ours, reference_stats(logits.double(), labels, k), strict=True):
        if expected is not None and not torch.equal(expected, expected.round()):
            torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_they_are_what_runs_here() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, labels = torch.randn(64, 151_936, device="cuda", dtype=dtype), torch.arange(64, device="cuda")
        kernels, why = verified(logits, labels)
        assert kernels.name == "triton", why
    hidden, weight, labels, mask = inputs(torch.bfloat16, 1003)
    row_kernels.chosen.clear()
    head_statistics(hidden, Head(weight), labels, mask)
    assert row_kernels.chosen[torch.bfloat16, 1003][0].name == "triton"
