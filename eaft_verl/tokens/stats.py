"""What is known of each trained token: the types that objectives read. Nothing here imports torch.

Dimension letters: T tokens of a packed micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

TOPK = 20  # arXiv 2601.02151, Sec. 5.2: at K = 20 the top-K entropy tracks the full one with r = 0.999
LOW_ENTROPY = 0.5  # nats; arXiv 2601.02151, Fig. 4 groups tokens by H <= 0.5 and H >= 2.0
HIGH_ENTROPY = 2.0
CONFLICT_PROB = 0.2  # a confident conflict: H <= 0.5 and p(label) < 0.2 (the paper draws the region without numbers)
FULL_KINDS = ("forward_kl", "reverse_kl", "mask_target")  # divergences that need the reference's logits in every step


class TokenStats(NamedTuple):
    """What an objective may look at. Per-token tensors are detached, shape [T]; a field not asked for is None."""

    logprob_T: Tensor  # log p(label), nats
    entropy_T: Tensor  # entropy of the top-K renormalised distribution, nats, in [0, ln k]
    k: int  # number of candidates behind entropy_T: min(K, V)
    sum_p2_T: Tensor | None = None  # sum over the vocabulary of p^2
    sample_weight_T: Tensor | None = None  # weight of the token's example, fixed before training
    tau: float | None = None  # median over the global batch of the examples' mean loss, nats
    old_logprob_T: Tensor | None = None  # log p(label) of the model a few updates ago, nats
    full_entropy_T: Tensor | None = None  # entropy over the vocabulary, nats
    progress: float | None = None  # share of the run's updates that are made, in [0, 1)


@dataclass(frozen=True)
class BaseStats:
    """What the untrained model says of the prepared data: one forward pass before training."""

    entropy: Tensor  # [tokens] top-K entropy normalised by ln K, in [0, 1]
    prob: Tensor  # [tokens] p(label), in [0, 1]
    mean_nll: Tensor  # [examples] mean of -log p(label) over the example's trained tokens, nats
    column: Callable[[str], Tensor] | None = None  # name of a field of TokenStats, less its _T -> [tokens]

    def quantile(self, name: str, q: float) -> float:
        """Linear-interpolated quantile of one field; sorted because torch.quantile stops at 16 million values."""
        ordered = vars(self)[name].double().sort().values
        position = q * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return float(ordered[low] + (position - low) * (ordered[high] - ordered[low]))
