"""An objective tried on made-up statistics before anything is trained: seconds, no model."""

from typing import Any

import torch

from eaft_verl.errors import ConfigError
from eaft_verl.tokens.stats import BaseStats, TokenStats

TOKENS = 5


def ask(name: str, objective: Any, method: str, *given: Any) -> Any:
    """What the objective's method gives; ConfigError, with `name` first, for whatever one's own objective raises."""
    try:
        return getattr(objective, method)(*given)
    except Exception as error:
        if type(objective).__module__.startswith("eaft_verl."):  # a fault of ours keeps its traceback
            raise
        raise ConfigError(f"{name}: {_raised(method, error)}") from error


def _raised(method: str, error: Exception) -> str:
    return f"{method}() raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def weight_fault(objective: Any) -> str:
    """What is wrong with an objective's weight, which must be a finite number for each of T tokens; '' if nothing.

    The statistics are those of T = 5 tokens, from a sure hit (log p = 0, entropy 0) to a miss (log p = -12, entropy
    ln k), everything that an objective may ask for among them. Whatever the objective raises is said.
    """
    share_T = torch.linspace(0, 1, TOKENS)
    k = min(objective.k, 20)
    entropy_T = share_T * torch.tensor(float(k)).log()
    logprob_T = -12 * share_T
    stats = TokenStats(
        logprob_T,
        entropy_T,
        k,
        sum_p2_T=logprob_T.exp() ** 2,
        sample_weight_T=torch.ones(TOKENS),
        tau=1.0,
        old_logprob_T=logprob_T - 0.1,
        full_entropy_T=entropy_T,
        progress=0.5,
    )
    columns = {"logprob": logprob_T, "entropy": entropy_T, "sum_p2": logprob_T.exp() ** 2, "full_entropy": entropy_T}
    base = BaseStats(share_T, logprob_T.exp(), -logprob_T, columns.__getitem__)
    try:
        if "base" in objective.needs:
            objective = objective.calibrate(base)
        weight: Any = objective.weight(stats)
    except Exception as error:  # it is somebody else's code
        return _raised("weight", error)
    if not isinstance(weight, torch.Tensor):
        return f"weight() returns {type(weight).__name__}; a tensor of shape [T], a weight for each token, is expected"
    if weight.shape != (TOKENS,):
        return f"weight() has shape {list(weight.shape)} for statistics of shape [{TOKENS}]; one weight per token"
    if not (weight.dtype.is_floating_point and bool(weight.isfinite().all())):
        return f"weight() is {weight.tolist()} ({weight.dtype}); finite floating-point numbers are expected"
    return ""
