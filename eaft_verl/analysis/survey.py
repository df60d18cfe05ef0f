"""The first pass over a store: quantiles, samples and repeated conflicts, which the second pass builds on.

Memory: 4 MB per sketch, 33 bytes per sample, 16 bytes per entry of the vocabulary; nothing grows with the rows.
Dimension letters: T tokens of a block, S samples, V vocabulary.
"""

import math
from functools import cached_property

import numpy as np
import torch

from eaft_verl.analysis.blocks import Array, Block, blocks, spread
from eaft_verl.analysis.store import TokenStore
from eaft_verl.tokens.stats import BaseStats

COLUMNS = ("sample", "token", "logprob", "entropy", "full_entropy")
SURPRISING = 1.0  # nats above the model's own entropy
LEAST = 5  # trained tokens of a sample that is judged as a whole
REPEATED_SHARE, REPEATED_LEAST = 0.02, 3  # samples in which a label is a conflict, for it to count as repeated
_SHIFT = 12  # bits of a float32 that a bin leaves out: 11 of the mantissa stay


class Sketch:
    """Counts of non-negative float32 values, whose order is that of their bits, in bins of relative width 2^-11."""

    def __init__(self) -> None:
        self.counts = np.zeros(1 << (31 - _SHIFT), np.int64)

    def add(self, values: Array) -> None:
        """Count the values; negative ones, which only rounding makes, are zeros."""
        bits = np.maximum(values, np.float32(0)).astype(np.float32).view(np.int32) >> _SHIFT
        found = np.bincount(bits)
        self.counts[: len(found)] += found

    def quantile(self, q: float) -> float:
        """Linear-interpolated quantile, low by at most 1 / 2048 of its value: what `BaseStats.quantile` says."""
        position = q * (int(self.counts.sum()) - 1)
        low = math.floor(position)
        first, second = np.searchsorted(np.cumsum(self.counts), [low, math.ceil(position)], side="right")
        left, right = (np.array([first, second], np.int32) << _SHIFT).view(np.float32).astype(float)
        return float(left + (position - low) * (right - left))


class _SketchedStats(BaseStats):
    """BaseStats whose token quantiles come from sketches; the tokens themselves are not in memory."""

    def __init__(self, survey: "Survey") -> None:
        empty = torch.empty(0)
        super().__init__(empty, empty, torch.from_numpy(survey.mean_nll_S[survey.tokens_S > 0]))
        vars(self)["sketches"] = {"entropy": survey.entropy, "prob": survey.prob}

    def quantile(self, name: str, q: float) -> float:
        """Of a field, as its parent has it."""
        sketch: Sketch | None = vars(self)["sketches"].get(name)
        return super().quantile(name, q) if sketch is None else sketch.quantile(q)


class Survey:
    """What the first pass finds; `tokens_S`, `nll_S`, ...: sums over the trained tokens of each sample."""

    def __init__(self, store: TokenStore) -> None:
        self.entropy, self.prob, self.vocab = Sketch(), Sketch(), int(store.meta["vocab"])
        self._sums_4S = np.zeros((4, int(store.meta["samples"])))
        self.seen_V = np.zeros(self.vocab, np.int64)  # samples in which the label is a conflict
        self.last_token = -1  # the largest number of a label
        spread(blocks(store, COLUMNS, {}), [self._add_quantiles, self._add_samples])

    def _add_quantiles(self, block: Block) -> None:
        self.entropy.add(block.normalized_T)
        self.prob.add(block.prob_T)

    def _add_samples(self, block: Block) -> None:
        sample_T = block["sample"]
        first, last = int(sample_T[0]), int(sample_T[-1])
        if (missing := last + 1 - self._sums_4S.shape[1]) > 0:
            self._sums_4S = np.pad(self._sums_4S, ((0, 0), (0, max(missing, last // 2))))
        surprising_T, conflict_T = block.excess_T > SURPRISING, np.zeros(len(block), bool)
        conflict_T[block.conflicts] = True
        place_T = (sample_T - first).astype(np.intp)
        for row, weight_T in enumerate((None, -block["logprob"], surprising_T, conflict_T)):
            self._sums_4S[row, first : last + 1] += np.bincount(place_T, weight_T)
        self.last_token = max(self.last_token, int(block["token"].max()))
        pairs = np.sort(sample_T[block.conflicts].astype(np.int64) * self.vocab + block["token"][block.conflicts])
        pairs = pairs[np.flatnonzero(np.diff(pairs, prepend=-1))]  # np.unique hashes, which takes ten times as long
        self.seen_V += np.bincount(pairs % self.vocab, minlength=self.vocab)

    @property
    def tokens_S(self) -> Array:
        """Trained tokens; 0 for a sample that is not in the store."""
        return self._sums_4S[0]

    @property
    def conflicts_S(self) -> Array:
        """Confident conflicts."""
        return self._sums_4S[3]

    @cached_property
    def numbers(self) -> Array:
        """Samples with a trained token, ascending."""
        return np.flatnonzero(self.tokens_S > 0)

    @property
    def samples(self) -> int:
        """How many."""
        return len(self.numbers)

    @cached_property
    def mean_nll_S(self) -> Array:
        """Mean of -log p(label), nats; 0 for a sample that is not in the store."""
        return self._sums_4S[1] / np.maximum(self.tokens_S, 1)

    @cached_property
    def implausible_S(self) -> Array:
        """Samples most of whose tokens cost over SURPRISING nats more than the model's entropy there: noise.

        A model's own text costs its entropy on average, whatever the model; a clash of formats hits few tokens. An
        answer of fewer than LEAST tokens is a fact or a choice as easily as noise, and is none.
        """
        return (self._sums_4S[2] > 0.5 * self.tokens_S) & (self.tokens_S >= LEAST)

    @property
    def often(self) -> float:
        """How many samples something happens in that counts as repeated."""
        return max(REPEATED_LEAST, REPEATED_SHARE * self.samples)

    @cached_property
    def repeated_V(self) -> Array:
        """Labels that are a conflict in REPEATED_SHARE of the samples or more: a habit of the data."""
        return self.seen_V >= self.often

    @property
    def tau(self) -> float:
        """Median over the samples of their mean loss, nats: what `talr` takes over a batch."""
        return float(np.median(self.mean_nll_S[self.numbers]))

    @cached_property
    def base(self) -> BaseStats:
        """For objectives that ask for the base model; `mean_nll` is of the samples in the store, in order."""
        return _SketchedStats(self)
