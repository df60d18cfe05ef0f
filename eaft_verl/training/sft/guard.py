"""The configured objective is the one that runs: the first micro-batch is computed again by the definitions."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eaft_verl.objectives import (
    Chord,
    Deft,
    Dft,
    Eaft,
    EaftSigmoid,
    Finch,
    Flow,
    Gift,
    Idft,
    Masked,
    Mile,
    Objective,
    PilotMask,
    PowerP,
    Psft,
    Sft,
    Talr,
    present,
)
from eaft_verl.tokens.head import Head, head_statistics
from eaft_verl.tokens.logits import LogitStats, reference_stats
from eaft_verl.tokens.reference_kl import TopReference, plain_kl
from eaft_verl.tokens.stats import TokenStats

TOKENS = 256  # rows recomputed: a whole micro-batch in float32 may not fit beside the model
FEW = 8  # tokens whose entropy and weight are formed again one by one
TOLERANCE = 1e-3  # relative; the two paths differ by rounding only, a wrong objective differs by its weights


def check_statistics(
    stats: LogitStats, logits_TV: Tensor, labels_T: Tensor, mask_T: Tensor, objective: Objective
) -> None:
    """Compare the first trained tokens with the plain definition; RuntimeError when the fast path disagrees."""
    rows = mask_T.nonzero().squeeze(-1)[:TOKENS]
    expected = reference_stats(logits_TV.detach()[rows], labels_T[rows], objective.k)
    for name, ours, truth in zip(LogitStats._fields, stats, expected, strict=True):
        if (
            ours is not None and truth is not None and name != "correct_T"
        ):  # ties of the largest logit may be broken either way
            _agree(name, ours.detach()[rows], truth)
    for row in rows[:FEW].tolist():
        _agree("entropy_T", stats.entropy_T[row], _entropy(logits_TV.detach()[row].double(), objective.k))


def check_head(
    stats: LogitStats, hidden_TD: Tensor, head: Head, labels_T: Tensor, mask_T: Tensor, objective: Objective
) -> None:
    """The same for statistics from the fused head, and its gradient d nll / d hidden of a few tokens in closed form."""
    rows = mask_T.nonzero().squeeze(-1)[:TOKENS]
    hidden_RD, labels_R, every_R = hidden_TD.detach()[rows], labels_T[rows], torch.ones_like(rows, dtype=torch.bool)
    plain = Head(head.weight_VD.detach(), None if head.bias_V is None else head.bias_V.detach())
    logits_RV = torch.nn.functional.linear(hidden_RD, *plain)
    of_rows = stats._replace(**{name: part[rows] for name, part in stats._asdict().items() if part is not None})
    check_statistics(of_rows, logits_RV, labels_R, every_R, objective)
    with torch.enable_grad():
        asked_FD = hidden_RD[:FEW].clone().requires_grad_()
        head_statistics(asked_FD, plain, labels_R[:FEW], every_R[:FEW]).nll_T.sum().backward()
    error_FV = logits_RV[:FEW].double().softmax(-1)
    error_FV.scatter_add_(-1, labels_R[:FEW, None], torch.full_like(error_FV[:, :1], -1.0))
    truth = error_FV @ plain.weight_VD[:, :FEW].double()  # a few columns: the whole head in float64 may not fit
    rounding = 20 if logits_RV.dtype.itemsize < 4 else 1
    _agree("gradient of the head", present("gradient", asked_FD.grad)[:, :FEW], truth, rounding * TOLERANCE)


def _entropy(logits_V: Tensor, k: int) -> Tensor:
    """Eq. 2 of arXiv 2601.02151 as it is written: -sum q ln q over the K largest logits, renormalised; float64."""
    best_K = logits_V.sort(descending=True).values[:k]
    q_K = (best_K - best_K.max()).exp()
    q_K = q_K[q_K != 0] / q_K.sum()  # NaN stays, and with it no definition to compare with
    return -(q_K * q_K.log()).sum()


def check_weight(objective: Objective, stats: TokenStats, weight_T: Tensor, mask_T: Tensor) -> None:
    """A few weights against the formula of the objective's paper, in float64 and written a second time.

    Without it an objective whose weights are all one would pass as what it calls itself. A user's own class has no
    second formula and is not compared.
    """
    formula = FORMULAS.get(type(objective))
    if formula is None:
        return
    for token in mask_T.nonzero().squeeze(-1)[:FEW].tolist():
        logprob, entropy, sum_p2, sample, old, full = (
            math.nan if part is None else float(part[token])  # what it needs is there, or weight() had raised
            for part in (
                *(stats.logprob_T, stats.entropy_T, stats.sum_p2_T, stats.sample_weight_T, stats.old_logprob_T),
                stats.full_entropy_T,
            )
        )
        share = entropy / math.log(max(stats.k, 2))
        known = Token(math.exp(logprob), logprob, entropy, share, sum_p2, sample, stats.tau, old, full, stats.progress)
        if not _on_a_cut(objective, known):
            truth = torch.tensor(formula(objective, known), dtype=torch.float64)
            _agree(f"weight of {type(objective).__name__}", weight_T.detach()[token].cpu(), truth)


class Token(NamedTuple):
    """What a formula may use of one token, float64."""

    p: float
    logprob: float
    entropy: float  # nats
    share: float  # of ln K
    sum_p2: float
    sample_weight: float
    tau: float | None
    old_logprob: float
    full_entropy: float
    progress: float | None


def _eaft(objective: Any, token: Token) -> float:
    scale = {"ln_k": token.share, "none": token.entropy}.get(str(objective.normalizer), token.entropy / 3.0)
    return (
        float(min(scale, 1.0) ** objective.power) if objective.normalizer == "ln_k" else float(scale**objective.power)
    )


def _talr(objective: Any, token: Token) -> float:
    tau = float(token.tau or 0.0) if isinstance(objective.tau, str) else objective.tau
    return float(max(token.p ** (1.0 / max(tau, 1e-6)), objective.floor))


def _psft(objective: Any, token: Token) -> float:
    ratio = math.exp(min(max(token.logprob - token.old_logprob, -20.0), 20.0))
    return ratio if ratio <= 1.0 + objective.clip_high else 0.0


def _idft(objective: Any, token: Token) -> float:
    surplus = max(token.logprob, -1e30) + token.full_entropy
    raw = math.exp(min(-surplus / objective.scale, 80.0))
    exponent = min(max(raw, objective.exponent_min), objective.exponent_max)
    begin, end = objective.warmup, objective.warmup + objective.transition
    at = 1.0 if token.progress is None or token.progress >= end else max(0.0, token.progress - begin) / (end - begin)
    return token.p ** (at * exponent + 1.0 - at)


def _gift(objective: Any, token: Token) -> float:
    odds = token.p * (math.exp(objective.boost) - 1.0)  # of the label against all others, in the target
    return odds / (1.0 + odds)


FORMULAS: dict[type[Objective], Callable[[Any, Token], float]] = {
    Sft: lambda objective, token: 1.0,
    Eaft: _eaft,
    EaftSigmoid: lambda objective, token: (
        1.0 / (1.0 + math.exp(-objective.steepness * (token.share - objective.center)))
    ),
    Masked: lambda objective, token: float(token.share > objective.threshold),
    PilotMask: lambda objective, token: float(
        token.share > objective.entropy_threshold or token.p > objective.prob_threshold
    ),
    Dft: lambda objective, token: token.p,
    Talr: _talr,
    Flow: lambda objective, token: token.sample_weight,
    PowerP: lambda objective, token: token.p**objective.exponent,
    Deft: lambda objective, token: token.p**token.sum_p2,
    Chord: lambda objective, token: token.p * (1.0 - token.p),
    Psft: _psft,
    Mile: lambda objective, token: (1.0 + max(token.full_entropy, 0.0)) ** objective.power,
    Idft: _idft,
    Gift: _gift,
    Finch: lambda objective, token: 1.0,
}


def _on_a_cut(objective: Any, token: Token) -> bool:
    """Whether rounding alone decides on which side of a threshold the token falls."""
    cuts = {"threshold": token.share, "entropy_threshold": token.share, "prob_threshold": token.p}
    near = [abs(value - vars(objective)[name]) < TOLERANCE for name, value in cuts.items() if vars(objective).get(name)]
    if isinstance(objective, Psft):
        near.append(abs(math.exp(token.logprob - token.old_logprob) - 1.0 - objective.clip_high) < TOLERANCE)
    return any(near)


def check_anchor(
    kind: str,
    kl_T: Tensor,
    logits_TV: Tensor,
    reference: Tensor | TopReference,
    labels_T: Tensor,
    mask_T: Tensor,
) -> None:
    """The same for the anchor's divergence."""
    rows = mask_T.nonzero().squeeze(-1)[:TOKENS]
    if isinstance(reference, TopReference):
        reference = TopReference(*(part[rows] for part in reference))
    else:
        reference = reference[rows]
    _agree("anchor_kl", kl_T.detach()[rows], plain_kl(kind, logits_TV.detach()[rows], reference, labels_T[rows]))


def check_loss(
    loss: Tensor,
    objective: Objective,
    values: dict[str, Tensor],
    weight_T: Tensor,
    anchor_weight_T: Tensor,
    mask_T: Tensor,
    num_tokens: float,
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
        if objective.divergence is not None:
            total += objective.divergence.coef * float(anchor_weight_T[token]) * float(values["anchor_kl"][token])
    _agree("loss", loss.detach().double(), torch.tensor(total / num_tokens, dtype=torch.float64, device=loss.device))


def _agree(name: str, ours: Tensor, truth: Tensor, tolerance: float = TOLERANCE) -> None:
    known = truth.isfinite()  # a model that has diverged has no definition to be compared with; its step is skipped
    ours, truth = ours.double()[known], truth.double()[known]
    if not torch.allclose(ours, truth, rtol=tolerance, atol=tolerance):
        worst = (ours - truth).abs().max().item()
        raise RuntimeError(
            f"objective guard: {name} differs from its definition by {worst:.3g} on the first micro-batch"
        )
