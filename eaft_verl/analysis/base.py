"""A store as the objectives take it: thresholds and sample weights from what the base model says of the data."""

import torch

from eaft_verl.analysis.store import TokenStore
from eaft_verl.objectives import normalized_entropy
from eaft_verl.tokens.stats import BaseStats, TokenStats


def base_stats(store: TokenStore) -> BaseStats:
    """The store's tokens and samples; 16 bytes a token in memory."""
    logprob, entropy, sample = (
        torch.tensor(store.column(name).to_numpy()) for name in ("logprob", "entropy", "sample")
    )
    nll_sum = torch.zeros(store.meta["samples"], dtype=torch.float64).index_add_(0, sample, -logprob.double())
    mean_nll = nll_sum / sample.bincount(minlength=store.meta["samples"])
    normalized = normalized_entropy(TokenStats(logprob, entropy, store.meta["k"]))
    return BaseStats(
        normalized, logprob.exp(), mean_nll.float(), lambda name: torch.tensor(store.column(name).to_numpy())
    )
