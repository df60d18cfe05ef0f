"""Fig. 3 of arXiv 2601.02151 in closed form: how hard an objective pulls at a token, on the plane of Fig. 1b.

|d L_t / d logits_t|_1 = w (sum_v |softmax_v - onehot_v|) = 2 w (1 - p): exact, and a function of p and of what the
weight depends on. (|.|_2 = w sqrt(1 - 2 p + sum_v p_v^2) needs the whole distribution; shares of gradient use it.)
Objectives whose weight needs more than p and the entropy have no such picture.
"""

import math
from typing import Any

import numpy as np
import torch

from eaft_verl.analysis.landscape import binary_entropy, highest_topk_entropy
from eaft_verl.objectives import Objective
from eaft_verl.tokens.rehearsal import ask
from eaft_verl.tokens.stats import TokenStats

POINTS = 80  # of each axis
ON_PLANE = frozenset({"base", "tau"})  # needs that a store fills with one number
Row = dict[str, Any]


def field(objective: Objective, k: int, tau: float) -> list[list[float | None]] | None:
    """[POINTS of p][POINTS of H / ln K] at the middle of equal cells; None where no model can be (outside
    h(p) <= H <= the highest top-K entropy). None for an objective whose weight needs more than p and H."""
    if not objective.needs <= ON_PLANE:
        return None
    middle = (np.arange(POINTS) + 0.5) / POINTS
    prob, normalized = (part.ravel() for part in np.meshgrid(middle, middle, indexing="ij"))
    entropy = normalized * math.log(k)
    logprob_T, entropy_T = (torch.from_numpy(part).double() for part in (np.log(prob), entropy))
    stats = TokenStats(logprob_T, entropy_T, k, tau=tau)
    weight = ask(f"--gates {type(objective).__name__}", objective, "weight", stats).double().numpy()
    pull = 2.0 * weight * (1.0 - prob)
    possible = (entropy >= binary_entropy(prob)) & (entropy <= highest_topk_entropy(prob, k))
    square = np.where(possible, pull, np.nan).reshape(POINTS, POINTS)
    return [[None if np.isnan(value) else float(value) for value in line] for line in square]
