"""By which code the steps of a chunk of logits run, statistics, gradient, distribution: chosen here and nowhere else.

On a GPU the Triton kernels, once they have given the numbers of chunked torch on rows of the caller's own; elsewhere,
and where they do not, chunked torch. Dimension letters: R rows, V vocabulary.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eaft_verl.tokens.logits import row_distribution, row_gradient, row_statistics
from eaft_verl.tokens.stats import TOPK

COMPARED = 64  # rows
TOLERANCE = 1e-5  # of statistics, relative and absolute; of the gradient beside its rounding


class RowKernels(NamedTuple):
    """`statistics`, `gradient`, `distribution` take and give what `row_statistics`, `row_gradient`, `row_distribution`
    do; what the first hands to the second is their own affair. in_place: the gradient takes the place of the logits,
    whatever their dtype."""

    name: str
    statistics: Callable[[Tensor, Tensor, int, bool, bool], tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]
    in_place: bool = False
    distribution: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = row_distribution


CHUNKED = RowKernels("chunked", row_statistics, row_gradient)
chosen: dict[tuple[torch.dtype, int], tuple[RowKernels, str | None]] = {}  # by dtype and V; why not Triton


def triton_kernels() -> RowKernels:
    """ImportError where there is no Triton."""
    from eaft_verl.tokens.triton_rows import triton_distribution, triton_gradient, triton_statistics

    return RowKernels("triton", triton_statistics, triton_gradient, True, triton_distribution)


def kernels_for(
    device: str, dtype: torch.dtype, vocab: int, some_rows: Callable[[], tuple[Tensor, Tensor]]
) -> RowKernels:
    """What runs on logits [*, vocab] of this dtype. some_rows: a few of them [R, V], to be used up, and their labels;
    asked for once a process."""
    if device != "cuda" or dtype == torch.float64:
        return CHUNKED
    if (dtype, vocab) not in chosen:
        logits_RV, labels_R = some_rows()
        if not len(labels_R):
            return CHUNKED
        chosen[dtype, vocab] = verified(logits_RV, labels_R)
        if reason := chosen[dtype, vocab][1]:
            warnings.warn(f"token statistics: {reason}; chunked torch is used instead", stacklevel=2)
    return chosen[dtype, vocab][0]


@torch.no_grad()
def verified(logits_RV: Tensor, labels_R: Tensor) -> tuple[RowKernels, str | None]:
    """The Triton kernels where they run and agree with chunked torch on these rows; else that, and why."""
    try:
        kernels = triton_kernels()
        ours, theirs = (_all(each, logits_RV, labels_R) for each in (kernels, CHUNKED))
    except Exception as error:  # whatever a compiler and a driver may say
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return CHUNKED, f"the Triton kernels do not run here ({said})"
    rounding = 0.0 if logits_RV.dtype.itemsize >= 4 else torch.finfo(logits_RV.dtype).eps
    names = ("other statistics", "another distribution", "another likeliest token", "another gradient")
    tolerances = (TOLERANCE, TOLERANCE, 0.0, TOLERANCE + rounding)
    for name, one, other, tolerance in zip(names, ours, theirs, tolerances, strict=True):
        if not torch.allclose(one, other, rtol=tolerance, atol=TOLERANCE, equal_nan=True):
            return CHUNKED, f"the Triton kernels give {name} than torch"
    return kernels, None


def _all(kernels: RowKernels, logits_RV: Tensor, labels_R: Tensor) -> tuple[Tensor, ...]:
    dtype = logits_RV.dtype
    numbers_6R, likeliest_R = kernels.distribution(logits_RV.clone(), labels_R, TOPK)
    highest_R = logits_RV.gather(-1, likeliest_R[:, None]).float()  # equal logits may be told apart either way
    stats_6R, held_RV, sums = kernels.statistics(logits_RV.clone(), labels_R, TOPK, True, True)
    weight_R = stats_6R[1]  # EAFT's, up to a constant
    gradient_RV = kernels.gradient(held_RV, sums, labels_R, weight_R.contiguous(), dtype).float()
    return stats_6R, numbers_6R, highest_R, gradient_RV
