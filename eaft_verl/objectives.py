"""Every training objective as one small class: token statistics -> a weight per token.

loss = 1/N * sum_t m_t * w_t * (-log p_t(y_t)),   d loss / d logits_t = m_t * w_t / N * (softmax_t - onehot(y_t)),
with m the loss mask, N the trained tokens of the *global* batch and w detached. EAFT is `Eaft`: w = H_topK / ln K
(arXiv 2601.02151, Eq. 2-3). Only `weighted_nll` masks and normalises, so that a token's loss never depends on the
micro-batch, rank or packing it landed in.

An anchor adds a penalty towards a frozen reference, coef / N * sum_t m_t * KL_t; with r the reference's and p the
model's distribution at a token, over the vocabulary V (arXiv 2509.23753, Eq. 5 for the forward direction):

forward_kl       KL(r || p) = sum_v r_v ln(r_v / p_v)                        d / d logits = p - r
reverse_kl       KL(p || r) = sum_v p_v ln(p_v / r_v)                        d / d logits = p * (ln(p / r) - KL)
forward_kl_topk  forward over the reference's K best tokens and one bucket for all others, so that it is a true KL:
                 >= 0 and at most forward_kl; K = V gives forward_kl. Its reference values are computed once and kept.

All three are zero, with zero gradient, where p = r.

Adding an objective: one class here (or anywhere importable, named `my_pkg.my_mod:MyObjective`), one line in OBJECTIVES.
Dimension letters: T tokens of a micro-batch, B examples. Tensors are used through their methods only: nothing here
imports torch, so a recipe is checked in a second on a laptop by building its objectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from eaft_verl.parameters import candidates, choice, count, number
from eaft_verl.tokens.stats import FULL_KINDS, TOPK

if TYPE_CHECKING:
    from torch import Tensor

    from eaft_verl.tokens.stats import BaseStats, TokenStats

NORMALIZERS = ("ln_k", "3.0", "none")
WEIGHT_NORMS = ("none", "batch_mean")
TAU_MODES = ("previous_step", "batch")
TOPK_KIND = "forward_kl_topk"
KINDS = (*FULL_KINDS, TOPK_KIND)
# of the label token alone; RL frameworks call them KL, which holds for tokens drawn from the model only
LABEL_ESTIMATORS = ("k1", "kl", "k2", "mse", "k3", "low_var_kl", "abs", "full")


def normalized_entropy(stats: TokenStats, normalizer: str = "ln_k") -> Tensor:
    """Top-K entropy on a scale of one, [T]. 'ln_k': in [0, 1]; '3.0': the paper's rounding of ln 20; 'none': nats."""
    if normalizer == "none":
        return stats.entropy_T
    if normalizer != "ln_k":  # "3.0", which YAML reads as a number
        return stats.entropy_T / 3.0
    return (stats.entropy_T / math.log(max(stats.k, 2))).clamp(0.0, 1.0)  # rounding may leave 1 + 1e-7


def weighted_nll(nll_T: Tensor, weight_T: Tensor, mask_T: Tensor, num_tokens: float) -> Tensor:
    """Sum over trained tokens of w * nll, divided by the trained tokens of the global batch; scalar.

    `where`, not a product, so that NaN on masked tokens cannot leak; with an empty mask the result is a zero that is
    still connected to the graph, because a rank that skips backward makes the others wait for ever.
    """
    return (weight_T.where(mask_T, 0.0).detach() * nll_T.where(mask_T, 0.0)).sum() / num_tokens


def present(name: str, value: Any) -> Any:
    """A statistic the objective stands on; silently training without it would be plain SFT under another name."""
    if value is None:
        raise ValueError(f"{name} is not set: the objective cannot run without it")
    return value


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """How strongly, and to what, the model is held. `reference` None: the model that training starts from."""

    kind: str = choice("forward_kl", KINDS)
    coef: float = number(0.5, 0, positive=True)  # arXiv 2601.02151, Table 4: SFT-KL 0.5
    k: int = candidates(64)  # of forward_kl_topk: 8 bytes per token and candidate on disk, and > 0.97 of the mass
    reference: str | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            check = item.metadata.get("check")
            if check and (allowed := check(vars(self)[item.name])):
                raise ValueError(f"anchor.{item.name}={vars(self)[item.name]!r} must be {allowed}")
        if self.reference is not None and not isinstance(self.reference, str):
            raise ValueError(f"anchor.reference={self.reference!r} must be a model (folder or hub id) or null")

    @property
    def full(self) -> bool:
        """Whether every step needs the reference's logits."""
        return self.kind in FULL_KINDS


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all objectives. `weight_norm=batch_mean` divides the weights by their mean over the global batch."""

    k: int = candidates(TOPK)
    weight_norm: str = choice("none", WEIGHT_NORMS)
    anchor: Anchor | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            check: Callable[[Any], str | None] | None = item.metadata.get("check")
            if check and (allowed := check(vars(self)[item.name])):
                raise ValueError(f"{item.name}={vars(self)[item.name]!r} must be {allowed}")

    @property
    def needs(self) -> frozenset[str]:
        """What it asks for beyond log-probability and entropy: of sum_p2, sample_weight, tau, base, old_logprob."""
        return frozenset()

    def weight(self, stats: TokenStats) -> Tensor:
        """Weight of each token, [T] float32, not normalised, before masking."""
        raise TypeError(f"{type(self).__name__} defines no weight()")

    def calibrate(self, base: BaseStats) -> Objective:
        """The same objective with the thresholds it takes from the base model filled in."""
        return self

    def sample_weights(self, base: BaseStats) -> Tensor | None:
        """Weight of each example, [B], for objectives that fix it before training."""
        return None


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


@dataclass(frozen=True, kw_only=True)
class Dft(Objective):
    """w = p(y): same gradient as the objective -p(y). arXiv 2508.05629."""

    def weight(self, stats: TokenStats) -> Tensor:
        return stats.logprob_T.exp()


@dataclass(frozen=True, kw_only=True)
class Talr(Objective):
    """w = max(p(y)^(1/tau), floor), tau = median over the batch's examples of their mean loss. arXiv 2509.20758.

    tau: 'previous_step' (no cost; the first step runs one extra forward pass), 'batch' (an extra forward pass every
    step, exact), or a number. floor 0.01 is taken from an independent implementation: the authors released no code.
    """

    tau: float | str = number("previous_step", 0, positive=True, words=TAU_MODES)
    floor: float = number(0.01, 0, 1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tau"}) if isinstance(self.tau, str) else frozenset()

    def weight(self, stats: TokenStats) -> Tensor:
        tau = present("talr.tau", stats.tau) if isinstance(self.tau, str) else self.tau
        return (stats.logprob_T / max(tau, 1e-6)).exp().clamp(min=self.floor)


@dataclass(frozen=True, kw_only=True)
class Flow(Objective):
    """w = exp(-f_i / tau), f_i = the base model's mean loss on the token's example. arXiv 2502.02797.

    temperature None: the median of f over the data set (the authors' code), so the median example weighs 1/e.
    """

    temperature: float | None = number(None, 0, positive=True)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"base", "sample_weight"})

    def sample_weights(self, base: BaseStats) -> Tensor:
        tau = base.quantile("mean_nll", 0.5) if self.temperature is None else self.temperature
        return (-base.mean_nll.double() / max(tau, 1e-6)).exp().float()

    def weight(self, stats: TokenStats) -> Tensor:
        return present("flow: sample_weight", stats.sample_weight_T)


@dataclass(frozen=True, kw_only=True)
class PowerP(Objective):
    """w = p(y)^exponent: the objective (1 - p^a) / a. a -> 0 is SFT, a = 1 is DFT. arXiv 2510.00526."""

    exponent: float = number(0.5, 0)

    def weight(self, stats: TokenStats) -> Tensor:
        return (self.exponent * stats.logprob_T).exp()


@dataclass(frozen=True, kw_only=True)
class Deft(Objective):
    """w = p(y)^(sum_v p_v^2): trusts p only as far as the model is confident. arXiv 2602.11424."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"sum_p2"})

    def weight(self, stats: TokenStats) -> Tensor:
        return (present("deft: sum_p2", stats.sum_p2_T) * stats.logprob_T).exp()


@dataclass(frozen=True, kw_only=True)
class Chord(Objective):
    """w = p(y) * (1 - p(y)): CHORD's token weight alone, without its RL loop. arXiv 2508.11408."""

    def weight(self, stats: TokenStats) -> Tensor:
        prob_T = stats.logprob_T.exp()
        return prob_T * (1.0 - prob_T)


@dataclass(frozen=True, kw_only=True)
class Psft(Objective):
    """loss = -min(r, clip(r, 1 - clip_low, 1 + clip_high)), r = p(y) / p_old(y): PPO's loss at advantage 1.

    Its gradient is that of w = r * 1[r <= 1 + clip_high]: SFT inside a trust region. p_old is the model's own, taken
    anew every `updates_per_refresh` optimizer steps. arXiv 2508.17784, Eq. 7; 0.2, 0.28 and 8 are its settings.
    """

    clip_low: float = number(0.2, 0, 1)
    clip_high: float = number(0.28, 0)
    updates_per_refresh: int = count(8)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logprob"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_norm != "none":
            raise ValueError(f"weight_norm={self.weight_norm!r} must be none: the ratio is no weight to be rescaled")

    def weight(self, stats: TokenStats) -> Tensor:
        ratio_T = (stats.logprob_T - present("psft: old_logprob", stats.old_logprob_T)).clamp(-20.0, 20.0).exp()
        return ratio_T.where(ratio_T <= 1.0 + self.clip_high, 0.0)


OBJECTIVES: dict[str, tuple[type[Objective], dict[str, Any]]] = {
    "sft": (Sft, {}),
    "eaft": (Eaft, {}),
    "eaft_2": (Eaft, {"power": 2.0}),
    "eaft_3": (Eaft, {"power": 3.0}),
    "eaft_sigmoid": (EaftSigmoid, {}),
    "eaft_llamafactory": (Eaft, {"normalizer": "3.0"}),
    "eaft_axolotl": (Eaft, {"normalizer": "none"}),
    "masked": (Masked, {}),
    "pilot_mask": (PilotMask, {}),
    "dft": (Dft, {}),
    "talr": (Talr, {}),
    "flow": (Flow, {}),
    "power_p": (PowerP, {}),
    "deft": (Deft, {}),
    "chord": (Chord, {}),
    "psft": (Psft, {}),
    "sft_kl": (Sft, {"anchor": Anchor(kind="forward_kl", coef=0.5)}),
    "asft": (Dft, {"anchor": Anchor(kind="forward_kl", coef=0.05)}),
}
