"""Token statistics, objectives and divergences on a GPU: the numbers of float64 on the CPU, at a real vocabulary."""

import pytest
import torch
from objective_fixtures import ready

from eaft_verl.objectives import OBJECTIVES, weighted_nll
from eaft_verl.tokens.logits import LogitStats, logit_stats, reference_stats
from eaft_verl.tokens.reference_kl import plain_kl, reference_kl, top_reference
from eaft_verl.tokens.stats import TokenStats

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOKENS, VOCAB = 96, 151_936  # Qwen's vocabulary
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
    here = logits_TV.cuda().requires_grad_()
    stats = logit_stats(here, labels_T.cuda(), mask_T.cuda(), sum_p2=True)
    stats.nll_T.sum().backward()
    for name, ours, expected in zip(LogitStats._fields, stats, truth, strict=True):
        got = ours.detach().cpu().double()[mask_T]
        torch.testing.assert_close(
            got, expected.detach().double()[mask_T], rtol=CLOSE[dtype], atol=CLOSE[dtype], msg=name
        )
    rounding = 1e-6 if dtype == torch.float32 else 4e-3  # the gradient is kept in the dtype of the logits
    torch.testing.assert_close(here.grad.cpu().double(), exact.grad, rtol=rounding, atol=1e-6)
    assert not here.grad[~mask_T.cuda()].any()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "forward_kl_topk"])
def test_divergences(kind: str) -> None:
    logits_TV, _, mask_T = inputs(torch.float32)
    other_TV = logits_TV + 0.3 * torch.randn(TOKENS, VOCAB)
    stored = kind == "forward_kl_topk"
    truth_T = plain_kl(kind, logits_TV.double(), top_reference(other_TV.double(), 64) if stored else other_TV.double())
    reference = top_reference(other_TV.cuda(), 64) if stored else other_TV.cuda()
    kl_T = reference_kl(kind, logits_TV.cuda().requires_grad_(), reference, mask_T.cuda())
    torch.testing.assert_close(kl_T.detach().cpu().double()[mask_T], truth_T[mask_T], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "psft"])
def test_weights_and_loss(name: str) -> None:
    logits_TV, labels_T, mask_T = inputs(torch.float32)
    objective = ready(name)

    def loss(where: str, dtype: torch.dtype) -> torch.Tensor:
        made = logit_stats(logits_TV.to(where, dtype), labels_T.to(where), mask_T.to(where), k=objective.k, sum_p2=True)
        sample_T = torch.full_like(made.nll_T, 0.7)
        stats = TokenStats(-made.nll_T, made.entropy_T, objective.k, made.sum_p2_T, sample_T, 1.3)
        return weighted_nll(made.nll_T, objective.weight(stats), mask_T.to(where), float(mask_T.sum())).cpu().double()

    torch.testing.assert_close(loss("cuda", torch.float32), loss("cpu", torch.float64), rtol=1e-4, atol=1e-6)
