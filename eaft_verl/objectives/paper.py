"""THE PAPER in one file: Entropy-Adaptive Fine-Tuning, its variants and masks, and plain SFT. arXiv 2601.02151."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from eaft_verl.objectives.objective import NORMALIZERS, Objective, normalized_entropy, present
from eaft_verl.parameters import choice, number

if TYPE_CHECKING:
    from torch import Tensor

    from eaft_verl.tokens.stats import BaseStats, TokenStats


@dataclass(frozen=True, kw_only=True)
class Sft(Objective):
    """w = 1: plain cross-entropy."""

    def weight(self, stats: TokenStats) -> Tensor:
        return stats.logprob_T.new_ones(stats.logprob_T.shape)


@dataclass(frozen=True, kw_only=True)
class Eaft(Objective):
    """w = (H_topK / c)^power, c = ln K (paper), 3.0 (LLaMA-Factory) or 1 (axolotl). arXiv 2601.02151, Eq. 2-3.

    power 1, 2, 3 = EAFT, EAFT_2, EAFT_3 (Sec. 5.1); power 0 is SFT. With ln_k the weight lies in [0, 1].
    """

    power: float = number(1.0, 0)
    normalizer: str = choice("ln_k", NORMALIZERS)

    def weight(self, stats: TokenStats) -> Tensor:
        return normalized_entropy(stats, self.normalizer).pow(self.power)


@dataclass(frozen=True, kw_only=True)
class EaftSigmoid(Objective):
    """w = sigmoid(steepness * (H_topK / ln K - center)). arXiv 2601.02151, Sec. 5.1 (alpha = 30, beta = 0.17)."""

    steepness: float = number(30.0, 0)
    center: float = number(0.17, 0, 1)

    def weight(self, stats: TokenStats) -> Tensor:
        return (self.steepness * (normalized_entropy(stats) - self.center)).sigmoid()


@dataclass(frozen=True, kw_only=True)
class Masked(Objective):
    """w = 1[H_topK / ln K > threshold]. arXiv 2601.02151, Eq. 4.

    threshold None: the `quantile` of the base model's normalised entropies over the trained tokens (the paper's text).
    0.17 gives the cut of its sigmoid; the two are not the same on any model measured.
    """

    threshold: float | None = number(None, 0, 1)
    quantile: float = number(0.15, 0, 1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.threshold is not None else frozenset({"base"})

    def calibrate(self, base: BaseStats) -> Objective:
        return self if self.threshold is not None else replace(self, threshold=base.quantile("entropy", self.quantile))

    def weight(self, stats: TokenStats) -> Tensor:
        return (normalized_entropy(stats) > present("masked.threshold", self.threshold)).to(stats.logprob_T.dtype)


@dataclass(frozen=True, kw_only=True)
class PilotMask(Objective):
    """w = 0 where entropy AND probability are both low, else 1. arXiv 2601.02151, Fig. 2a.

    Thresholds None: the `quantile` of the base model's normalised entropies and label probabilities.
    """

    entropy_threshold: float | None = number(None, 0, 1)
    prob_threshold: float | None = number(None, 0, 1)
    quantile: float = number(0.15, 0, 1)

    @property
    def needs(self) -> frozenset[str]:
        complete = self.entropy_threshold is not None and self.prob_threshold is not None
        return frozenset() if complete else frozenset({"base"})

    def calibrate(self, base: BaseStats) -> Objective:
        entropy, prob = (
            base.quantile(name, self.quantile) if given is None else given
            for name, given in (("entropy", self.entropy_threshold), ("prob", self.prob_threshold))
        )
        return replace(self, entropy_threshold=entropy, prob_threshold=prob)

    def weight(self, stats: TokenStats) -> Tensor:
        low_entropy = normalized_entropy(stats) <= present("pilot_mask.entropy_threshold", self.entropy_threshold)
        low_prob = stats.logprob_T.exp() <= present("pilot_mask.prob_threshold", self.prob_threshold)
        return (~(low_entropy & low_prob)).to(stats.logprob_T.dtype)
