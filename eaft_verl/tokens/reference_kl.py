"""Per-token KL divergence between a model and its frozen reference, with the gradient formed in the forward pass.

Dimension letters: T tokens of a packed micro-batch, V vocabulary, K reference candidates, R rows of a chunk. Sums run
in float32 (float64 for float64 logits). The gradient is taken at once, because another consumer of the logits
(flash-attention's cross-entropy works in place) may overwrite them before backward runs.
Formulas: `objectives/anchors.py`.

0 ln(0 / q) counts as 0, as in a padded vocabulary. p ln(p / 0) with p > 0 is infinite, and NaN logits give NaN: neither
is a number that training could go on with. Only the tail of a TopReference is bounded: its probabilities count as TINY
at least, so that it adds no more than r_tail ln(r_tail / TINY), 69 nats.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eaft_verl.tokens.chunks import CHUNK_TOKENS
from eaft_verl.tokens.logits import accumulator
from eaft_verl.tokens.stats import FULL_KINDS

TINY = 1e-30  # probability below which a bucket counts as empty


class TopReference(NamedTuple):
    """The K best tokens of the reference at each position and how much is left for all others."""

    ids_TK: Tensor  # integers
    logprob_TK: Tensor  # ln r, nats
    tail_T: Tensor  # 1 - sum of r over ids, summed from the tail itself: no difference of two numbers near one


def top_reference(logits_TV: Tensor, k: int) -> TopReference:
    """The reference's K best tokens, [T, min(k, V)], float32 (float64 in, float64 out), in chunks of rows."""
    parts = []
    for logits_RV in logits_TV.split(CHUNK_TOKENS):
        logprob_RV = logits_RV.to(accumulator(logits_TV)).log_softmax(dim=-1)
        top = logprob_RV.topk(min(k, logits_TV.shape[-1]), dim=-1)
        tail_R = logprob_RV.exp_().scatter_(-1, top.indices, 0.0).sum(dim=-1)
        parts.append((top.indices, top.values, tail_R))
    return TopReference(*(torch.cat(part) for part in zip(*parts, strict=True)))


def plain_kl(kind: str, logits_TV: Tensor, reference: Tensor | TopReference, labels_T: Tensor | None = None) -> Tensor:
    """The definition, differentiable by autograd, without chunks: what `reference_kl` must equal; [T]."""
    if kind == "mask_target":
        assert isinstance(reference, Tensor) and labels_T is not None
        others_TV = torch.ones_like(logits_TV, dtype=torch.bool).scatter(-1, labels_T[:, None], False)
        logits_TV, reference = (part[others_TV].view(len(part), -1) for part in (logits_TV, reference))
        kind = "forward_kl"
    logp_TV = logits_TV.to(accumulator(logits_TV)).log_softmax(dim=-1)
    if isinstance(reference, TopReference):
        ids_TK = reference.ids_TK.long()
        inside_T = _weighed(reference.logprob_TK.exp(), reference.logprob_TK - logp_TV.gather(-1, ids_TK))
        tail_T = logp_TV.exp().scatter(-1, ids_TK, 0.0).sum(dim=-1).clamp(min=TINY)
        return inside_T + reference.tail_T * (reference.tail_T.clamp(min=TINY).log() - tail_T.log())
    logr_TV = reference.to(logp_TV.dtype).log_softmax(dim=-1)
    first, second = (logr_TV, logp_TV) if kind == "forward_kl" else (logp_TV, logr_TV)
    return _weighed(first.exp(), first - second)


def _weighed(weight: Tensor, ratio: Tensor) -> Tensor:
    """sum(weight * ratio) over the last dimension, where a weight of exactly 0 annuls any ratio."""
    return (weight * ratio.masked_fill(weight == 0, 0.0)).sum(dim=-1)


def reference_kl(
    kind: str,
    logits_TV: Tensor,
    reference: Tensor | TopReference,
    mask_T: Tensor,
    labels_T: Tensor | None = None,
) -> Tensor:
    """KL of each token with mask 1, [T] float32 (float64 in, float64 out); the others cost nothing and are 0.

    Args: kind: of `anchors.DIVERGENCES`. logits_TV: [T, V] of the model, any float dtype. reference: [T, V] logits for
    the full kinds, a TopReference for forward_kl_topk; constant. mask_T: [T] bool. labels_T: [T], for mask_target.
    Differentiable once, towards logits_TV. ValueError: vocabularies of different sizes, or no labels.
    """
    if kind in FULL_KINDS:
        assert isinstance(reference, Tensor)
        if reference.shape != logits_TV.shape:
            raise ValueError(f"logits {tuple(logits_TV.shape)} and reference {tuple(reference.shape)} differ in shape")
    wants_grad = torch.is_grad_enabled() and logits_TV.requires_grad
    if kind == "mask_target" and labels_T is None:
        raise ValueError("mask_target needs the labels that it leaves out")
    left_out_T = labels_T if kind == "mask_target" else None
    return _ChunkedKl.apply(logits_TV, reference, mask_T.nonzero().squeeze(-1), kind, left_out_T, wants_grad)


class _ChunkedKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        reference: Tensor | TopReference,
        rows_R: Tensor,
        kind: str,
        left_out_T: Tensor | None,
        wants_grad: bool,
    ) -> Tensor:
        kl_T = torch.zeros(logits_TV.shape[0], dtype=accumulator(logits_TV), device=logits_TV.device)
        grad_TV = torch.zeros_like(logits_TV) if wants_grad else None
        for rows in rows_R.split(CHUNK_TOKENS):
            left_out_R = None if left_out_T is None else left_out_T[rows]
            logp_RV = _log_softmax(logits_TV[rows].to(kl_T.dtype), left_out_R)
            if isinstance(reference, TopReference):
                kl_R, grad_RV = _topk(logp_RV, TopReference(*(part[rows] for part in reference)))
            else:
                kl_R, grad_RV = _full(kind, logp_RV, _log_softmax(reference[rows].to(kl_T.dtype), left_out_R))
            kl_T[rows] = kl_R
            if grad_TV is not None:
                grad_TV[rows] = grad_RV.to(grad_TV.dtype)
        ctx.grad_TV = grad_TV
        return kl_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_T: Tensor) -> tuple[Tensor | None, ...]:
        grad_TV, ctx.grad_TV = ctx.grad_TV, None
        if grad_TV is None:
            raise RuntimeError("anchor: backward ran twice, or on a pass made without gradients")
        return grad_TV.mul_(upstream_T[:, None].to(grad_TV.dtype)), None, None, None, None, None


def _log_softmax(logits_RV: Tensor, left_out_R: Tensor | None) -> Tensor:
    """Over the vocabulary, or over it without one token of each row, which then has no probability."""
    if left_out_R is not None:
        logits_RV = logits_RV.scatter(-1, left_out_R[:, None], -torch.inf)
    return logits_RV.log_softmax(dim=-1)


def _full(kind: str, logp_RV: Tensor, logr_RV: Tensor) -> tuple[Tensor, Tensor]:
    """KL [R] and its gradient [R, V] over the whole vocabulary; overwrites its arguments."""
    first_RV, second_RV = (logp_RV, logr_RV) if kind == "reverse_kl" else (logr_RV, logp_RV)
    weight_RV = first_RV.exp()
    ratio_RV = first_RV.sub_(second_RV).masked_fill_(weight_RV == 0, 0.0)
    kl_R = (weight_RV * ratio_RV).sum(dim=-1)  # autocast would do vecdot in bf16
    if kind == "reverse_kl":
        return kl_R, weight_RV.mul_(ratio_RV.sub_(kl_R[:, None]))
    return kl_R, logp_RV.exp_().sub_(weight_RV)


def _topk(logp_RV: Tensor, top: TopReference) -> tuple[Tensor, Tensor]:
    """KL [R] with one bucket for the tail; gradient [R, V]: p - r on candidates, p (1 - r_tail / p_tail) elsewhere."""
    ids_RK, dtype = top.ids_TK.long(), logp_RV.dtype
    logr_RK, ref_tail_R = top.logprob_TK.to(dtype), top.tail_T.to(dtype)
    chosen_RK = logp_RV.gather(-1, ids_RK)
    prob_RV = logp_RV.exp_()
    tail_R = prob_RV.scatter(-1, ids_RK, 0.0).sum(dim=-1).clamp(min=TINY)
    ref_RK = logr_RK.exp()
    kl_R = _weighed(ref_RK, logr_RK - chosen_RK)
    kl_R += ref_tail_R * (ref_tail_R.clamp(min=TINY).log() - tail_R.log())
    candidates_RK = prob_RV.gather(-1, ids_RK) - ref_RK
    grad_RV = prob_RV.mul_((1.0 - ref_tail_R / tail_R)[:, None]).scatter_(-1, ids_RK, candidates_RK)
    return kl_R, grad_RV
