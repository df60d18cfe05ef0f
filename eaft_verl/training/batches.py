"""Examples -> the TensorDicts verl's workers take. The order is a pure function of seed and epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from verl.utils import tensordict_utils as tu
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from eaft_verl.data.prepare import Example

PADDING = -1  # index of a row that only fills a batch: its loss mask is all zero


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Every example is seen in every epoch; the last batch may hold padding rows."""
    return -(-examples // batch_size)


def batch_indices(step: int, examples: int, batch_size: int, seed: int) -> list[int]:
    """Rows of optimizer step `step` (from 1), padded with PADDING to batch_size.

    A function of its arguments only, so that resuming needs no sampler state and any number of workers sees the same
    batches.
    """
    epoch, position = divmod(step - 1, steps_per_epoch(examples, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    chosen = order[position * batch_size : (position + 1) * batch_size].tolist()
    return chosen + [PADDING] * (batch_size - len(chosen))


def sequential_batches(examples: int, batch_size: int) -> Iterator[list[int]]:
    """All rows once, in order, the last batch padded: validation covers every row."""
    for start in range(0, examples, batch_size):
        chosen = list(range(start, min(start + batch_size, examples)))
        yield chosen + [PADDING] * (batch_size - len(chosen))


def balanced(indices: list[int], lengths: Sequence[int], ranks: int) -> list[int]:
    """The same rows, reordered so that each rank's contiguous part costs about the same."""
    if ranks == 1:
        return indices
    workload = calculate_workload(torch.tensor([lengths[index] for index in indices], dtype=torch.float32))
    parts = get_seqlen_balanced_partitions(workload, k_partitions=ranks, equal_size=True)
    return [indices[position] for part in parts for position in sorted(part)]


def make_batch(
    examples: Sequence[Example], indices: Sequence[int], flags: dict[str, Any], sample_weights: Sequence[float] | None
) -> TensorDict:
    """Packed batch: jagged input_ids, position_ids, loss_mask [B, j], and sample_weight [B], 1 where none is given."""
    filler = min(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    ids, masks, weights = [], [], []
    for index in indices:
        example = examples[filler if index == PADDING else index]
        ids.append(torch.tensor(example.input_ids, dtype=torch.int64))
        mask = torch.tensor(example.loss_mask, dtype=torch.int64)
        masks.append(torch.zeros_like(mask) if index == PADDING else mask)
        weights.append(1.0 if index == PADDING or sample_weights is None else sample_weights[index])
    tensors = {
        "input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
        "position_ids": torch.nested.as_nested_tensor([torch.arange(len(row)) for row in ids], layout=torch.jagged),
        "loss_mask": torch.nested.as_nested_tensor(masks, layout=torch.jagged),
    }
    tensors["sample_weight"] = torch.tensor(weights, dtype=torch.float32)
    batch = tu.get_tensordict(tensor_dict=tensors, non_tensor_dict=flags)
    # without the wrapper tensordict takes the list for one value per row
    tu.assign_non_tensor(batch, global_token_num=NonTensorData([len(row) for row in ids]))
    return batch
