"""What is known of each trained token, computed from logits in one chunked pass.

Dimension letters: T tokens of a packed micro-batch, V vocabulary, K top-K.
All arithmetic is float32 (float64 for float64 logits), whatever the dtype of the logits: top-K entropy in bfloat16 is
wrong by more than its own size on the low-entropy tokens that the objectives are about.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eaft_verl.tokens.chunks import CHUNK_TOKENS
from eaft_verl.tokens.stats import TOPK

CPU_CHUNK_TOKENS = 64  # rows of a pass without a gradient: enough that the work on their K best is done at once
_CACHED_BYTES = 1_600_000  # per thread, of the two float32 copies of some rows: they stay in a core's second cache
_NEIGHBOURS = 64  # logits of a group in `largest`


class LogitStats(NamedTuple):
    """Per-token values that only the logits can give, shape [T]; rows outside the mask are 0."""

    nll_T: Tensor  # -log p(label), nats; carries the gradient
    entropy_T: Tensor  # top-K entropy of the objective, nats
    entropy20_T: Tensor  # top-20 entropy, nats: the yardstick logged for every objective
    correct_T: Tensor  # 1.0 where the label is the most likely token
    sum_p2_T: Tensor | None
    full_entropy_T: Tensor | None = None  # over the vocabulary, nats


class Distribution(NamedTuple):
    """What the logits say of each token beside its label, shape [T], no gradient; rows outside the mask are 0."""

    nll_T: Tensor  # -log p(label), nats
    entropy_T: Tensor  # top-K entropy, nats
    full_entropy_T: Tensor  # over the vocabulary, nats
    max_prob_T: Tensor
    sum_p2_T: Tensor  # sum over the vocabulary of p^2
    top_k_mass_T: Tensor  # probability of the K most likely tokens together
    argmax_T: Tensor  # int64, the most likely token


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
    prob_TV = logprob_TV.detach().exp()
    full_entropy_T = torch.special.entr(prob_TV).sum(dim=-1)
    return LogitStats(nll_T, entropy_T, entropy20_T, correct_T, prob_TV.square().sum(dim=-1), full_entropy_T)


def logit_stats(
    logits_TV: Tensor,
    labels_T: Tensor,
    mask_T: Tensor,
    *,
    k: int = TOPK,
    sum_p2: bool = False,
    full_entropy: bool = False,
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
    made = LogitStats(*_ChunkedStats.apply(logits_TV, labels_T, rows_R, k, sum_p2, full_entropy, wants_grad))
    return asked(made, sum_p2, full_entropy)


def asked(made: LogitStats, sum_p2: bool, full_entropy: bool) -> LogitStats:
    """The statistics without those that nobody asked for."""
    return made._replace(
        sum_p2_T=made.sum_p2_T if sum_p2 else None, full_entropy_T=made.full_entropy_T if full_entropy else None
    )


@torch.no_grad()
def distribution_stats(logits_TV: Tensor, labels_T: Tensor, mask_T: Tensor, *, k: int = TOPK) -> Distribution:
    """The same numbers as `logit_stats`, and more of the distribution, for a pass that trains nothing; in chunks.

    With p = softmax(z), z relative to the largest logit and S = sum_v exp(z_v): full entropy ln S - sum_v p_v z_v,
    top-K mass sum_K exp(z_v) / S. Arguments as for `logit_stats`; float32 (float64 in, float64 out).
    """
    size = CPU_CHUNK_TOKENS if logits_TV.device.type == "cpu" else CHUNK_TOKENS
    pieces = ((rows, logits_TV[rows]) for rows in mask_T.nonzero().squeeze(-1).split(size))
    return distribution_of(pieces, labels_T, accumulator(logits_TV), k=k)


@torch.no_grad()
def distribution_of(
    pieces: Iterable[tuple[Tensor, Tensor]],
    labels_T: Tensor,
    dtype: torch.dtype,
    *,
    k: int = TOPK,
    by: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None,
) -> Distribution:
    """The same, of (rows [R], their logits [R, V]); these may be used up.

    by: what takes the place of `row_distribution`.
    """
    numbers_6T = torch.zeros(6, len(labels_T), dtype=dtype, device=labels_T.device)
    argmax_T = torch.zeros_like(labels_T)
    for rows, logits_RV in pieces:
        numbers_6T[:, rows], argmax_T[rows] = (by or row_distribution)(logits_RV, labels_T[rows], k)
        del logits_RV  # before the next ones are formed
    nll_T, entropy_T, full_T, max_T, sum_p2_T, mass_T = numbers_6T.unbind()
    return Distribution(nll_T, entropy_T, full_T, max_T, sum_p2_T, mass_T, argmax_T)


@torch.no_grad()
def row_distribution(logits_RV: Tensor, labels_R: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Six numbers [6, R] in the order of Distribution and the most likely token [R] of some rows."""
    most_RG, (total_R, weighed_R, norm_R) = _sums(logits_RV)
    best_RK, ids_RK = largest(logits_RV, min(max(k, TOPK), logits_RV.shape[-1]), most_RG)
    best_RK = best_RK.to(most_RG.dtype)
    # relative to the largest logit, so that a confident token's small nll is no difference of two large numbers
    label_R = logits_RV.gather(-1, labels_R[:, None]).squeeze(-1).to(most_RG.dtype) - best_RK[:, 0]
    nll_R, entropy_R = total_R.log() - label_R, topk_entropy(best_RK[:, :k])
    full_entropy_R = total_R.log() - weighed_R / total_R
    sum_p2_R = (norm_R / total_R).square()
    mass_R = ((best_RK[:, :k] - best_RK[:, :1]).exp().sum(dim=-1) / total_R).clamp(max=1.0)
    parts = (nll_R, entropy_R, full_entropy_R, total_R.reciprocal(), sum_p2_R, mass_R)
    return torch.stack(parts), ids_RK[:, 0]


def cached_rows(vocab: int, itemsize: int) -> int:
    """Rows of so many logits that stay, with a copy of each, in the caches of the cores at work."""
    return torch.get_num_threads() * max(1, _CACHED_BYTES // (2 * itemsize * vocab))


def _sums(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of every whole group of neighbours, [R, V // _NEIGHBOURS], and [3, R]: with z relative to a row's
    largest, the sum of exp(z), of z exp(z), and the root of that of exp(z)^2. On a CPU a few rows at a time."""
    (count, vocab), dtype, groups = logits_RV.shape, accumulator(logits_RV), logits_RV.shape[-1] // _NEIGHBOURS
    most_RG = logits_RV.new_empty(count, groups, dtype=dtype)
    sums_3R = logits_RV.new_empty(3, count, dtype=dtype)
    rows = count
    if logits_RV.device.type == "cpu":
        rows = min(count, cached_rows(vocab, dtype.itemsize))
    held_2RV = logits_RV.new_empty(2, rows, vocab, dtype=dtype)
    for start in range(0, count, rows):
        here = slice(start, min(start + rows, count))
        wide_RV, prob_RV = held_2RV[:, : here.stop - start]
        wide_RV.copy_(logits_RV[here])
        if groups:
            whole_RGN = wide_RV[:, : groups * _NEIGHBOURS].unflatten(-1, (groups, _NEIGHBOURS))
            torch.amax(whole_RGN, dim=-1, out=most_RG[here])
        largest_R1 = torch.cat([most_RG[here], wide_RV[:, groups * _NEIGHBOURS :]], dim=-1).amax(dim=-1, keepdim=True)
        torch.exp(wide_RV.sub_(largest_R1), out=prob_RV)
        sums_3R[0, here] = prob_RV.sum(dim=-1)
        sums_3R[2, here] = torch.linalg.vector_norm(prob_RV, dim=-1)
        # -inf * 0 counts as 0; of a row with NaN the sum of exp(z) says so
        sums_3R[1, here] = wide_RV.mul_(prob_RV).nansum(dim=-1)
    return most_RG, sums_3R


def _relative(logits_RV: Tensor, labels_R: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The K best logits and their ids, [R, K], K >= TOPK where V is; all logits relative to the best; the labels'.

    Uses the logits up: float32 ones are overwritten.
    """
    # top-K before the upcast is bit-identical to after it, and spares a float32 pass over the vocabulary; on a CPU the
    # largest of bfloat16 costs four times as much as of float32
    if logits_RV.device.type == "cpu":
        logits_RV = logits_RV.to(accumulator(logits_RV))
    best_RK, ids_RK = largest(logits_RV, min(max(k, TOPK), logits_RV.shape[-1]))
    best_RK = best_RK.to(accumulator(logits_RV))
    # relative to the largest logit, so that a confident token's small nll is no difference of two large numbers
    wide_RV = logits_RV.to(accumulator(logits_RV)).sub_(best_RK[:, :1])
    return best_RK, ids_RK, wide_RV, wide_RV.gather(-1, labels_R[:, None]).squeeze(-1)


def largest(rows_RV: Tensor, k: int, most_RG: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, in order, and their places, [R, k] both: `torch.topk`, faster on a CPU.

    The k largest lie in the k groups of neighbours whose own largest are the largest, or behind the last whole group.
    most_RG: the largest of every whole group, where it is known.
    """
    groups = rows_RV.shape[-1] // _NEIGHBOURS
    if rows_RV.device.type != "cpu" or groups < 8 * k:
        top = rows_RV.topk(k, dim=-1)
        return top.values, top.indices
    whole = groups * _NEIGHBOURS
    if most_RG is None:
        most_RG = rows_RV[:, :whole].unflatten(-1, (groups, _NEIGHBOURS)).amax(dim=-1)
    start_RK = most_RG.topk(k, dim=-1, sorted=False).indices * _NEIGHBOURS
    inside_RC = (start_RK[..., None] + torch.arange(_NEIGHBOURS)).flatten(1)
    behind_RC = torch.arange(whole, rows_RV.shape[-1]).expand(len(rows_RV), -1)
    places_RC = torch.cat([inside_RC, behind_RC], dim=-1)
    best = rows_RV.gather(-1, places_RC).to(most_RG.dtype).topk(k, dim=-1)  # of bfloat16 it takes four times as long
    return best.values, places_RC.gather(-1, best.indices)


class _ChunkedStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        rows_R: Tensor,
        k: int,
        sum_p2: bool,
        full_entropy: bool,
        wants_grad: bool,
    ) -> tuple[Tensor, ...]:
        out_6T = torch.zeros(6, logits_TV.shape[0], dtype=accumulator(logits_TV), device=logits_TV.device)
        grad_TV = torch.zeros_like(logits_TV) if wants_grad else None
        for rows in rows_R.split(CHUNK_TOKENS):
            labels_R = labels_T[rows]
            out_6T[:, rows], exp_RV, total_R = row_statistics(logits_TV[rows], labels_R, k, sum_p2, full_entropy)
            if grad_TV is not None:
                grad_TV[rows] = row_gradient(exp_RV, total_R, labels_R, torch.ones_like(total_R), grad_TV.dtype)
        ctx.grad_TV = grad_TV
        nll_T, *rest = out_6T.unbind()
        ctx.mark_non_differentiable(*rest)
        return nll_T, *rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_T: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_TV, ctx.grad_TV = ctx.grad_TV, None
        if grad_TV is None:
            raise RuntimeError("token statistics: backward ran twice, or on a pass made without gradients")
        return grad_TV.mul_(upstream_T[:, None].to(grad_TV.dtype)), None, None, None, None, None, None


def row_statistics(
    logits_RV: Tensor, labels_R: Tensor, k: int, sum_p2: bool, full_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(six statistics [6, R] in the order of LogitStats, exp(logits - largest) [R, V], its sum [R]).

    Uses the logits up: float32 ones are overwritten, others are freed as soon as they are upcast.
    """
    best_RK, _, wide_RV, label_R = _relative(logits_RV, labels_R, k)
    del logits_RV
    entropy20_R = topk_entropy(best_RK[:, :TOPK])
    entropy_R = entropy20_R if k == TOPK else topk_entropy(best_RK[:, :k])
    exp_RV = wide_RV.exp_()
    total_R = exp_RV.sum(dim=-1)
    nll_R = total_R.log() - label_R
    sum_p2_R = exp_RV.square().sum(dim=-1) / total_R.square() if sum_p2 else torch.zeros_like(nll_R)
    # H = ln S - sum_v (e_v / S) ln e_v, with e_v = exp(z_v - largest) and S their sum; entr(0) = 0
    full_entropy_R = (
        total_R.log() + torch.special.entr(exp_RV).sum(dim=-1) / total_R if full_entropy else torch.zeros_like(nll_R)
    )
    correct_R = (label_R == 0).to(nll_R.dtype)
    return torch.stack([nll_R, entropy_R, entropy20_R, correct_R, sum_p2_R, full_entropy_R]), exp_RV, total_R


def row_gradient(exp_RV: Tensor, total_R: Tensor, labels_R: Tensor, weight_R: Tensor, dtype: torch.dtype) -> Tensor:
    """d (sum_t w_t nll_t) / d logits = w_t (softmax_t - onehot_t), [R, V] in `dtype`; formed in place of `exp_RV`."""
    exp_RV.mul_((weight_R / total_R)[:, None])
    return exp_RV.scatter_add_(-1, labels_R[:, None], -weight_R[:, None]).to(dtype)


def accumulator(logits: Tensor) -> torch.dtype:
    """Dtype that sums over the vocabulary run in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
