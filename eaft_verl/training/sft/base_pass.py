"""What the untrained model says of the prepared data: one forward pass, kept and reused by every arm that asks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from verl.utils import tensordict_utils as tu

from eaft_verl.data.prepare import Example
from eaft_verl.errors import RunError
from eaft_verl.objectives import normalized_entropy
from eaft_verl.tokens.stats import BaseStats, TokenStats
from eaft_verl.training.sft.batches import sequential_batches
from eaft_verl.training.sft.order import PADDING

FIELDS = ("entropy", "prob", "mean_nll")


def base_stats(
    path: Path, key: str, examples: Sequence[Example], k: int, infer: Callable[[list[int]], Any], batch_size: int
) -> BaseStats:
    """The statistics in `path`, or from a pass of `infer` (rows of a batch -> worker output) stored there.

    `key` names model, data and template; a file made for another key is an error, never reused.
    """
    if path.exists():
        return _load(path, key)
    entropy, prob, mean_nll = [], [], []
    for indices in sequential_batches(len(examples), batch_size):
        output = infer(indices)
        nlls, entropies = output["nll"].unbind(), output["entropy"].unbind()
        vocab = int(output["vocab"].values()[0])
        for row, index in enumerate(indices):
            if index == PADDING:
                continue
            trained = torch.tensor(examples[index].loss_mask[1:], dtype=torch.bool)  # position t predicts token t + 1
            nll = nlls[row][:-1][trained]
            stats = TokenStats(-nll, entropies[row][:-1][trained], min(k, vocab))
            entropy.append(normalized_entropy(stats))
            prob.append((-nll).exp())
            mean_nll.append(nll.mean())
    stats = BaseStats(torch.cat(entropy), torch.cat(prob), torch.stack(mean_nll))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: vars(stats)[name].float().contiguous() for name in FIELDS}, partial, metadata={"key": key})
    partial.replace(path)
    return stats


def metrics_of(output: Any) -> dict[str, Any]:
    """The metrics dictionary of a worker's answer."""
    return tu.get(output, "metrics")


def _load(path: Path, key: str) -> BaseStats:
    with safe_open(path, framework="pt") as stored:
        found = (stored.metadata() or {}).get("key")
        if found != key:
            raise RunError(
                f"{path} was computed for another model, data set or chat template (key {found}, now {key}): "
                "stale; delete it, or use another output folder"
            )
        return BaseStats(**{name: stored.get_tensor(name) for name in FIELDS})
