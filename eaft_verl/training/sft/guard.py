"""The configured objective is the one that runs: the first micro-batch is computed again by the definitions."""

import math

import torch
from torch import Tensor

from eaft_verl.objectives import Objective, Psft
from eaft_verl.tokens.logits import LogitStats, reference_stats
from eaft_verl.tokens.reference_kl import TopReference, plain_kl

TOKENS = 256  # rows recomputed: a whole micro-batch in float32 may not fit beside the model
TOLERANCE = 1e-3  # relative; the two paths differ by rounding only, a wrong objective differs by its weights


def check_statistics(
    stats: LogitStats, logits_TV: Tensor, labels_T: Tensor, mask_T: Tensor, objective: Objective
) -> None:
    """Compare the first trained tokens with the plain definition; RuntimeError when the fast path disagrees."""
    rows = mask_T.nonzero().squeeze(-1)[:TOKENS]
    expected = reference_stats(logits_TV.detach()[rows], labels_T[rows], objective.k)
    for name, ours, truth in zip(LogitStats._fields, stats, expected, strict=True):
        if ours is not None and name != "correct_T":  # ties of the largest logit may be broken either way
            _agree(name, ours.detach()[rows], truth)


def check_anchor(kind: str, kl_T: Tensor, logits_TV: Tensor, reference: Tensor | TopReference, mask_T: Tensor) -> None:
    """The same for the anchor's divergence."""
    rows = mask_T.nonzero().squeeze(-1)[:TOKENS]
    if isinstance(reference, TopReference):
        reference = TopReference(*(part[rows] for part in reference))
    else:
        reference = reference[rows]
    _agree("anchor_kl", kl_T.detach()[rows], plain_kl(kind, logits_TV.detach()[rows], reference))


def check_loss(
    loss: Tensor, objective: Objective, values: dict[str, Tensor], weight_T: Tensor, mask_T: Tensor, num_tokens: float
) -> None:
    """Recompute the loss of the micro-batch token by token in float64: it must be the configured objective's."""
    total, values = 0.0, {name: value.detach() for name, value in values.items()}
    for token in mask_T.nonzero().squeeze(-1).tolist():
        nll = float(values["nll"][token])
        if isinstance(objective, Psft):
            ratio = math.exp(-nll - float(values["old_logprob"][token]))
            total -= min(ratio, max(1.0 - objective.clip_low, min(ratio, 1.0 + objective.clip_high)))
        else:
            total += float(weight_T[token]) * nll
        if objective.anchor is not None:
            total += objective.anchor.coef * float(values["anchor_kl"][token])
    _agree("loss", loss.detach().double(), torch.tensor(total / num_tokens, dtype=torch.float64, device=loss.device))


def _agree(name: str, ours: Tensor, truth: Tensor) -> None:
    if not torch.allclose(ours.double(), truth.double(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        worst = (ours.double() - truth.double()).abs().max().item()
        raise RuntimeError(
            f"objective guard: {name} differs from its definition by {worst:.3g} on the first micro-batch"
        )
