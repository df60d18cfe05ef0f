"""Examples -> the TensorDicts verl's workers take."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from verl.utils import tensordict_utils as tu
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from eaft_verl.data.parquet import Example
from eaft_verl.training.sft.order import PADDING


def balanced(indices: list[int], lengths: Sequence[int] | Mapping[int, int], ranks: int) -> list[int]:
    """The same rows, reordered so that each rank's contiguous part costs about the same."""
    if ranks == 1:
        return indices
    workload = calculate_workload(torch.tensor([lengths[index] for index in indices], dtype=torch.float32))
    parts = get_seqlen_balanced_partitions(workload, k_partitions=ranks, equal_size=True)
    return [indices[position] for part in parts for position in sorted(part)]


class TokenSource(Protocol):
    """Something that knows more of each token than the data set does: the reference, an older policy."""

    def tokens(self, index: int) -> dict[str, torch.Tensor]:
        """Named tensors [length of the example, ...]; position t belongs to the prediction of token t + 1."""
        ...


def make_batch(
    examples: Sequence[Example],
    indices: Sequence[int],
    flags: dict[str, Any],
    sample_weights: Sequence[float] | None = None,
    sources: Sequence[TokenSource] = (),
) -> TensorDict:
    """Packed batch: jagged input_ids, position_ids, loss_mask [B, j], sample_weight [B], 1 where none is given, and
    row_weight [B], what the data says of each row.

    `sources` add jagged tensors [B, j, ...] of their own names.
    """
    real = [index for index in indices if index != PADDING] or range(len(examples))
    filler = min(real, key=lambda index: len(examples[index].input_ids)) if PADDING in indices else PADDING
    ids, masks, weights, row_weights, more = [], [], [], [], defaultdict(list)
    for index in indices:
        chosen = filler if index == PADDING else index
        example = examples[chosen]
        for source in sources:
            for name, tensor in source.tokens(chosen).items():
                more[name].append(tensor)
        ids.append(torch.from_numpy(np.array(example.input_ids, np.int64)))
        mask = torch.from_numpy(np.array(example.loss_mask, np.int64))
        masks.append(torch.zeros_like(mask) if index == PADDING else mask)
        row_weights.append(example.weight)
        weights.append(1.0 if index == PADDING or sample_weights is None else sample_weights[index])
    tensors = {
        "input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
        "position_ids": torch.nested.as_nested_tensor([torch.arange(len(row)) for row in ids], layout=torch.jagged),
        "loss_mask": torch.nested.as_nested_tensor(masks, layout=torch.jagged),
        **{name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in more.items()},
    }
    tensors["sample_weight"] = torch.tensor(weights, dtype=torch.float32)
    tensors["row_weight"] = torch.tensor(row_weights, dtype=torch.float32)
    batch = tu.get_tensordict(tensor_dict=tensors, non_tensor_dict=flags)
    # without the wrapper tensordict takes the list for one value per row
    tu.assign_non_tensor(batch, global_token_num=NonTensorData([len(row) for row in ids]))
    return batch
