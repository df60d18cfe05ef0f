"""Which rows a step trains on: a pure function of seed and epoch. Imports no engine."""

import functools
from collections.abc import Iterator

import numpy as np

PADDING = -1  # index of a row that only fills a batch: its loss mask is all zero


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Every example is seen in every epoch; the last batch may hold padding rows."""
    return -(-examples // batch_size)


def sequential_batches(examples: int, batch_size: int) -> Iterator[list[int]]:
    """All rows once, in order, the last batch padded: validation covers every row."""
    for start in range(0, examples, batch_size):
        chosen = list(range(start, min(start + batch_size, examples)))
        yield chosen + [PADDING] * (batch_size - len(chosen))


def batch_indices(step: int, examples: int, batch_size: int, seed: int) -> list[int]:
    """Rows of optimizer step `step` (from 1), padded with PADDING to batch_size.

    A function of its arguments only, so that resuming needs no sampler state and any number of workers sees the same
    batches.
    """
    epoch, position = divmod(step - 1, steps_per_epoch(examples, batch_size))
    chosen = _order(examples, seed, epoch)[position * batch_size : (position + 1) * batch_size].tolist()
    return chosen + [PADDING] * (batch_size - len(chosen))


@functools.lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)
