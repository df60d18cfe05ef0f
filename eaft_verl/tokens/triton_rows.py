"""The steps of a chunk of logits as Triton kernels: one reading pass for all statistics, one pass for the gradient.

The same numbers as `row_statistics`, `row_gradient` and `row_distribution` of logits.py, without a float32 copy of the
logits: the gradient takes their place. Float32 arithmetic. Exact top-K without a sort: the pass that sums exponentials
keeps the largest logit of every group of GROUP columns; the next largest logit of the row is then always the largest
of those.

Dimension letters: R rows, V vocabulary, G groups. Not imported where there is no Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eaft_verl.tokens.logits import topk_entropy
from eaft_verl.tokens.stats import TOPK

GROUP = 128  # columns whose largest logit is kept
BLOCK = 4096  # columns that a program holds at a time
MOST = 64  # candidates that are found one after another; more are left to torch
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _statistics(
    logits: tl.tensor,
    stride: int,
    labels: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    best: tl.tensor,
    rows: int,
    V: tl.constexpr,
    G: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Of one row: nll, label is best, sum p^2, full entropy; largest logit, sum beside it; largest of each group."""
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    top, total, squares, weighed = float("-inf"), 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(line + column, mask=column < V, other=float("-inf")).to(tl.float32)
        group = tl.max(tl.reshape(value, (BLOCK // GROUP, GROUP)), axis=1)
        tl.store(best + row * G + start // GROUP + tl.arange(0, BLOCK // GROUP), group)
        larger = tl.maximum(top, tl.max(group, axis=0))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # until a finite one has been seen
        shrink = tl.exp(top - base)
        part = tl.exp(value - base)
        if ENTROPY:  # sum of z exp(z), z relative to the largest so far
            moved = tl.where(top == float("-inf"), 0.0, shrink * (weighed + total * (top - base)))
            weighed = moved + tl.sum(tl.where(part > 0.0, part * (value - base), 0.0), axis=0)
        total = total * shrink + tl.sum(part, axis=0)
        squares = squares * shrink * shrink + tl.sum(part * part, axis=0)
        top = larger
    label = tl.load(line + tl.load(labels + row)).to(tl.float32) - top
    tl.store(sums + row, top)
    tl.store(sums + rows + row, total)
    tl.store(out + row, tl.log(total) - label)
    tl.store(out + 3 * rows + row, tl.where(label == 0.0, 1.0, 0.0))
    tl.store(out + 4 * rows + row, squares / total / total)
    tl.store(out + 5 * rows + row, tl.log(total) - weighed / total if ENTROPY else 0.0)


@triton.jit
def _entropies(
    logits: tl.tensor, stride: int, out: tl.tensor, sums: tl.tensor, best: tl.tensor, first: tl.tensor, rows: int,
    k: int, V: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, TOPK: tl.constexpr,
    MOST: tl.constexpr,
) -> None:  # fmt: skip
    """Of one row: entropies of its k and its TOPK largest logits, all that are equal taken at once; sum exp(z) of the
    k, and the column of the largest.
    With z relative to the largest and S = sum exp(z): H = ln S - sum z exp(z) / S, both terms positive.
    """
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    top = tl.load(sums + row)
    groups = tl.arange(0, GROUPS)
    left = tl.load(best + row * G + groups, mask=groups < G, other=float("-inf"))
    taken, total, weighed, total20, weighed20, argmax = 0, 0.0, 0.0, 0.0, 0.0, V
    for number in range(MOST):
        largest = tl.max(left, axis=0)
        where = tl.argmax(left, axis=0)
        column = where * GROUP + tl.arange(0, GROUP)
        value = tl.load(line + column, mask=column < V, other=float("-inf")).to(tl.float32)
        equal = tl.sum(tl.where(value == largest, 1, 0), axis=0)
        if number == 0:
            argmax = tl.min(tl.where(value == largest, column, V - 1), axis=0)
        share = tl.exp(largest - top)
        product = tl.where(share > 0.0, (largest - top) * share, 0.0)
        count = tl.minimum(tl.maximum(k - taken, 0), equal).to(tl.float32)
        count20 = tl.minimum(tl.maximum(TOPK - taken, 0), equal).to(tl.float32)
        total, weighed = total + count * share, weighed + count * product
        total20, weighed20 = total20 + count20 * share, weighed20 + count20 * product
        taken += equal
        left = tl.where(groups == where, tl.max(tl.where(value < largest, value, float("-inf")), axis=0), left)
    tl.store(out + rows + row, tl.log(total) - weighed / total)
    tl.store(out + 2 * rows + row, tl.log(total20) - weighed20 / total20)
    tl.store(sums + 2 * rows + row, total)
    tl.store(first + row, argmax)


@triton.jit
def _gradient(
    logits: tl.tensor,
    stride: int,
    labels: tl.tensor,
    weights: tl.tensor,
    sums: tl.tensor,
    rows: int,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """weight * (softmax - onehot) in place of the logits of one row and one block of columns."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row.to(tl.int64) * stride + column
    weight = tl.load(weights + row)
    value = tl.load(place, mask=column < V, other=float("-inf")).to(tl.float32)
    prob = tl.exp(value - tl.load(sums + row)) * (weight / tl.load(sums + rows + row))
    tl.store(place, tl.where(column == tl.load(labels + row), prob - weight, prob), mask=column < V)


def triton_statistics(
    logits_RV: Tensor, labels_R: Tensor, k: int, sum_p2: bool, full_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(six statistics [6, R] in the order of LogitStats, the logits as they are, their largest and its sum [2, R]).

    sum_p2 is formed always: a multiplication beside what memory takes.
    """
    out_6R, sums_3R, _ = _passes(logits_RV, labels_R, k, full_entropy)
    return out_6R, logits_RV, sums_3R[:2]


def triton_distribution(logits_RV: Tensor, labels_R: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Six numbers [6, R] in the order of Distribution, and the most likely token [R]; the logits stay as they are."""
    out_6R, sums_3R, first_R = _passes(logits_RV, labels_R, k, True)
    nll_R, entropy_R, _, _, sum_p2_R, full_R = out_6R
    _, total_R, most_R = sums_3R
    numbers_6R = torch.stack([nll_R, entropy_R, full_R, 1 / total_R, sum_p2_R, (most_R / total_R).clamp(max=1.0)])
    return numbers_6R, first_R.long()


def _passes(logits_RV: Tensor, labels_R: Tensor, k: int, full_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(statistics [6, R], the largest logit, sum exp(z) of all and of the k largest [3, R], column of the largest)."""
    rows, vocab = logits_RV.shape
    blocks = triton.cdiv(vocab, BLOCK)
    groups = blocks * (BLOCK // GROUP)
    out_6R, sums_3R = (torch.empty(n, rows, dtype=torch.float32, device=logits_RV.device) for n in (6, 3))
    best_RG, first_R = out_6R.new_empty(rows, groups), labels_R.new_empty(rows, dtype=torch.int32)
    line = logits_RV.stride(0)
    _statistics[(rows,)](
        *(logits_RV, line, labels_R, out_6R, sums_3R, best_RG, rows, vocab, groups),
        *(full_entropy, BLOCK, GROUP),
        num_warps=8,
    )
    searched = min(k, vocab) if k <= MOST else TOPK
    _entropies[(rows,)](
        *(logits_RV, line, out_6R, sums_3R, best_RG, first_R, rows, searched, vocab, groups),
        *(triton.next_power_of_2(groups), GROUP, TOPK, max(searched, min(TOPK, vocab))),
        num_warps=4,
    )
    if k > MOST:
        best_RK = logits_RV.topk(min(k, vocab), dim=-1).values.float()
        out_6R[1], sums_3R[2] = topk_entropy(best_RK), (best_RK - best_RK[:, :1]).exp().sum(dim=-1)
    return out_6R, sums_3R, first_R


def triton_gradient(
    logits_RV: Tensor, sums_2R: Tensor, labels_R: Tensor, weight_R: Tensor, dtype: torch.dtype
) -> Tensor:
    """d (sum_t w_t nll_t) / d logits in place of the logits; `dtype` is theirs."""
    rows, vocab = logits_RV.shape
    _gradient[(rows, triton.cdiv(vocab, BLOCK))](
        logits_RV, logits_RV.stride(0), labels_R, weight_R, sums_2R, rows, vocab, BLOCK, num_warps=8
    )
    return logits_RV.to(dtype)
