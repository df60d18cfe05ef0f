"""The language-model head and the loss in one: hidden states to token statistics, without the matrix of all logits.

Dimension letters: T tokens of a packed micro-batch, R trained ones among them, C of a chunk, D hidden, V vocabulary.

The weight of an objective is detached and known as soon as a row of logits is, so the gradient
d (sum_t w_t nll_t) / d logits_t = w_t (softmax_t - onehot_t) (arXiv 2601.02151, Eq. 3) can be formed chunk by chunk in
the forward pass: three matrix products (logits, d hidden, d weight), and never more logits than one chunk of them.
Backward then only has to find that the loss really asked for that gradient, up to one common factor.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eaft_verl.tokens.chunks import head_chunk
from eaft_verl.tokens.logits import CPU_CHUNK_TOKENS, Distribution, LogitStats, accumulator, asked, distribution_of
from eaft_verl.tokens.row_kernels import COMPARED, RowKernels, kernels_for
from eaft_verl.tokens.stats import TOPK

Gate = Callable[[LogitStats, Tensor], Tensor]  # statistics [C] of some tokens and which of the T they are -> weight [C]

FACTOR_TOLERANCE = 1e-4  # relative; the loss rounds its weights once more than we do


class Head(NamedTuple):
    """What `lm_head` is: logits = hidden @ weight^T + bias."""

    weight_VD: Tensor
    bias_V: Tensor | None = None


def head_statistics(
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    mask_T: Tensor,
    *,
    gate: Gate | None = None,
    k: int = TOPK,
    sum_p2: bool = False,
    full_entropy: bool = False,
    kernels: RowKernels | None = None,
) -> LogitStats:
    """`logit_stats(hidden @ weight^T + bias, ...)` in chunks; rows with mask 0 are not multiplied.

    Args: hidden_TD: [T, D] and head in one float dtype, in which the products run; all else is float32 (float64 in,
    float64 out). gate: the weights with which the loss is going to sum nll_T. None, or a loss that does otherwise:
    right all the same, but backward forms the logits a second time (four products instead of three).
    kernels: None: those that `kernels_for` chooses.
    Returns: LogitStats [T]; nll_T carries the gradient to hidden, weight and bias; a frozen one costs no product.
    Under autocast the products run in its dtype, as those of `torch.nn.Linear` do.
    """
    device = hidden_TD.device.type
    hidden_TD, head = _as_linear(hidden_TD, head)
    rows_R = mask_T.nonzero().squeeze(-1)
    with torch.autocast(device, enabled=False):
        if kernels is None:
            kernels = _kernels(hidden_TD, head, labels_T, rows_R)
        made = _FusedHead.apply(
            *(hidden_TD, head.weight_VD, head.bias_V, labels_T, rows_R),
            *(gate, k, sum_p2, full_entropy, kernels, torch.is_grad_enabled()),
        )
    return asked(LogitStats(*made), sum_p2, full_entropy)


@torch.no_grad()
def head_distribution(
    hidden_TD: Tensor, head: Head, labels_T: Tensor, mask_T: Tensor, *, k: int = TOPK
) -> Distribution:
    """`distribution_stats(hidden @ weight^T + bias, ...)`, from the chunks of logits that `head_statistics` forms of
    the same rows: training and a pass that trains nothing multiply alike."""
    hidden_TD, head = _as_linear(hidden_TD, head)
    rows_R = mask_T.nonzero().squeeze(-1)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        kernels = _kernels(hidden_TD, head, labels_T, rows_R)
        pieces = _pieces(rows_R, hidden_TD, head, kernels)
        return distribution_of(pieces, labels_T, accumulator(hidden_TD), k=k, by=kernels.distribution)


def _kernels(hidden_TD: Tensor, head: Head, labels_T: Tensor, rows_R: Tensor) -> RowKernels:
    few_R = rows_R[:COMPARED]
    return kernels_for(
        *(hidden_TD.device.type, hidden_TD.dtype, len(head.weight_VD)),
        lambda: (_logits(hidden_TD[few_R], head).detach(), labels_T[few_R]),
    )


def _pieces(rows_R: Tensor, hidden_TD: Tensor, head: Head, kernels: RowKernels) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and their logits, chunk by chunk, and on a CPU in parts of one that stay in a core's cache."""
    for _, rows in _chunks(rows_R, head, kernels):
        logits_CV = _logits(hidden_TD[rows], head)
        size = CPU_CHUNK_TOKENS if logits_CV.device.type == "cpu" else len(rows)
        yield from zip(rows.split(size), logits_CV.split(size), strict=True)
        del logits_CV  # before the next chunk's logits are formed


def _as_linear(hidden_TD: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Both in the dtype that `torch.nn.Linear` would multiply them in."""
    device = hidden_TD.device.type
    if not torch.is_autocast_enabled(device):
        return hidden_TD, head
    dtype = torch.get_autocast_dtype(device)
    bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
    return hidden_TD.to(dtype), Head(head.weight_VD.to(dtype), bias_V)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        rows_R: Tensor,
        gate: Gate | None,
        k: int,
        sum_p2: bool,
        full_entropy: bool,
        kernels: RowKernels,
        grad: bool,
    ) -> tuple[Tensor, ...]:
        out_6T = torch.zeros(6, hidden_TD.shape[0], dtype=accumulator(hidden_TD), device=hidden_TD.device)
        wanted = tuple(grad and needs for needs in ctx.needs_input_grad[:3])
        speculate = gate is not None and any(wanted)
        head = Head(weight_VD, bias_V)
        sums = _Gradients(hidden_TD, head, len(rows_R), wanted) if speculate else None
        weight_R = out_6T.new_empty(len(rows_R))
        for start, rows in _chunks(rows_R, head, kernels):
            hidden_CD, labels_C = hidden_TD[rows], labels_T[rows]
            out_6T[:, rows], held_CV, sums_C = kernels.statistics(
                _logits(hidden_CD, head), labels_C, k, sum_p2, full_entropy
            )
            if gate is not None and sums is not None:
                weight_C = weight_R[start : start + len(rows)].copy_(gate(LogitStats(*out_6T[:, rows].unbind()), rows))
                gradient_CV = kernels.gradient(held_CV, sums_C, labels_C, weight_C, hidden_CD.dtype)
                sums.add(start, hidden_CD, head, gradient_CV)
                del gradient_CV
            del held_CV  # before the next chunk's logits are formed
        ctx.sums, ctx.weight_R = sums, weight_R
        ctx.wanted, ctx.kernels = wanted, kernels
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, labels_T, rows_R)
        nll_T, *rest = out_6T.unbind()
        ctx.mark_non_differentiable(*rest)
        return nll_T, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_T: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, labels_T, rows_R = ctx.saved_tensors
        sums, ctx.sums = ctx.sums, None
        upstream_R = upstream_T[rows_R]
        factor = _common_factor(upstream_R, ctx.weight_R) if sums is not None else None
        head = Head(weight_VD, bias_V)
        if sums is None or factor is None:
            factor, sums = None, _recomputed(*(hidden_TD, head, labels_T, rows_R, upstream_R), ctx.wanted, ctx.kernels)
        return *sums.results(rows_R, hidden_TD, factor), *[None] * 8


def _chunks(rows_R: Tensor, head: Head, kernels: RowKernels) -> list[tuple[int, Tensor]]:
    weight_VD = head.weight_VD
    size = head_chunk(len(weight_VD), weight_VD.dtype.itemsize, weight_VD.device.type, in_place=kernels.in_place)
    return [(number * size, rows) for number, rows in enumerate(rows_R.split(size)) if len(rows)]


def _logits(hidden_CD: Tensor, head: Head) -> Tensor:
    return torch.nn.functional.linear(hidden_CD, head.weight_VD, head.bias_V)


def _recomputed(
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    rows_R: Tensor,
    upstream_R: Tensor,
    wanted: tuple[bool, ...],
    kernels: RowKernels,
) -> "_Gradients":
    """The gradient for any upstream: the logits are formed once more."""
    sums = _Gradients(hidden_TD, head, len(rows_R), wanted)
    for start, rows in _chunks(rows_R, head, kernels):
        hidden_CD, labels_C = hidden_TD[rows], labels_T[rows]
        _, held_CV, sums_C = kernels.statistics(_logits(hidden_CD, head), labels_C, 1, False, False)
        upstream_C = upstream_R[start : start + len(rows)]
        sums.add(start, hidden_CD, head, kernels.gradient(held_CV, sums_C, labels_C, upstream_C, hidden_CD.dtype))
    return sums


def _common_factor(upstream_R: Tensor, weight_R: Tensor) -> Tensor | None:
    """c where upstream = c * weight for every token, else None."""
    square = weight_R.square().sum()
    factor = torch.where(square > 0, (upstream_R * weight_R).sum() / square, torch.zeros_like(square))
    close = (upstream_R - factor * weight_R).abs() <= FACTOR_TOLERANCE * (factor * weight_R).abs()
    return factor if bool(close.all()) else None


class _Gradients:
    """Gradients of hidden states (trained rows), weight and bias, summed over chunks; None where not wanted."""

    def __init__(self, hidden_TD: Tensor, head: Head, rows: int, wanted: tuple[bool, ...]) -> None:
        self.hidden_RD = hidden_TD.new_empty(rows, hidden_TD.shape[1]) if wanted[0] else None
        self.weight_VD = torch.zeros_like(head.weight_VD) if wanted[1] else None
        self.bias_V = torch.zeros_like(head.bias_V) if wanted[2] and head.bias_V is not None else None

    def add(self, start: int, hidden_CD: Tensor, head: Head, logits_CV: Tensor) -> None:
        """The part of one chunk, from its gradient of the logits."""
        if self.hidden_RD is not None:
            self.hidden_RD[start : start + len(hidden_CD)] = logits_CV @ head.weight_VD
        if self.weight_VD is not None:
            self.weight_VD.addmm_(logits_CV.T, hidden_CD)
        if self.bias_V is not None:
            self.bias_V += logits_CV.sum(dim=0)

    def results(self, rows_R: Tensor, hidden_TD: Tensor, factor: Tensor | None) -> tuple[Tensor | None, ...]:
        """(d hidden [T, D], d weight [V, D], d bias [V]), times the factor."""
        scaled = [
            part if part is None or factor is None else part.mul_(factor.to(part.dtype))
            for part in (self.hidden_RD, self.weight_VD, self.bias_V)
        ]
        if scaled[0] is not None and len(rows_R) < len(hidden_TD):
            scaled[0] = torch.zeros_like(hidden_TD).index_copy_(0, rows_R, scaled[0])
        return tuple(scaled)
