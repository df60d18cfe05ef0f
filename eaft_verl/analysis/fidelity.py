"""Fig. 6 of arXiv 2601.02151: how well the top-K entropy stands in for the entropy over the vocabulary, and its price.

A store holds one K; other K need logits, rows of which `measure` takes from a pass.
"""

import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eaft_verl.analysis.blocks import Array, Block
from eaft_verl.tokens.logits import CHUNK_TOKENS, accumulator, topk_entropy

SIZES = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)
GRID = 40  # bins of each axis of the store's own picture
Row = dict[str, Any]


class Agreement:
    """Pearson correlation and error of pairs (top-K entropy, full entropy), from sums; nats."""

    def __init__(self) -> None:
        self._sums = np.zeros(6)  # of 1, x, y, x^2, y^2, x y: float64, about the first block's means
        self._origin: tuple[float, float] | None = None
        self._error, self._most, self._mass = 0.0, 0.0, 0.0

    def add(self, topk_T: Array, full_T: Array, mass_T: Array) -> None:
        """Count some tokens; mass_T: probability of the K together."""
        x_T, y_T = topk_T.astype(np.float64), full_T.astype(np.float64)
        self._error += float((y_T - x_T).sum())
        self._most = max(self._most, float(np.abs(y_T - x_T).max(initial=0.0)))
        self._mass += float(mass_T.sum(dtype=np.float64))
        if self._origin is None:
            self._origin = (float(x_T.mean()), float(y_T.mean()))
        x_T, y_T = x_T - self._origin[0], y_T - self._origin[1]
        self._sums += [len(x_T), x_T.sum(), y_T.sum(), x_T @ x_T, y_T @ y_T, x_T @ y_T]

    def result(self) -> Row:
        """pearson (None where one of them is constant), max_error, mean_error (full - top-K), mass: nats and shares."""
        n, x, y, xx, yy, xy = self._sums
        spread = (xx - x * x / n) * (yy - y * y / n)
        pearson = float((xy - x * y / n) / np.sqrt(spread)) if spread > 1e-18 * n * n else None
        means = {"mean_error": self._error / n, "mass": self._mass / n}
        return {"tokens": int(n), "pearson": pearson, "max_error": self._most, **means}


class StoredAgreement:
    """The agreement at the store's own K, with a histogram [GRID, GRID] of top-K against full entropy."""

    def __init__(self, k: int, vocab: int) -> None:
        self._k, self._high = k, float(np.log(vocab))
        self._agreement, self._hist = Agreement(), np.zeros(GRID * GRID, np.int64)

    def add(self, block: Block) -> None:
        """Count a block."""
        self._agreement.add(block["entropy"], block["full_entropy"], block["top_k_mass"])
        across, up = (np.clip(block[n] * (GRID / self._high), 0, GRID - 1).astype(np.int32) for n in _AXES)
        self._hist += np.bincount(across * GRID + up, minlength=len(self._hist))

    def result(self) -> Row:
        """`Agreement.result` with k and the histogram over [0, high]^2."""
        square = self._hist.reshape(GRID, GRID).tolist()
        return {"k": self._k, "high": self._high, "histogram": square, **self._agreement.result()}


_AXES = ("full_entropy", "entropy")


def measure(logits: Iterable[Tensor], sizes: Iterable[int] = SIZES) -> Row:
    """Agreement, time and memory of every K on rows of logits [T, V] from a pass; K above V is left out.

    microseconds: per token, of topk, softmax and entropy in chunks as training has them. bytes: per token of a chunk,
    that a K adds at its peak: on CUDA what the allocator says, elsewhere the tensors that are alive.
    """
    found: dict[int, tuple[Agreement, list[float]]] = {}
    vocab, device = 0, "cpu"
    for rows_TV in logits:
        for part_RV in rows_TV.detach().split(CHUNK_TOKENS):
            vocab, device = part_RV.shape[-1], part_RV.device.type
            _add_chunk(part_RV, [size for size in sizes if size <= vocab], found)
    rows = [
        {"k": size, "microseconds": cost[0] / cost[2] * 1e6, "bytes": cost[1], **agreement.result()}
        for size, (agreement, cost) in found.items()
    ]
    return {"vocab": vocab, "device": device, "rows": rows}


def _add_chunk(part_RV: Tensor, sizes: list[int], found: dict[int, tuple[Agreement, list[float]]]) -> None:
    prob_RV = part_RV.to(accumulator(part_RV)).softmax(dim=-1)
    full_R = torch.special.entr(prob_RV).sum(dim=-1).double().cpu().numpy()
    sorted_RV = prob_RV.topk(max(sizes, default=1), dim=-1).values.double().cumsum(dim=-1)
    for size in sizes:
        agreement, cost = found.setdefault(size, (Agreement(), [0.0, 0.0, 0.0]))
        entropy_R, seconds, peak = _timed(partial(_entropy, part_RV, size), part_RV.device)
        agreement.add(entropy_R.double().cpu().numpy(), full_R, sorted_RV[:, size - 1].cpu().numpy())
        cost[:] = [cost[0] + seconds, max(cost[1], peak / len(part_RV)), cost[2] + len(part_RV)]


def _entropy(part_RV: Tensor, size: int) -> Tensor:
    return topk_entropy(part_RV.topk(size, dim=-1).values.to(accumulator(part_RV)))


def _timed(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float, int]:
    """(what it gives, seconds, bytes at its peak beyond what was there); memory is taken in a run of its own."""
    if device.type != "cuda":
        with _Alive() as alive:
            run()
        started = time.perf_counter()
        return run(), time.perf_counter() - started, alive.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, started = torch.cuda.memory_allocated(device), time.perf_counter()
    result = run()
    torch.cuda.synchronize(device)
    return result, time.perf_counter() - started, torch.cuda.max_memory_allocated(device) - before


class _Alive(TorchDispatchMode):
    """Bytes of the tensors made inside that live at the same time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self._count(tensor.nbytes)
                weakref.finalize(tensor, self._count, -tensor.nbytes)
        return result

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
