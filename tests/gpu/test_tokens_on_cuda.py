"""Token statistics, objectives and divergences on a GPU: the numbers of float64 on the CPU, at a real vocabulary.

Without a GPU the same at a small one, so that no test here asks for what the code has ceased to be.
"""

import pytest
import torch
from objective_fixtures import EXAMPLES, Tokens, ready, token_stats

from eaft_verl.objectives import OBJECTIVES, weighted_nll
from eaft_verl.tokens.logits import LogitStats, logit_stats, reference_stats
from eaft_verl.tokens.reference_kl import plain_kl, reference_kl, top_reference
from eaft_verl.tokens.row_kernels import triton_kernels

GPU = torch.cuda.is_available()
WHERE = "cuda" if GPU else "cpu"
TOKENS, VOCAB = 96, 151_936 if GPU else 1503  # Qwen's vocabulary
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-5}  # sums run in float32 whatever the logits are


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits between flat and certain, as the dtype holds them; labels; a mask that leaves some out."""
    torch.manual_seed(0)
    logits_TV = (torch.randn(TOKENS, VOCAB) * torch.linspace(0.2, 9, TOKENS)[:, None]).to(dtype)
    return logits_TV, torch.randint(VOCAB, (TOKENS,)), torch.rand(TOKENS) > 0.2


@pytest.mark.parametrize("dtype", CLOSE)
def test_statistics_and_gradient(dtype: torch.dtype) -> None:
    logits_TV, labels_T, mask_T = inputs(dtype)
    exact = logits_TV.double().requires_grad_()
    truth = reference_stats(exact, labels_T)
    truth.nll_T[mask_T].sum().backward()
    here = logits_TV.to(WHERE, copy=True).requires_grad_()
    stats = logit_stats(here, labels_T.to(WHERE), mask_T.to(WHERE), sum_p2=True, full_entropy=True)
    stats.nll_T.sum().backward()
    for name, ours, expected in zip(LogitStats._fields, stats, truth, strict=True):
        got = ours.detach().cpu().double()[mask_T]
        torch.testing.assert_close(
            got, expected.detach().double()[mask_T], rtol=CLOSE[dtype], atol=CLOSE[dtype], msg=name
        )
    rounding = 1e-6 if dtype == torch.float32 else 4e-3  # the gradient is kept in the dtype of the logits
    torch.testing.assert_close(here.grad.cpu().double(), exact.grad, rtol=rounding, atol=1e-6)
    assert not here.grad[~mask_T.to(WHERE)].any()


@pytest.mark.skipif(not GPU, reason="needs a GPU; tests/tokens/test_triton_rows.py interprets the kernels")
@pytest.mark.parametrize("k", [20, 100])
@pytest.mark.parametrize("dtype", CLOSE)
def test_distribution_by_triton(dtype: torch.dtype, k: int) -> None:
    logits_TV, labels_T, _ = inputs(dtype)
    prob_TV = logits_TV.double().softmax(dim=-1)
    best_TK = prob_TV.topk(k, dim=-1).values
    truth = reference_stats(logits_TV.double(), labels_T, k)
    numbers_6T, likeliest_T = triton_kernels().distribution(logits_TV.cuda(), labels_T.cuda(), k)
    sums = (prob_TV.amax(dim=-1), truth.sum_p2_T, best_TK.sum(dim=-1))
    for got, expected in zip(numbers_6T, (truth.nll_T, truth.entropy_T, truth.full_entropy_T, *sums), strict=True):
        torch.testing.assert_close(got.cpu().double(), expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(logits_TV.gather(-1, likeliest_T.cpu()[:, None]).squeeze(-1), logits_TV.amax(dim=-1))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "forward_kl_topk"])
def test_divergences(kind: str) -> None:
    logits_TV, _, mask_T = inputs(torch.float32)
    other_TV = logits_TV + 0.3 * torch.randn(TOKENS, VOCAB)
    stored = kind == "forward_kl_topk"
    truth_T = plain_kl(kind, logits_TV.double(), top_reference(other_TV.double(), 64) if stored else other_TV.double())
    reference = top_reference(other_TV.to(WHERE), 64) if stored else other_TV.to(WHERE)
    kl_T = reference_kl(kind, logits_TV.to(WHERE).requires_grad_(), reference, mask_T.to(WHERE))
    torch.testing.assert_close(kl_T.detach().cpu().double()[mask_T], truth_T[mask_T], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "psft"])
def test_weights_and_loss(name: str) -> None:
    logits_TV, labels_T, mask_T = inputs(torch.float32)
    objective, example_T = ready(name), torch.arange(TOKENS) % EXAMPLES

    def loss(where: str, dtype: torch.dtype) -> torch.Tensor:
        given = Tokens(logits_TV.to(where, dtype), labels_T.to(where), mask_T.to(where), example_T)
        made = logit_stats(*given[:3], k=objective.k, **objective.extras)
        stats = token_stats(objective, given, made._replace(nll_T=made.nll_T.detach()))
        if stats.sample_weight_T is not None:
            stats = stats._replace(sample_weight_T=stats.sample_weight_T.to(made.nll_T))
        return weighted_nll(made.nll_T, objective.weight(stats), given.mask_T, float(mask_T.sum())).cpu().double()

    torch.testing.assert_close(loss(WHERE, torch.float32), loss("cpu", torch.float64), rtol=1e-4, atol=1e-6)
