"""The fused head where several ranks hold slices of the vocabulary (tensor parallel): one softmax of all of them.

Dimension letters: T tokens, R rows of a chunk, D hidden, S vocabulary of one slice, K top-K. Rank r of a group holds
rows [r S, (r + 1) S) of the whole weight; hidden states, labels and mask are the same on all, and so is every result.
The statistics are exact: the K largest logits of all are among the K largest of each slice. A row costs each rank
K + 4 numbers sent, and D in backward, where whole logits would be S.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from eaft_verl.tokens.head import Head, head_statistics
from eaft_verl.tokens.logits import LogitStats, accumulator, topk_entropy
from eaft_verl.tokens.row_kernels import RowKernels
from eaft_verl.tokens.stats import TOPK

LOWEST = -1e30  # a logit below the largest one that has no probability, and is a number: 0 * LOWEST = 0


def vocab_parallel_statistics(
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    mask_T: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab: int | None = None,
    **options: Any,
) -> LogitStats:
    """`head_statistics` over the vocabulary of all ranks; head: this rank's slice, labels: ids of the whole vocabulary.

    vocab: size without the padding behind it, which has no probability; None: nothing is padded. options: `gate`, `k`,
    `sum_p2`, `full_entropy`. nll_T carries the whole gradient to hidden, and to weight and bias that of the slice.
    Raises ValueError where the slices are not of one size (pad the vocabulary), on every rank.
    """
    own = torch.tensor([len(head.weight_VD)], device=hidden_TD.device)
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own, group=group)
    if len(set(sizes := torch.cat(parts).tolist())) > 1:
        raise ValueError(f"slices of the vocabulary have {sizes} rows; pad it so that all have as many")
    first = group.rank() * sizes[0]
    kernels = RowKernels(
        "vocabulary-parallel",
        partial(_statistics, group, first, sizes[0] * group.size() if vocab is None else vocab),
        partial(_gradient, first),
    )
    return head_statistics(_Replicated.apply(hidden_TD, group), head, labels_T, mask_T, kernels=kernels, **options)


class _Replicated(torch.autograd.Function):
    """The same on all ranks; its gradient is the sum of what each slice asks of it."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden_TD.view_as(hidden_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TD: Tensor) -> tuple[Tensor, None]:
        summed_TD = upstream_TD.contiguous().clone()
        dist.all_reduce(summed_TD, group=ctx.group)
        return summed_TD, None


def _statistics(
    group: dist.ProcessGroup,
    first: int,
    vocab: int,
    logits_RS: Tensor,
    labels_R: Tensor,
    k: int,
    sum_p2: bool,
    full_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `row_statistics`: the sums are those of all slices, exp(logits - largest) is this slice's."""
    wide_RS = logits_RS.to(accumulator(logits_RS))
    if (real := max(0, vocab - first)) < wide_RS.shape[1]:
        wide_RS[:, real:] = -torch.inf
    best_RK = _best_of_all(wide_RS, max(k, TOPK), group)[:, : min(max(k, TOPK), vocab)]
    wide_RS = wide_RS.sub_(best_RK[:, :1]).clamp_(min=LOWEST)
    held_R, index_R = _held(labels_R, first, wide_RS.shape[1])
    label_R = wide_RS.gather(-1, index_R[:, None]).squeeze(-1).where(held_R, 0.0)
    exp_RS = wide_RS.exp_()
    parts_4R = exp_RS.new_zeros(4, len(labels_R))
    parts_4R[0], parts_4R[1] = label_R, exp_RS.sum(dim=-1)
    if sum_p2:
        parts_4R[2] = exp_RS.square().sum(dim=-1)
    if full_entropy:
        parts_4R[3] = torch.special.entr(exp_RS).sum(dim=-1)
    dist.all_reduce(parts_4R, group=group)
    label_R, total_R, square_R, entr_R = parts_4R
    entropies = (topk_entropy(best_RK[:, :k]), topk_entropy(best_RK[:, :TOPK]))
    spread_R = total_R.log() + entr_R / total_R if full_entropy else torch.zeros_like(total_R)
    correct_R = (label_R == 0).to(total_R.dtype)
    stats = (total_R.log() - label_R, *entropies, correct_R, square_R / total_R.square(), spread_R)
    return torch.stack(stats), exp_RS, total_R.clone()


def _gradient(
    first: int, exp_RS: Tensor, total_R: Tensor, labels_R: Tensor, weight_R: Tensor, dtype: torch.dtype
) -> Tensor:
    """As `row_gradient`, of this slice's logits."""
    held_R, index_R = _held(labels_R, first, exp_RS.shape[1])
    exp_RS.mul_((weight_R / total_R)[:, None])
    return exp_RS.scatter_add_(-1, index_R[:, None], -weight_R.where(held_R, 0.0)[:, None]).to(dtype)


def _held(labels_R: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """(whether the slice holds the label, its place there; 0 where not)."""
    held_R = (labels_R >= first) & (labels_R < first + size)
    return held_R, (labels_R - first).where(held_R, 0)


def _best_of_all(wide_RS: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """[R, ranks * min(count, S)] the largest logits of every slice, the largest of all first."""
    best_RK = wide_RS.topk(min(count, wide_RS.shape[1]), dim=-1).values.contiguous()
    parts = [torch.empty_like(best_RK) for _ in range(group.size())]
    dist.all_gather(parts, best_RK, group=group)
    return torch.cat(parts, dim=-1).sort(dim=-1, descending=True).values
