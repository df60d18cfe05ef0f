"""All rows of a data set through the taker, on all cores, and what must be known of the others: duplicates and ids.

Memory is flat: rows are read, taken and spilled to disk in chunks. What stays of a row is a line of numbers, its hash
and, if it was rejected, the reason.
"""

import gc
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
from numpy.typing import NDArray

from eaft_verl.boundary import begin_worker, stops_held
from eaft_verl.data.accept import Chunk, RawRow, Taken, Taker
from eaft_verl.data.leakage import Hit
from eaft_verl.data.mixture import choose
from eaft_verl.data.parquet import SCHEMA, temporary_beside, trained_tokens
from eaft_verl.data.sources import count_rows, iter_rows
from eaft_verl.data.spec import DataSpec, RowError
from eaft_verl.errors import DataError

CHUNK = 128  # rows that a process takes at a time
_ALONE = 2048  # rows up to which one process is faster than several
_NUMBER_BITS = 48  # of a row's place as one number, which takes a third of a pair's memory
_LINE = np.dtype(
    [
        ("source", "i4"),
        ("digest", "u8"),
        *((key, "i4") for key in ("examples", "truncated", "open", "escaped", "left", "ends")),
    ]
)


@dataclass
class Outcome:
    """What became of all rows. `kept_N`: a line for each that has examples, of _LINE; `chosen_N`: in the mixture."""

    spec: DataSpec
    spill: Path
    read: Counter[int] = field(default_factory=Counter)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    kinds: dict[tuple[str, ...], int] = field(default_factory=dict)  # what ends a row's turns: number in kept_N
    leaks: list[tuple[str, set[Hit]]] = field(default_factory=list)
    kept_N: NDArray[Any] = field(default_factory=lambda: np.zeros(0, _LINE))
    tokens_E: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 2), np.int32))

    def __post_init__(self) -> None:
        self.chosen_N = np.zeros(0, bool)

    @property
    def chosen_E(self) -> NDArray[np.bool_]:
        """Whether each spilled example is in the mixture."""
        return np.repeat(self.chosen_N, self.kept_N["examples"])

    @property
    def ends(self) -> Counter[str]:
        """How often each token ends the turns of an example in the mixture."""
        found, kinds_N = Counter[str](), self.kept_N["ends"][self.chosen_N]
        for ends, kind in self.kinds.items():
            rows = int((kinds_N == kind).sum())
            found.update({end: ends.count(end) * rows for end in ends} if rows else {})
        return found

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The examples of the mixture, read from the spill."""
        chosen_E, start = self.chosen_E, 0
        with pa.OSFile(str(self.spill)) as stream:  # the pages of a map would be this process's memory, all of them
            for batch in ipc.open_stream(stream):
                mask = chosen_E[start : start + len(batch)]
                start += len(batch)
                yield _only(batch, mask)


def _only(batch: pa.RecordBatch, chosen_E: NDArray[np.bool_]) -> pa.RecordBatch:
    """The chosen examples. Nearly all are: runs of them are copied whole, in a fraction of the time of `filter`."""
    if chosen_E.all():
        return batch
    borders = np.flatnonzero(np.diff(chosen_E, prepend=False, append=False)).reshape(-1, 2).tolist()
    return pa.concat_batches([batch.slice(start, end - start) for start, end in borders] or [batch.slice(0, 0)])


@contextmanager
def take_all(taker: Taker, out: Path) -> Iterator[Outcome]:
    """What became of the rows of the taker's sources; their examples are on disk beside `out` until the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(out) as spill:
        outcome = Outcome(taker.spec, spill)
        merge = _Merge(taker, outcome)
        with ipc.new_stream(str(spill), SCHEMA) as stream:
            for chunk in _chunks(taker, outcome):
                for batch in merge(chunk):
                    stream.write_batch(batch)
        merge.close()
        if len(outcome.kept_N) and not outcome.refused:
            rows = outcome.kept_N
            outcome.chosen_N = choose(taker.spec.sources, rows["source"], rows["digest"])
        yield outcome


class _Merge:
    """Chunks in order into the outcome: what a row cannot know, that another one says the same or has the same id."""

    def __init__(self, taker: Taker, outcome: Outcome) -> None:
        spec, against = taker.spec, taker.against
        policies = (
            ("over_long", spec.over_long),
            ("control_token", spec.control_tokens),
            ("leakage", against.policy if against else None),
        )
        self.aborting = {"template", *(kind for kind, policy in policies if policy == "error")}
        self.against, self.outcome, self.spec = against, outcome, spec
        self.first: dict[int, int] = {}  # place of the first row that says this
        self.ids: set[int] = set()
        self.lines: list[NDArray[Any]] = []
        self.tokens: list[NDArray[np.int32]] = []

    def __call__(self, chunk: Chunk) -> Iterator[pa.RecordBatch]:
        """The chunk's examples that are kept, with their ids."""
        names: list[str] = []
        keep: list[bool] = []
        lines = []
        for taken in chunk.rows:
            kept = self._keep(taken)
            keep += [kept] * taken.examples
            if kept:
                names += self._names(taken)
                numbers = (taken.examples, taken.truncated, taken.open_turns, taken.escaped, taken.left_turns)
                kind = self.outcome.kinds.setdefault(taken.ends, len(self.outcome.kinds))
                lines.append((taken.source, int(taken.digest[:16], 16), *numbers, kind))
        self.outcome.unused.update(chunk.unused)
        if not names:
            return
        batch = _only(chunk.batch, np.array(keep))
        self.lines.append(np.array(lines, _LINE))
        lengths = np.diff(np.asarray(batch.column("input_ids").offsets))
        self.tokens.append(np.stack([lengths, trained_tokens(batch)], axis=1).astype(np.int32))
        yield batch.set_column(0, "id", pa.array(names, pa.string()))

    def close(self) -> None:
        """All numbers in one piece."""
        self.outcome.kept_N = np.concatenate([self.outcome.kept_N, *self.lines])
        self.outcome.tokens_E = np.concatenate([self.outcome.tokens_E, *self.tokens])

    def _keep(self, taken: Taken) -> bool:
        self.outcome.read[taken.source] += 1
        try:
            self._check(taken)
        except RowError as error:
            source = self.spec.sources[taken.source].name
            entry = {"row": taken.number, "kind": error.kind, "reason": str(error)}
            entry |= {"source": source} if source else {}
            (self.outcome.refused if error.kind in self.aborting else self.outcome.rejected).append(entry)
            return False
        return True

    def _check(self, taken: Taken) -> None:
        """RowError if the row is not kept."""
        if taken.digest:
            place = taken.source << _NUMBER_BITS | taken.number
            first = self.first.setdefault(int(taken.digest[:16], 16), place)
            if first != place:
                source, number = first >> _NUMBER_BITS, first & ((1 << _NUMBER_BITS) - 1)
                other = f" of {self.spec.sources[source].name}" if source != taken.source else ""
                raise RowError("duplicate", f"duplicate of row {number}{other}")
        if taken.fault:
            raise RowError(*taken.fault)
        if self.against and taken.hits:
            self.outcome.leaks.append((self._free_name(taken), taken.hits))
            if self.against.policy != "warn":
                raise RowError("leakage", self.against.describe(taken.hits))

    def _free_name(self, taken: Taken) -> str:
        """The row's id; the beginning of its digest where another row has that id, as samples are matched by it."""
        return taken.digest[:16] if hash(taken.name) in self.ids else taken.name

    def _names(self, taken: Taken) -> list[str]:
        """Ids of the row's examples."""
        name = self._free_name(taken)
        self.ids.add(hash(name))
        return [name] if taken.examples == 1 else [f"{name}#{ordinal}" for ordinal in range(taken.examples)]


def _chunks(taker: Taker, outcome: Outcome) -> Iterator[Chunk]:
    """All rows, taken in chunks on all cores, with a bar once there are many."""
    rows = _raw_rows(taker.spec)
    head = list(islice(rows, _ALONE))
    workers = len(os.sched_getaffinity(0)) if len(head) == _ALONE else 1
    chunks = _in_chunks(chain(head, rows))
    if workers == 1:
        yield from map(taker, chunks)
        return
    from tqdm import tqdm

    if taker.against:
        taker.against.find([])  # its index is built once, before processes share it
    counts = [count_rows(source.source, source.rows) for source in taker.spec.sources]
    total = None if None in counts else sum(count or 0 for count in counts)
    terminal = sys.stderr.isatty()
    with tqdm(total=total, desc="prepare", unit=" rows", mininterval=0.2 if terminal else 30) as bar:
        for chunk in in_order(taker, chunks, workers):
            bar.update(len(chunk.rows))
            yield chunk


def in_order(
    function: Callable[[list[RawRow]], Chunk], chunks: Iterable[list[RawRow]], workers: int
) -> Iterator[Chunk]:
    """`map` in so many processes, results in order, only a few chunks under way.

    Processes are forked: they start at once and share the tokenizer and the questions; they start no threads.
    """
    global _TASK
    _TASK, waiting = function, deque[Future[Chunk]]()
    gc.freeze()  # what is there now is never looked through again, and its pages stay shared
    pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=begin_worker)
    try:
        for chunk in chunks:
            with stops_held():  # it may fork
                waiting.append(pool.submit(_run_task, chunk))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("a process that takes rows was killed (out of memory?); free memory, then repeat") from None
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()
        _TASK = None


_TASK: Callable[[list[RawRow]], Chunk] | None = None


def _run_task(chunk: list[RawRow]) -> Chunk:
    assert _TASK is not None
    return _TASK(chunk)


def _raw_rows(spec: DataSpec) -> Iterator[RawRow]:
    for index, source in enumerate(spec.sources):
        for number, row in enumerate(islice(iter_rows(source.source), source.rows), 1):
            yield index, number, row


def _in_chunks(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk
