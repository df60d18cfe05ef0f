"""Random tokens, and two ways from logits to an objective's loss: the shipped one and a plain differentiable one."""

from typing import NamedTuple

import torch
from hypothesis import settings
from torch import Tensor

from eaft_verl.objectives import Objective, weighted_nll
from eaft_verl.recipe.objective import build_objective
from eaft_verl.tokens.logits import LogitStats, logit_stats
from eaft_verl.tokens.stats import BaseStats, TokenStats

few = settings(max_examples=6, derandomize=True, database=None)
EXACT = {"rtol": 0.0, "atol": 1e-12}  # for float64
EXAMPLES = 4
TAU = 1.3  # nats
PROGRESS = 0.25  # in the middle of IDFT's transition
BASE = BaseStats(
    entropy=torch.linspace(0.0, 1.0, 101, dtype=torch.float64),
    prob=torch.linspace(0.0, 1.0, 101, dtype=torch.float64),
    mean_nll=torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64),
)


class Tokens(NamedTuple):
    """A packed micro-batch; `example_T` is the row of BASE.mean_nll that a token belongs to."""

    logits_TV: Tensor
    labels_T: Tensor
    mask_T: Tensor
    example_T: Tensor

    def rows(self, index: Tensor | slice) -> "Tokens":
        """The same tokens, only some of them."""
        return Tokens(*(value[index] for value in self))


def random_tokens(seed: int, tokens: int = 12, vocab: int = 27, scale: float = 2.0, trained: float = 0.7) -> Tokens:
    """Gaussian float64 logits with a spread of sharpness over the tokens; about `trained` of them have mask 1."""
    source = torch.Generator().manual_seed(seed)
    sharpness_T = torch.rand(tokens, 1, generator=source, dtype=torch.float64) * 2 * scale
    return Tokens(
        logits_TV=torch.randn(tokens, vocab, generator=source, dtype=torch.float64) * sharpness_T,
        labels_T=torch.randint(vocab, (tokens,), generator=source),
        mask_T=torch.rand(tokens, generator=source) < trained,
        example_T=torch.randint(EXAMPLES, (tokens,), generator=source),
    )


def ready(name: str, **params: object) -> Objective:
    """The named objective, calibrated on BASE where it asks for a base model."""
    objective = build_objective(name, **params)
    return objective.calibrate(BASE) if "base" in objective.needs else objective


def token_stats(objective: Objective, tokens: Tokens, stats: LogitStats) -> TokenStats:
    """Exactly what the objective declares to need, and no more: an undeclared need shows up as a failure."""
    needs = objective.needs
    sample_weights_B = objective.sample_weights(BASE)
    return TokenStats(
        logprob_T=-stats.nll_T,
        entropy_T=stats.entropy_T,
        k=min(objective.k, tokens.logits_TV.shape[-1]),
        sum_p2_T=stats.sum_p2_T if "sum_p2" in needs else None,
        sample_weight_T=sample_weights_B[tokens.example_T] if "sample_weight" in needs else None,
        tau=TAU if "tau" in needs else None,
        old_logprob_T=-0.8 * stats.nll_T.detach() - 0.1 if "old_logprob" in needs else None,
        full_entropy_T=stats.full_entropy_T if "full_entropy" in needs else None,
        progress=PROGRESS if "progress" in needs else None,
    )


def shipped(objective: Objective, tokens: Tokens, num_tokens: float) -> tuple[Tensor, Tensor]:
    """Loss (with its graph to tokens.logits_TV) and weights [T], by logit_stats and weighted_nll."""
    logits_TV, labels_T, mask_T, _ = tokens
    asked = {name: name in objective.needs for name in ("sum_p2", "full_entropy")}
    stats = logit_stats(logits_TV, labels_T, mask_T, k=objective.k, **asked)
    weight_T = objective.weight(token_stats(objective, tokens, stats._replace(nll_T=stats.nll_T.detach())))
    return weighted_nll(stats.nll_T, weight_T, mask_T, num_tokens), weight_T


def with_graph(objective: Objective, tokens: Tokens, num_tokens: float) -> tuple[Tensor, Tensor]:
    """The same by log_softmax, every statistic still attached to the logits, so that only a detach can cut it off."""
    logits_TV, labels_T, mask_T, _ = tokens
    logprob_TV = logits_TV.log_softmax(-1)
    nll_T = -logprob_TV.gather(-1, labels_T[:, None])[:, 0]
    top_TK = logits_TV.topk(min(objective.k, logits_TV.shape[-1])).values.log_softmax(-1)
    entropy_T = -(top_TK.exp() * top_TK).sum(-1)
    prob_TV = logprob_TV.exp()
    full_T = -(prob_TV * logprob_TV.masked_fill(prob_TV == 0, 0.0)).sum(-1)
    stats = LogitStats(nll_T, entropy_T, entropy_T, entropy_T, prob_TV.square().sum(-1), full_T)
    weight_T = objective.weight(token_stats(objective, tokens, stats))
    return weighted_nll(nll_T, weight_T, mask_T, num_tokens), weight_T


def gradient(objective: Objective, tokens: Tokens, num_tokens: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, d loss / d logits and weights of the shipped path."""
    logits_TV = tokens.logits_TV.clone().requires_grad_()
    loss, weight_T = shipped(objective, tokens._replace(logits_TV=logits_TV), num_tokens)
    loss.backward()
    return loss.detach(), logits_TV.grad, weight_T
