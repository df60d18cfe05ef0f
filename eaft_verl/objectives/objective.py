"""What an objective is, and the only function that masks and normalises, so that a token's loss never depends on the
micro-batch, rank or packing it landed in."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eaft_verl.objectives.anchors import DIVERGENCES, Anchor
from eaft_verl.parameters import candidates, check_fields, choice
from eaft_verl.tokens.stats import TOPK

if TYPE_CHECKING:
    from torch import Tensor

    from eaft_verl.tokens.stats import BaseStats, TokenStats

NORMALIZERS = ("ln_k", "3.0", "none")
WEIGHT_NORMS = ("none", "batch_mean")
STATS = ("current", "base")


def normalized_entropy(stats: TokenStats, normalizer: str = "ln_k") -> Tensor:
    """Top-K entropy on a scale of one, [T]. 'ln_k': in [0, 1]; '3.0': the paper's rounding of ln 20; 'none': nats."""
    if normalizer == "none":
        return stats.entropy_T
    if normalizer != "ln_k":  # "3.0", which YAML reads as a number
        return stats.entropy_T / 3.0
    return (stats.entropy_T / math.log(max(stats.k, 2))).clamp(0.0, 1.0)  # rounding may leave 1 + 1e-7


def weighted_nll(nll_T: Tensor, weight_T: Tensor, mask_T: Tensor, num_tokens: float | Tensor) -> Tensor:
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


def _staying(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method; RuntimeError where it calls `sys.exit`."""

    @functools.wraps(method)
    def run(*given: Any, **named: Any) -> Any:
        try:
            return method(*given, **named)
        except SystemExit as error:
            raise RuntimeError(f"{method.__qualname__} calls sys.exit({error}); raise an exception instead") from error

    return run


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all objectives.

    weight_norm: 'batch_mean' divides the weights by their mean over the global batch. stats: whose statistics give the
    weights, those of the model as it is ('current') or of the one that training starts from ('base'), which one forward
    pass over the data gives before the first step; then weights are constants of the data and cannot reinforce
    themselves (arXiv 2606.09396). At the first step both are the same.
    """

    k: int = candidates(TOPK)
    weight_norm: str = choice("none", WEIGHT_NORMS)
    stats: str = choice("current", STATS)
    anchor: Anchor | None = None

    def __init_subclass__(cls) -> None:
        """One's own objective cannot end the program, or a worker, without a word: here pass all, on every machine."""
        for name in ("weight", "anchor_weight", "step_factor", "calibrate", "sample_weights"):
            if name in vars(cls):
                setattr(cls, name, _staying(vars(cls)[name]))

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs(self) -> frozenset[str]:
        """What it asks for beyond log-probability and entropy: of sum_p2, full_entropy, sample_weight, tau, progress,
        base, old_logprob."""
        return frozenset()

    @property
    def needs_base(self) -> bool:
        """Whether the starting model must pass over the data before the first step."""
        return self.stats == "base" or "base" in self.needs

    @property
    def extras(self) -> dict[str, bool]:
        """Statistics that cost a pass over the vocabulary each: {name: whether it needs it}."""
        return {name: name in self.needs for name in ("sum_p2", "full_entropy")}

    @property
    def divergence(self) -> Anchor | None:
        """The anchor that adds a term to every token's loss; None where there is none, or it acts on the weights."""
        return self.anchor if self.anchor is not None and self.anchor.kind in DIVERGENCES else None

    def weight(self, stats: TokenStats) -> Tensor:
        """Weight of each token, [T] float32, not normalised, before masking."""
        raise TypeError(f"{type(self).__name__} defines no weight()")

    def anchor_weight(self, weight_T: Tensor) -> Tensor:
        """Share of the anchor's coefficient that a token with this weight gets, [T]."""
        return weight_T.new_ones(weight_T.shape)

    @property
    def sets_rates(self) -> bool:
        """Whether `step_factor` is its own."""
        return type(self).step_factor is not Objective.step_factor

    def step_factor(self, nll: float) -> float:
        """What the learning rate of a step is multiplied by, given the mean -log p(label) of its batch, nats."""
        return 1.0

    def calibrate(self, base: BaseStats) -> Objective:
        """The same objective with the thresholds it takes from the base model filled in."""
        return self

    def sample_weights(self, base: BaseStats) -> Tensor | None:
        """Weight of each example, [B], for objectives that fix it before training."""
        return None
