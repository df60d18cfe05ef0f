"""A forward pass that only looks: what the model says of every trained token, by the engine that trains it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from eaft_verl.data.parquet import Example
from eaft_verl.tokens.head import Head, head_distribution
from eaft_verl.tokens.logits import Distribution, distribution_stats
from eaft_verl.training.sft.loss import LogitsHook, channels, is_packed, local_shard, shifted
from eaft_verl.training.sft.order import PADDING

Infer = Callable[[list[int]], Any]  # rows of a batch -> the workers' answer, with a tensor per token
FIELDS = ("logprob", "entropy", "full_entropy", "max_prob", "sum_p2", "top_k_mass", "argmax")


class EmitDistribution(LogitsHook):
    """Given to the workers in place of a loss: FIELDS of every trained token."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def reads_statistics(self, data: TensorDict) -> bool:
        """It is packed."""
        return is_packed(data)

    def channels(self, hidden_TD: Tensor, head: Head, data: TensorDict) -> Tensor:
        """[T, 8]: the fields of Distribution, and the size of the vocabulary; float32 holds a token below 2^24."""
        labels_T, mask_T = (local_shard(part, data) for part in shifted(data))
        return channels(head_distribution(hidden_TD, head, labels_T, mask_T, k=self.k), self.vocab)

    def _statistics(self, logits_TV: Tensor, data: TensorDict) -> dict[str, Tensor]:
        if self.fused:
            found = Distribution(*self.unchanged(logits_TV))
        else:
            labels_T, mask_T = (local_shard(part, data) for part in shifted(data))
            found = distribution_stats(logits_TV, labels_T, mask_T, k=self.k)
        values = (-found.nll_T, *found[1:])
        return {name: value_T[None] for name, value_T in zip(FIELDS, values, strict=True)}

    def _loss(self, model_output: dict[str, Tensor], data: TensorDict) -> Tensor:
        return torch.zeros(())


def statistics_of(examples: Sequence[Example], indices: Sequence[int], output: Any) -> dict[str, NDArray[Any]]:
    """{sample, position, token, *FIELDS}, each [tokens], of the trained tokens of these rows; `output`: an Infer's."""
    values = {name: output[name].unbind() for name in FIELDS}
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("sample", "position", "token", *FIELDS)}
    for row, index in enumerate(indices):
        if index == PADDING:
            continue
        position = np.flatnonzero(np.asarray(examples[index].loss_mask, bool)[1:])  # predicts the token after it
        columns["sample"].append(np.full(len(position), index, np.int32))
        columns["position"].append((position + 1).astype(np.int32))
        columns["token"].append(np.asarray(examples[index].input_ids, np.int32)[position + 1])
        for name in FIELDS:
            columns[name].append(values[name][row].numpy()[position])
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def metrics_of(output: Any) -> dict[str, Any]:
    """The metrics dictionary of a worker's answer."""
    return tu.get(output, "metrics")
