"""Top-K log-probabilities of the frozen reference over the prepared data: one forward pass, kept for every arm.

Data and reference never change, so a run of ten epochs, another coefficient or another gate need no second pass and no
second model. FOLDER/{ids,logprob,tail}.npy hold the trained tokens in the order of the data set, read by memory map;
FOLDER/meta.json names model, data and template.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from eaft_verl.data.parquet import Example, trained_of
from eaft_verl.errors import RunError
from eaft_verl.files import computed_once, seconds_to_compute
from eaft_verl.tokens.reference_kl import TopReference, top_reference
from eaft_verl.training.sft.loss import LogitsHook
from eaft_verl.training.sft.order import PADDING, sequential_batches

FIELDS = {"ids": np.int32, "logprob": np.float32, "tail": np.float32}
_SHIFT = 32  # the engine's hook gives back one number per token: token id above, bits of a float32 below


class EmitTop(LogitsHook):
    """Given to the workers in place of a loss: the K best tokens of each position, packed into K integers."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def _loss(self, model_output: dict[str, Tensor], data: TensorDict) -> Tensor:
        return torch.zeros(())

    def _statistics(self, logits_TV: Tensor, data: TensorDict) -> dict[str, Tensor]:
        if self.reference is not None:
            logits_TV = self.reference(data)
        top = top_reference(logits_TV, self.k)
        bits_TK = top.logprob_TK.float().contiguous().view(torch.int32).long() & 0xFFFFFFFF
        packed_TK = (top.ids_TK.long() << _SHIFT) | bits_TK
        named = {f"top_{rank:04d}": column[None] for rank, column in enumerate(packed_TK.unbind(-1))}
        return named | {"tail": top.tail_T.float()[None]}


class ReferenceCache:
    """The stored reference; `tokens(index)` gives an example's part of it as the anchor wants it."""

    def __init__(self, folder: Path, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in FIELDS}
        self.starts = token_starts(examples)
        for name, array in self.arrays.items():
            if len(array) != self.starts[-1]:
                raise RunError(
                    f"{folder / name}.npy holds {len(array)} tokens, the data {self.starts[-1]}; delete {folder}"
                )
        self.seconds = seconds_to_compute(folder)
        self.bytes = sum((folder / f"{name}.npy").stat().st_size for name in FIELDS)

    def tokens(self, index: int) -> dict[str, Tensor]:
        """anchor_ids, anchor_logprob [length, K] and anchor_tail [length]; zero where nothing is trained."""
        trained = trained_positions(self.examples[index])
        found = {}
        for name, array in self.arrays.items():
            whole = np.zeros((len(trained), *array.shape[1:]), array.dtype)
            whole[trained] = array[self.starts[index] : self.starts[index + 1]]
            found[f"anchor_{name}"] = torch.from_numpy(whole)
        return found


def reference_cache(
    folder: Path, key: str, examples: Sequence[Example], k: int, infer: Callable[[list[int]], Any], batch_size: int
) -> ReferenceCache:
    """The cache in `folder`, or from a pass of `infer` (rows of a batch -> worker output of EmitTop) stored there.

    `key` names model, data and template; a cache made for another key is an error, never reused.
    """
    made = computed_once(folder, key, lambda empty: _fill(empty, examples, k, infer, batch_size))
    return ReferenceCache(made, examples)


def _fill(
    folder: Path, examples: Sequence[Example], k: int, infer: Callable[[list[int]], Any], batch_size: int
) -> None:
    starts = token_starts(examples)
    arrays: dict[str, np.memmap] = {}
    for indices in sequential_batches(len(examples), batch_size):
        output = infer(indices)
        columns = sorted(name for name in output.keys() if name.startswith("top_"))  # noqa: SIM118 - a TensorDict
        if not arrays:
            total = int(starts[-1])
            shapes = {"ids": (total, len(columns)), "logprob": (total, len(columns)), "tail": (total,)}
            arrays = {
                name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shapes[name])
                for name, dtype in FIELDS.items()
            }
        rows = zip(*(output[name].unbind() for name in columns), strict=True)
        for index, row, tail in zip(indices, rows, output["tail"].unbind(), strict=True):
            if index == PADDING:
                continue
            trained, where = trained_positions(examples[index]), slice(starts[index], starts[index + 1])
            top = unpack(torch.stack(row, dim=-1)[trained], tail[trained])
            for name, values in zip(arrays, top, strict=True):
                arrays[name][where] = values.numpy()
    for array in arrays.values():
        array.flush()


def unpack(packed_TK: Tensor, tail_T: Tensor) -> TopReference:
    """What EmitTop packed: ids int64, ln r float32."""
    bits_TK = (packed_TK & 0xFFFFFFFF).to(torch.int64)
    signed_TK = torch.where(bits_TK >= 1 << 31, bits_TK - (1 << 32), bits_TK).to(torch.int32)
    return TopReference(packed_TK >> _SHIFT, signed_TK.view(torch.float32), tail_T)


def trained_positions(example: Example) -> np.ndarray:
    """[length] bool: positions whose prediction is trained; the last one predicts nothing."""
    return np.append(np.array(example.loss_mask, bool)[1:], False)


def token_starts(examples: Sequence[Example]) -> np.ndarray:
    """[examples + 1]: where each example's trained tokens begin."""
    return np.concatenate([[0], np.cumsum(trained_of(examples))])
