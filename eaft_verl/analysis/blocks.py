"""A store as blocks of numpy columns, with what is derived from them once for all who look.

Dimension letters: T tokens of a block. A block is some hundred thousand rows; nothing here loops over tokens.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from eaft_verl.analysis.store import TokenStore
from eaft_verl.errors import DataError
from eaft_verl.objectives import normalized_entropy
from eaft_verl.tokens.stats import CONFLICT_PROB, HIGH_ENTROPY, LOW_ENTROPY, TokenStats

ROWS = 1 << 17
_HELD = 3  # blocks in memory beside the one being read
_ROOM = 0.02  # for rounding, of nats and of probabilities
CONFLICT, SETTLED, BRANCHING, OTHER = range(4)
REGIMES = ("conflict", "settled", "branching", "other")
SETTLED_PROB = 0.5  # entropy is low, and the label is what the model expects
Array = NDArray[Any]


class Block:
    """Rows of a store. `block[NAME]` is a numeric column, [T]; `texts`: {column: {text: code}}, growing as read."""

    def __init__(self, batch: pa.RecordBatch, k: int, texts: dict[str, dict[str, int]], place_T: Array) -> None:
        self._batch, self.k, self._texts = batch, k, texts
        self.place_T = place_T  # trained tokens that stand before this one in its turn

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def __getitem__(self, name: str) -> Array:
        return np.asarray(self._batch.column(name))

    @cached_property
    def stats(self) -> TokenStats:
        """What objectives read. Before the first update the old policy of `psft` is the model itself."""
        names = ("logprob", "entropy", "sum_p2", "full_entropy")
        logprob_T, entropy_T, sum_p2_T, full_T = (torch.from_numpy(self[name].copy()) for name in names)
        return TokenStats(logprob_T, entropy_T, self.k, sum_p2_T, old_logprob_T=logprob_T, full_entropy_T=full_T)

    @cached_property
    def prob_T(self) -> Array:
        """p(label)."""
        return np.exp(self["logprob"])

    @cached_property
    def normalized_T(self) -> Array:
        """Top-K entropy / ln K in [0, 1], as objectives see it."""
        entropy_T = torch.from_numpy(self["entropy"].copy())
        return normalized_entropy(TokenStats(entropy_T, entropy_T, self.k)).numpy()

    @cached_property
    def error_T(self) -> Array:
        """|d nll / d logits|_2 = sqrt(1 - 2 p + sum_v p_v^2), in [0, sqrt 2]: the gradient of plain SFT."""
        return np.sqrt(np.maximum(1.0 - 2.0 * self.prob_T + self["sum_p2"], 0.0))

    @cached_property
    def excess_T(self) -> Array:
        """-log p - H over the vocabulary, nats: zero on average where the model itself wrote the text."""
        return -self["logprob"] - self["full_entropy"]

    @cached_property
    def regime_T(self) -> Array:
        """Index into REGIMES; of the type that `bincount` takes as it is."""
        entropy_T, prob_T = self["entropy"], self.prob_T
        low_T = entropy_T <= LOW_ENTROPY
        regimes = {CONFLICT: low_T & (prob_T < CONFLICT_PROB), SETTLED: low_T & (prob_T >= SETTLED_PROB)}
        regimes[BRANCHING] = entropy_T >= HIGH_ENTROPY
        # no token is in two of them; sums of bytes are ten times as fast as assignments by a mask
        steps = [chosen_T.view(np.int8) * np.int8(regime - OTHER) for regime, chosen_T in regimes.items()]
        return (np.int8(OTHER) + sum(steps)).astype(np.intp)

    @cached_property
    def conflicts(self) -> Array:
        """Rows of the block that are confident conflicts."""
        return np.flatnonzero(self.regime_T == CONFLICT)

    def codes(self, name: str) -> Array:
        """Codes of a text column, the same over the whole store, [T]; a missing text is ''."""
        known = self._texts[name]
        column = self._batch.column(name)
        words = [word or "" for word in column.dictionary.to_pylist()] + [""]
        table = np.array([known.setdefault(word, len(known)) for word in words])
        return table[np.asarray(column.indices.fill_null(len(words) - 1))]


def blocks(store: TokenStore, columns: Sequence[str], texts: dict[str, dict[str, int]]) -> Iterator[Block]:
    """The whole store in order; `texts`: an empty dictionary for each text column that will be asked for.

    DataError names the row of a value that no distribution has, or says that the file is damaged.
    """
    k, allowed = candidates(store), _allowed(store)
    last = (-1, -2, 0)  # sample, position and place of the row before
    for batch in _ahead(store.batches(columns, ROWS)):
        _check(store, batch, allowed, last[0])
        place_T = np.zeros(0, np.int64)
        if "position" in columns and batch.num_rows:
            sample_T, position_T = np.asarray(batch.column("sample")), np.asarray(batch.column("position"))
            place_T = _places(sample_T, position_T, last)
            last = (int(sample_T[-1]), int(position_T[-1]), int(place_T[-1]))
        yield Block(batch, k, texts, place_T)


def spread(found: Iterable[Block], adds: Sequence[Callable[[Block], None]]) -> None:
    """Give every block to each of `adds`, in order, each in a thread of its own: numpy and torch let others run."""
    with ExitStack() as stack:
        lanes = [stack.enter_context(ThreadPoolExecutor(1)) for _ in adds]
        held: deque[list[Future[None]]] = deque()
        for block in found:
            held.append([lane.submit(add, block) for lane, add in zip(lanes, adds, strict=True)])
            if len(held) == _HELD:
                _wait(held.popleft())
        for waiting in held:
            _wait(waiting)


def _wait(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        future.result()


def _allowed(store: TokenStore) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each column, with room for the rounding of bfloat16."""
    vocab = int(store.meta["vocab"])
    shares = dict.fromkeys(("max_prob", "sum_p2", "top_k_mass"), (0.0, 1.0 + _ROOM))
    nats = {"entropy": (-_ROOM, np.log(candidates(store)) + _ROOM), "full_entropy": (-_ROOM, np.log(vocab) + _ROOM)}
    known = dict.fromkeys(("token", "argmax"), (0, vocab - 1))
    return {"logprob": (float(np.finfo(np.float32).min), _ROOM), **nats, **shares, **known}


def _check(store: TokenStore, batch: pa.RecordBatch, allowed: dict[str, tuple[float, float]], last: int) -> None:
    for name in batch.schema.names:
        if name not in allowed or not batch.num_rows:
            continue
        values_T, (low, high) = np.asarray(batch.column(name)), allowed[name]
        if low <= values_T.min() and values_T.max() <= high:  # NaN is neither
            continue
        row = int(np.flatnonzero(~((values_T >= low) & (values_T <= high)))[0])
        where = f"{store.path}: {name} is {values_T[row]}"
        if "sample" in batch.schema.names:
            where += f" for token {batch.column('token')[row]} of sample {batch.column('sample')[row]}"
        if np.isfinite(values_T[row]):
            raise DataError(
                f"{where}, allowed is {low:.4g} to {high:.4g}: delete the store and run `eaft analyze` again"
            )
        raise DataError(f"{where}; the model is broken, or masks a token that the data trains: look at both")
    if "sample" in batch.schema.names and batch.num_rows:
        sample_T = np.asarray(batch.column("sample"))
        if sample_T[0] < max(last, 0) or (np.diff(sample_T) < 0).any():
            raise DataError(
                f"{store.path}: its samples are not in order: delete the store and run `eaft analyze` again"
            )


def _ahead(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same batches, the next one being read while the last one is worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


def candidates(store: TokenStore) -> int:
    """The K of the store's entropies: at most the vocabulary."""
    return min(int(store.meta["k"]), int(store.meta["vocab"]))


def _places(sample_T: Array, position_T: Array, last: tuple[int, int, int]) -> Array:
    """Place of each token in its run of neighbouring trained positions, a turn, carried over from the block before."""
    before_T = np.concatenate([[last[0]], sample_T[:-1]])
    new_T = (sample_T != before_T) | (position_T != np.concatenate([[last[1]], position_T[:-1]]) + 1)
    starts = np.flatnonzero(new_T)
    first = np.concatenate([[-last[2] - 1], starts])  # of the run that each token is in; the first began before
    return np.arange(len(sample_T)) - np.repeat(first, np.diff(np.concatenate([[0], starts, [len(sample_T)]])))
