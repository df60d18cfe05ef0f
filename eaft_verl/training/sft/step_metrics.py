"""What is logged for every objective under the same names, from the statistics of each trained token of a step."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_verl.tokens.stats import CONFLICT_PROB, HIGH_ENTROPY, LOW_ENTROPY

COLUMNS = ("nll", "entropy20", "correct", "weight", "example", "anchor_kl")


class TokenTable:
    """Rows of COLUMNS, one per trained token of this rank's part of the batch, collected over micro-batches."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.examples = 0

    def clear(self) -> None:
        """Forget the previous batch."""
        self.parts, self.examples = [], 0

    def add(self, mask_T: Tensor, lengths_B: Tensor, weight_T: Tensor, **values: Tensor) -> None:
        """Keep the trained tokens of one micro-batch; `lengths_B` tells which example a token belongs to."""
        ids = torch.arange(len(lengths_B), device=mask_T.device) + self.examples
        self.examples += len(lengths_B)
        columns = [values["nll"].detach(), values["entropy20"], values["correct"], weight_T.detach()]
        anchor = values["anchor_kl"].detach() if "anchor_kl" in values else torch.zeros_like(columns[0])
        table = torch.stack(
            [*(column.double() for column in (*columns, ids.repeat_interleave(lengths_B), anchor))], dim=-1
        )
        self.parts.append(table[mask_T])

    def mean_nll(self, group: Any) -> float:
        """Mean -log p(label) over the trained tokens of the global batch, nats; collective over `group`."""
        parts = [part[:, COLUMNS.index("nll")] for part in self.parts]
        mine = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        total = torch.stack([mine.sum(), torch.full_like(mine.sum(), len(mine))])
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(total, group=group)
        return float(total[0] / total[1])

    def gather(self, group: Any) -> Tensor:
        """All ranks' rows, [tokens of the global batch, len(COLUMNS)] float64 on the CPU; collective over `group`."""
        mine = torch.cat(self.parts) if self.parts else torch.zeros(0, len(COLUMNS), dtype=torch.float64)
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return mine.cpu()
        sizes = [torch.zeros(2, dtype=torch.int64, device=mine.device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor([len(mine), self.examples], device=mine.device), group=group)
        longest = max(int(size[0]) for size in sizes)
        padded = torch.zeros(longest, len(COLUMNS), dtype=torch.float64, device=mine.device)
        padded[: len(mine)] = mine
        tables = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(tables, padded, group=group)
        offset, rows = 0, []
        for table, size in zip(tables, sizes, strict=True):
            part = table[: int(size[0])].clone()
            part[:, COLUMNS.index("example")] += offset  # examples are numbered per rank
            offset += int(size[1])
            rows.append(part)
        return torch.cat(rows).cpu()


def summarize(rows: Tensor) -> dict[str, float]:
    """The step's metrics; `rows` as from TokenTable.gather. NaN where there is no such token.

    nll: mean of -log p(label), nats/token. entropy: mean top-20 entropy, nats. weight_*: of the weights that multiplied
    the loss. ess: effective sample size (sum w)^2 / (N sum w^2), in (0, 1]. conflict_share: tokens with entropy <=
    LOW_ENTROPY and p(label) < CONFLICT_PROB. median_example_nll: median over examples of their mean nll, nats (TALR).
    anchor_kl: mean divergence from the reference, nats/token; 0 without an anchor.
    """
    nll, entropy, correct, weight, example, anchor_kl = rows.unbind(-1)
    low, high = entropy <= LOW_ENTROPY, entropy >= HIGH_ENTROPY
    p10, p50, p90 = _quantiles(weight, (0.1, 0.5, 0.9))
    return {
        "step_tokens": float(len(rows)),
        "nll": _mean(nll),
        "token_accuracy": _mean(correct),
        "entropy": _mean(entropy),
        "weight_mean": _mean(weight),
        "weight_p10": p10,
        "weight_p50": p50,
        "weight_p90": p90,
        "ess": _ratio(float(weight.sum() ** 2), len(rows) * float((weight**2).sum())),
        "conflict_share": _mean((low & (nll > -math.log(CONFLICT_PROB))).double()),
        "nll_low_entropy": _mean(nll[low]),
        "nll_high_entropy": _mean(nll[high]),
        "median_example_nll": _median_of_means(nll, example.long()),
        "anchor_kl": _mean(anchor_kl),
    }


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom > 0 else math.nan


def _quantiles(values: Tensor, points: tuple[float, ...]) -> list[float]:
    """Nearest-rank quantiles: exact members of the sample, and no limit on its size."""
    if not len(values):
        return [math.nan for _ in points]
    ordered = values.sort().values
    return [float(ordered[min(len(ordered) - 1, int(point * len(ordered)))]) for point in points]


def _median_of_means(nll: Tensor, example: Tensor) -> float:
    if not len(nll):
        return math.nan
    _, index, counts = example.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=nll.dtype).index_add_(0, index, nll)
    return float((sums / counts).quantile(0.5))
