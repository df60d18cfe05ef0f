"""What holds a model to where it came from, beside any objective.

Divergences add coef / N * sum_t m_t * KL_t to the loss; with r the reference's and p the model's distribution at a
token, over the vocabulary V (arXiv 2509.23753, Eq. 5 for the forward direction):

forward_kl       KL(r || p) = sum_v r_v ln(r_v / p_v)                        d / d logits = p - r
reverse_kl       KL(p || r) = sum_v p_v ln(p_v / r_v)                        d / d logits = p * (ln(p / r) - KL)
mask_target      KL(r' || p'), both without the label's entry and renormalised: x'_v = x_v / (1 - x_y), v != y. Holds
                 the order of the alternatives and leaves p(y) to the data (arXiv 2605.29498; read from its abstract:
                 the direction and the weight of 1 per token are our reading). d / d logits = p' - r', 0 at the label
forward_kl_topk  forward over the reference's K best tokens and one bucket for all others, so that it is a true KL:
                 >= 0 and at most forward_kl; K = V gives forward_kl. Its reference values are computed once and kept.

All are zero, with zero gradient, where p = r.

l2               theta <- theta - lr * coef * (theta - theta_0) after each update, theta_0 the weights that training
                 starts from: AdamW's decay, towards the start instead of zero (L2-SP, arXiv 1802.01483). Decoupled,
                 not in the loss: there Adam would divide the pull by the gradient's own size (arXiv 1711.05101), and
                 clipping would shrink both together. It costs one more copy of the weights, sharded as they are, and
                 no logits. A pull that matters over a run has lr * coef * updates near 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from eaft_verl.parameters import candidates, check_fields, choice, number
from eaft_verl.tokens.stats import FULL_KINDS

TOPK_KIND, L2_KIND = "forward_kl_topk", "l2"
DIVERGENCES = (*FULL_KINDS, TOPK_KIND)  # of each token, in the loss
KINDS = (*DIVERGENCES, L2_KIND)
# of the label token alone; RL frameworks call them KL, which holds for tokens drawn from the model only
LABEL_ESTIMATORS = ("k1", "kl", "k2", "mse", "k3", "low_var_kl", "abs", "full")


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """How strongly, and to what, the model is held. `reference` None: the model that training starts from."""

    kind: str = choice("forward_kl", KINDS)
    coef: float = number(0.5, 0, positive=True)  # arXiv 2601.02151, Table 4: SFT-KL 0.5
    k: int = candidates(64)  # of forward_kl_topk: 8 bytes per token and candidate on disk, and > 0.97 of the mass
    reference: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "anchor.")
        if self.reference is not None and not isinstance(self.reference, str):
            raise ValueError(f"anchor.reference={self.reference!r} must be a model (folder or hub id) or null")
        if self.kind == L2_KIND and self.reference is not None:
            raise ValueError("anchor.reference must be null for kind=l2, which holds to the weights training starts at")

    @property
    def full(self) -> bool:
        """Whether every step needs the reference's logits."""
        return self.kind in FULL_KINDS
