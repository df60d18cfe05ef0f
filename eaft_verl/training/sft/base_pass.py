"""What the untrained model says of the prepared data: one forward pass, kept and reused by every arm that asks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from verl.utils import tensordict_utils as tu

from eaft_verl.data.parquet import Example
from eaft_verl.files import computed_once
from eaft_verl.objectives import normalized_entropy
from eaft_verl.tokens.stats import BaseStats, TokenStats
from eaft_verl.training.sft.batches import sequential_batches
from eaft_verl.training.sft.order import PADDING

FIELDS = ("entropy", "prob", "mean_nll")
FILE = "stats.safetensors"


def base_stats(
    folder: Path, key: str, examples: Sequence[Example], k: int, infer: Callable[[list[int]], Any], batch_size: int
) -> BaseStats:
    """The statistics in `folder`, or from a pass of `infer` (rows of a batch -> worker output) stored there.

    `key` names model, data and template; statistics made for another key are an error, never reused.
    """

    def make(empty: Path) -> None:
        stats = _pass(examples, k, infer, batch_size)
        save_file({name: vars(stats)[name].float().contiguous() for name in FIELDS}, empty / FILE)

    with safe_open(computed_once(folder, key, make) / FILE, framework="pt") as stored:
        return BaseStats(**{name: stored.get_tensor(name) for name in FIELDS})


def _pass(examples: Sequence[Example], k: int, infer: Callable[[list[int]], Any], batch_size: int) -> BaseStats:
    entropy, prob, mean_nll = [], [], []
    for indices in sequential_batches(len(examples), batch_size):
        output = infer(indices)
        nlls, entropies = output["nll"].unbind(), output["entropy"].unbind()
        vocab = int(output["vocab"].values()[0])
        for row, index in enumerate(indices):
            if index == PADDING:
                continue
            mask = np.array(examples[index].loss_mask, bool)
            trained = torch.from_numpy(mask[1:])  # position t predicts token t + 1
            nll = nlls[row][:-1][trained]
            stats = TokenStats(-nll, entropies[row][:-1][trained], min(k, vocab))
            entropy.append(normalized_entropy(stats))
            prob.append((-nll).exp())
            mean_nll.append(nll.mean())
    return BaseStats(torch.cat(entropy), torch.cat(prob), torch.stack(mean_nll))


def metrics_of(output: Any) -> dict[str, Any]:
    """The metrics dictionary of a worker's answer."""
    return tu.get(output, "metrics")
