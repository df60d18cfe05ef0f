"""What is known of each trained token, computed from logits in one chunked pass.

Dimension letters: T tokens of a packed micro-batch, V vocabulary, K top-K.
All arithmetic is float32 (float64 for float64 logits), whatever the dtype of the logits: top-K entropy in bfloat16 is
wrong by more than its own size on the low-entropy tokens that the objectives are about.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eaft_verl.tokens.chunks import CHUNK_TOKENS
from eaft_verl.tokens.stats import TOPK


class LogitStats(NamedTuple):
    """Per-token values that only the logits can give, shape [T]; rows outside the mask are 0."""

    nll_T: Tensor  # -log p(label), nats; carries the gradient
    entropy_T: Tensor  # top-K entropy of the objective, nats
    entropy20_T: Tensor  # top-20 entropy, nats: the yardstick logged for every objective
    correct_T: Tensor  # 1.0 where the label is the most likely token
    sum_p2_T: Tensor | None


def topk_entropy(topk_TK: Tensor) -> Tensor:
    """Entropy, in nats, of the K given logits renormalised to sum to one; [T, K] -> [T].

    H = -sum_v q_v ln q_v, q = softmax over the K largest logits (arXiv 2601.02151, Eq. 2). `entr(0) = 0`, so -inf
    logits (padded vocabularies, fewer than K finite values) need no branch.
    """
    return torch.special.entr(topk_TK.softmax(dim=-1)).sum(dim=-1)


def reference_stats(logits_TV: Tensor, labels_T: Tensor, k: int = TOPK) -> LogitStats:
    """The definition, without chunks, masks or a hand-written gradient: what the fast path must equal."""
    logits_TV = logits_TV.to(accumulator(logits_TV))
    logprob_TV = logits_TV.log_softmax(dim=-1)
    nll_T = -logprob_TV.gather(-1, labels_T[:, None]).squeeze(-1)
    vocab = logits_TV.shape[-1]
    entropy_T, entropy20_T = (topk_entropy(logits_TV.detach().topk(min(size, vocab)).values) for size in (k, TOPK))
    correct_T = (logits_TV.argmax(dim=-1) == labels_T).to(nll_T.dtype)
    return LogitStats(nll_T, entropy_T, entropy20_T, correct_T, logprob_TV.detach().exp().square().sum(dim=-1))


def logit_stats(
    logits_TV: Tensor, labels_T: Tensor, mask_T: Tensor, *, k: int = TOPK, sum_p2: bool = False
) -> LogitStats:
    """Cross-entropy with its gradient, and the statistics of every token with mask 1, in chunks.

    Args: logits_TV: [T, V], any float dtype, temperature 1. labels_T: [T] int64. mask_T: [T] bool; other rows cost
    nothing, may hold NaN, and get value and gradient 0. k: candidates of the entropy, clamped to V.
    Returns: LogitStats in float32 (float64 in, float64 out). Only nll_T is differentiable:
    d nll_t / d logits_t = softmax(logits_t) - onehot(label_t), formed here in the dtype of the logits, because another
    consumer of the logits may overwrite them before backward runs.
    """
    wants_grad = torch.is_grad_enabled() and logits_TV.requires_grad
    rows_R = mask_T.nonzero().squeeze(-1)
    nll_T, entropy_T, entropy20_T, correct_T, sum_p2_T = _ChunkedStats.apply(
        logits_TV, labels_T, rows_R, k, sum_p2, wants_grad
    )
    return LogitStats(nll_T, entropy_T, entropy20_T, correct_T, sum_p2_T if sum_p2 else None)


class _ChunkedStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, labels_T: Tensor, rows_R: Tensor, k: int, sum_p2: bool, wants_grad: bool
    ) -> tuple[Tensor, ...]:
        out_5T = torch.zeros(5, logits_TV.shape[0], dtype=accumulator(logits_TV), device=logits_TV.device)
        grad_TV = torch.zeros_like(logits_TV) if wants_grad else None
        for rows in rows_R.split(CHUNK_TOKENS):
            labels_R = labels_T[rows]
            out_5T[:, rows], exp_RV, total_R = row_statistics(logits_TV[rows], labels_R, k, sum_p2)
            if grad_TV is not None:
                grad_TV[rows] = row_gradient(exp_RV, total_R, labels_R, torch.ones_like(total_R), grad_TV.dtype)
        ctx.grad_TV = grad_TV
        nll_T, *rest = out_5T.unbind()
        ctx.mark_non_differentiable(*rest)
        return nll_T, *rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_T: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_TV, ctx.grad_TV = ctx.grad_TV, None
        if grad_TV is None:
            raise RuntimeError("token statistics: backward ran twice, or on a pass made without gradients")
        return grad_TV.mul_(upstream_T[:, None].to(grad_TV.dtype)), None, None, None, None, None


def row_statistics(logits_RV: Tensor, labels_R: Tensor, k: int, sum_p2: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(five statistics [5, R] in the order of LogitStats, exp(logits - largest) [R, V], its sum [R]).

    Uses the logits up: float32 ones are overwritten, others are freed as soon as they are upcast.
    """
    vocab = logits_RV.shape[-1]
    # top-K before the upcast is bit-identical to after it, and spares a float32 pass over the vocabulary
    best_RK = logits_RV.topk(min(max(k, TOPK), vocab), dim=-1).values.to(accumulator(logits_RV))
    entropy20_R = topk_entropy(best_RK[:, :TOPK])
    entropy_R = entropy20_R if k == TOPK else topk_entropy(best_RK[:, :k])
    # relative to the largest logit, so that a confident token's small nll is no difference of two large numbers
    wide_RV = logits_RV.to(accumulator(logits_RV)).sub_(best_RK[:, :1])
    del logits_RV
    label_R = wide_RV.gather(-1, labels_R[:, None]).squeeze(-1)
    exp_RV = wide_RV.exp_()
    total_R = exp_RV.sum(dim=-1)
    nll_R = total_R.log() - label_R
    sum_p2_R = exp_RV.square().sum(dim=-1) / total_R.square() if sum_p2 else torch.zeros_like(nll_R)
    correct_R = (label_R == 0).to(nll_R.dtype)
    return torch.stack([nll_R, entropy_R, entropy20_R, correct_R, sum_p2_R]), exp_RV, total_R


def row_gradient(exp_RV: Tensor, total_R: Tensor, labels_R: Tensor, weight_R: Tensor, dtype: torch.dtype) -> Tensor:
    """d (sum_t w_t nll_t) / d logits = w_t (softmax_t - onehot_t), [R, V] in `dtype`; formed in place of `exp_RV`."""
    exp_RV.mul_((weight_R / total_R)[:, None])
    return exp_RV.scatter_add_(-1, labels_R[:, None], -weight_R[:, None]).to(dtype)


def accumulator(logits: Tensor) -> torch.dtype:
    """Dtype that sums over the vocabulary run in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
