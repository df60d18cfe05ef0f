"""What others propose against forgetting or noise in SFT, each with its formula and source."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eaft_verl.objectives.objective import Objective, present
from eaft_verl.parameters import count, number

if TYPE_CHECKING:
    from torch import Tensor

    from eaft_verl.tokens.stats import BaseStats, TokenStats

TAU_MODES = ("previous_step", "batch")


@dataclass(frozen=True, kw_only=True)
class Dft(Objective):
    """w = p(y): same gradient as the objective -p(y). arXiv 2508.05629."""

    def weight(self, stats: TokenStats) -> Tensor:
        return stats.logprob_T.exp()


@dataclass(frozen=True, kw_only=True)
class Talr(Objective):
    """w = max(p(y)^(1/tau), floor), tau = median over the batch's examples of their mean loss. arXiv 2509.20758.

    tau: 'previous_step' (no cost; the first step runs one extra forward pass), 'batch' (an extra forward pass every
    step, exact), or a number. With stats=base both words mean the batch's own, of the base model, at no cost. floor
    0.01 is taken from an independent implementation: the authors released no code.
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
        if self.stats != "current":
            raise ValueError(f"stats={self.stats!r} must be current: the ratio compares the model with its recent self")

    def weight(self, stats: TokenStats) -> Tensor:
        ratio_T = (stats.logprob_T - present("psft: old_logprob", stats.old_logprob_T)).clamp(-20.0, 20.0).exp()
        return ratio_T.where(ratio_T <= 1.0 + self.clip_high, 0.0)


@dataclass(frozen=True, kw_only=True)
class Mile(Objective):
    """w = (1 + H)^power over its mean in the batch, H the entropy over the whole vocabulary. arXiv 2310.19531.

    The weight that EAFT's authors compare with: the same direction, but with a floor of 1, so that a confident conflict
    keeps its pull. The published code takes the mean over ignored positions too; here it is that of trained tokens
    (weight_norm=batch_mean, one more forward pass per step).
    """

    power: float = number(1.0, 0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"full_entropy"})

    def weight(self, stats: TokenStats) -> Tensor:
        return (1.0 + present("mile: full_entropy", stats.full_entropy_T).clamp(min=0.0)).pow(self.power)


@dataclass(frozen=True, kw_only=True)
class Idft(Objective):
    """w = p(y)^g, g = clip(exp(-(ln p(y) + H) / scale), exponent_min, exponent_max). arXiv 2602.12222.

    ln p(y) + H is above zero where the label is likelier than what the model would draw itself: then g is small and the
    token is trained as by SFT; an unlikely one is trained as by p^2. g starts at 1 (DFT) and is blended in: with s the
    share of updates made, g <- 1 + clip((s - warmup) / transition, 0, 1) * (g - 1).
    Uncertain: the published code leaves p^g in the graph, whose gradient is that of w = p^g (1 + g ln p), negative for
    p < e^(-1/g); here the weight is constant, as in DFT, which the paper generalises. Its defaults are the code's.
    """

    scale: float = number(1.0, 0, positive=True)
    exponent_min: float = number(0.1, 0)
    exponent_max: float = number(2.0, 0)
    warmup: float = number(0.2, 0, 1)
    transition: float = number(0.1, 0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exponent_min > self.exponent_max:
            raise ValueError(f"exponent_min={self.exponent_min} must be at most exponent_max={self.exponent_max}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"full_entropy"} | ({"progress"} if self.warmup or self.transition else set()))

    def weight(self, stats: TokenStats) -> Tensor:
        logprob_T = stats.logprob_T.clamp(min=-1e30)  # 0 times it is a number
        surplus_T = logprob_T + present("idft: full_entropy", stats.full_entropy_T)
        exponent_T = (-surplus_T / self.scale).clamp(max=80.0).exp().clamp(self.exponent_min, self.exponent_max)
        if "progress" in self.needs:
            made = present("idft: progress", stats.progress) - self.warmup
            blend = float(made >= 0) if not self.transition else min(max(made / self.transition, 0.0), 1.0)
            exponent_T = 1.0 + blend * (exponent_T - 1.0)
        return (exponent_T * logprob_T).exp()


@dataclass(frozen=True, kw_only=True)
class Gift(Objective):
    """Cross-entropy to q = softmax(ln p_0 + boost * onehot(y)), p_0 the base model. arXiv 2601.09233 (its beta is 20).

    q is a mixture, q = w onehot(y) + (1 - w) p_0 with w = p_0(y) (e^boost - 1) / (1 + p_0(y) (e^boost - 1)), hence
    CE(q, p) = w (-ln p(y)) + (1 - w) (KL(p_0 || p) + constant): a gate on base statistics, and the anchor forward_kl
    with coefficient 1 - w at each token. Gradient: p - q. What is logged as loss lacks the constant.
    Tokens with p_0(y) far above e^-boost are trained as by SFT, others are held to the base: a switch for conflicts.
    """

    boost: float = number(20.0, 0, 80.0, positive=True)

    def weight(self, stats: TokenStats) -> Tensor:
        return (stats.logprob_T + math.log(math.expm1(self.boost))).sigmoid()

    def anchor_weight(self, weight_T: Tensor) -> Tensor:
        return 1.0 - weight_T


@dataclass(frozen=True, kw_only=True)
class Finch(Objective):
    """w = 1, and a step whose batch has mean loss L is made with lr * clip(sqrt(level / L), lowest, highest).

    arXiv 2605.20005: a step forgets at most in proportion to lr * sqrt(L), so the rate follows 1 / sqrt(L). Read from
    the abstract: level (the loss, in nats, at which the rate is the recipe's own) and both limits are ours. Scaling the
    gradient instead would do nothing under Adam. The factor is of the batch itself, so a resumed run repeats it.
    """

    level: float = number(1.0, 0, positive=True)
    lowest: float = number(0.1, 0, 1)
    highest: float = number(2.0, 1)

    def weight(self, stats: TokenStats) -> Tensor:
        return stats.logprob_T.new_ones(stats.logprob_T.shape)

    def step_factor(self, nll: float) -> float:
        return min(max(math.sqrt(self.level / max(nll, 1e-12)), self.lowest), self.highest)
