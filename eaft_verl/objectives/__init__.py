"""Every training objective as one small class: token statistics -> a weight per token.

loss = 1/N * sum_t m_t * w_t * (-log p_t(y_t)),   d loss / d logits_t = m_t * w_t / N * (softmax_t - onehot(y_t)),
with m the loss mask, N the trained tokens of the *global* batch and w detached. EAFT is `Eaft`: w = H_topK / ln K
(arXiv 2601.02151, Eq. 2-3). Read `paper.py` first.

paper.py      THE PAPER in one file: EAFT, its variants and masks, plain SFT
rivals.py     what others propose, each with formula and source
anchors.py    a penalty beside any of them: towards a frozen reference, or towards the starting weights
objective.py  what an objective is, and the one function that masks and normalises

Adding an objective: one class in rivals.py (or anywhere importable, named `my_pkg.my_mod:MyObjective`), one line in
OBJECTIVES. Dimension letters: T tokens of a micro-batch, B examples. Tensors are used through their methods only:
nothing here imports torch, so a recipe is checked in a second on a laptop by building its objectives. May import
parameters.py and the types of tokens.
"""

from typing import Any

from eaft_verl.objectives.anchors import DIVERGENCES, KINDS, L2_KIND, LABEL_ESTIMATORS, TOPK_KIND, Anchor
from eaft_verl.objectives.objective import Objective, normalized_entropy, present, weighted_nll
from eaft_verl.objectives.paper import Eaft, EaftSigmoid, Masked, PilotMask, Sft
from eaft_verl.objectives.rivals import Chord, Deft, Dft, Finch, Flow, Gift, Idft, Mile, PowerP, Psft, Talr

__all__ = [
    "DIVERGENCES",
    "KINDS",
    "L2_KIND",
    "LABEL_ESTIMATORS",
    "OBJECTIVES",
    "TOPK_KIND",
    "Anchor",
    "Chord",
    "Deft",
    "Dft",
    "Eaft",
    "EaftSigmoid",
    "Finch",
    "Flow",
    "Gift",
    "Idft",
    "Masked",
    "Mile",
    "Objective",
    "PilotMask",
    "PowerP",
    "Psft",
    "Sft",
    "Talr",
    "normalized_entropy",
    "present",
    "weighted_nll",
]

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
    "mile": (Mile, {"weight_norm": "batch_mean"}),
    "idft": (Idft, {}),
    "prift": (Dft, {"stats": "base"}),  # w = p_0(y): PriFT-prob of arXiv 2606.09396
    "gift": (Gift, {"stats": "base", "anchor": Anchor(kind="forward_kl", coef=1.0)}),
    "finch": (Finch, {}),
    "sft_kl": (Sft, {"anchor": Anchor(kind="forward_kl", coef=0.5)}),
    "asft": (Dft, {"anchor": Anchor(kind="forward_kl", coef=0.05)}),
    "mask_target": (Sft, {"anchor": Anchor(kind="mask_target", coef=0.5)}),
}
