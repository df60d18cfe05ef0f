"""Examples in and out of the parquet file that verl reads; `memory_map.py` opens it.

Columns: id, messages (list of {role, content, ...}), input_ids, loss_mask, and, where any example has them, answer,
tools and chat_template_kwargs (JSON), weight and source; tool_calls within messages are JSON.
"""

import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eaft_verl.data.memory_map import keep_map, map_of
from eaft_verl.files import digest_of, temporary_beside

_TURN = pa.struct(
    [
        *((key, pa.string()) for key in ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")),
        ("train", pa.bool_()),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(_TURN)),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.int8())),
        *((key, pa.string()) for key in ("answer", "tools", "chat_template_kwargs")),
        ("weight", pa.float32()),
        ("source", pa.string()),
    ]
)
_JSON_COLUMNS = ("tools", "chat_template_kwargs")
_ALWAYS = ("id", "messages", "input_ids", "loss_mask", "role", "content")
_GROUP = 4096  # rows of a row group


@dataclass
class Example:
    """One training example. input_ids, loss_mask: [T]; loss_mask is 1 where the token is trained, 0 at the first.

    weight: of the example in the loss. source: its part of a mixture. chat_template_kwargs: what it was rendered with.
    """

    id: str
    messages: list[dict[str, Any]]
    input_ids: Sequence[int]
    loss_mask: Sequence[int]
    answer: str | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    weight: float = 1.0
    source: str | None = None


class Examples(Sequence[Example]):
    """The examples of a prepared file, read from a memory map; tokens are arrays of machine integers, never lists."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._batches = table.to_batches()
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return _example(self._batches[number], place - int(self._starts[number]))

    def conversations(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(id, messages) of each example, without reading its tokens."""
        for batch in self.table.select(["id", "messages"]).to_batches(_GROUP):
            yield from ((row["id"], list(map(_unpack, row["messages"]))) for row in batch.to_pylist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Examples):
            return self.table.equals(other.table)
        return isinstance(other, list) and list(map(_comparable, self)) == list(map(_comparable, other))

    __hash__ = None  # type: ignore[assignment]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, [N]."""
        return self._each(lambda batch: np.diff(batch.column("input_ids").offsets))

    @property
    def trained(self) -> NDArray[np.int64]:
        """Trained tokens of each example, [N]."""
        return self._each(trained_tokens)

    @property
    def weights(self) -> NDArray[np.float64] | None:
        """Weight of each example in the loss, [N]; None where all are 1."""
        if "weight" not in self.table.column_names:
            return None
        return self.table.column("weight").fill_null(1.0).to_numpy().astype(np.float64)

    def _each(self, count: Callable[[pa.RecordBatch], NDArray[Any]]) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(0, np.int64), *(count(batch) for batch in self._batches)]).astype(np.int64)


def _comparable(example: Example) -> Example:
    """With lists for numbers, whatever they were kept in."""
    return replace(example, input_ids=list(example.input_ids), loss_mask=list(map(int, example.loss_mask)))


def trained_tokens(batch: pa.RecordBatch) -> NDArray[Any]:
    """Ones in each list of the mask: differences of its running sum at the borders."""
    column = batch.column("loss_mask")
    offsets = np.asarray(column.offsets)
    running = np.concatenate([[0], np.cumsum(np.asarray(column.values)[: offsets[-1]], dtype=np.int64)])
    return np.diff(running[offsets])


def _example(batch: pa.RecordBatch, row: int) -> Example:
    def tokens(name: str, code: str) -> "array[int]":
        column = batch.column(name)
        start, end = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
        return array(code, np.asarray(column.values)[start:end].tobytes())

    rest = {name: batch.column(name)[row].as_py() for name in batch.schema.names if name not in _ALWAYS}
    for name in _JSON_COLUMNS:
        rest[name] = json.loads(rest[name]) if rest.get(name) else None
    return Example(
        id=batch.column("id")[row].as_py(),
        messages=[_unpack(message) for message in batch.column("messages")[row].as_py()],
        input_ids=tokens("input_ids", "i"),
        loss_mask=tokens("loss_mask", "b"),
        **{name: value for name, value in rest.items() if value is not None},
    )


def to_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """The examples as a record batch of SCHEMA."""
    columns: dict[str, pa.Array] = {
        "id": pa.array([one.id for one in examples], pa.string()),
        "messages": pa.array([[_pack(m) for m in one.messages] for one in examples], pa.list_(_TURN)),
        "input_ids": _lists([one.input_ids for one in examples], np.int32),
        "loss_mask": _lists([one.loss_mask for one in examples], np.int8),
        "answer": pa.array([one.answer for one in examples], pa.string()),
        "weight": pa.array([None if one.weight == 1 else one.weight for one in examples], pa.float32()),
        "source": pa.array([one.source for one in examples], pa.string()),
    }
    for name in _JSON_COLUMNS:
        values = [vars(one)[name] for one in examples]
        columns[name] = pa.array([json.dumps(v, ensure_ascii=False) if v else None for v in values], pa.string())
    return pa.record_batch([columns[name] for name in SCHEMA.names], schema=SCHEMA)


_Batches = Callable[[], Iterable[pa.RecordBatch]]


def write_batches(path: Path, batches: _Batches, announce: Callable[[str], object] = str) -> str:
    """Write NAME.parquet in one move, and its memory map; its sha256, of which `announce` is told before it is named.

    batches: of SCHEMA, called twice, because columns that no example fills are left out of the file.
    """
    filled = set(_ALWAYS)
    for batch in batches():
        filled |= _filled(batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary, temporary_beside(path) as map_beside:
        groups = (_pruned(group, filled) for group in _grouped(batches()))
        first = next(groups, None) or _pruned(to_batch([]), filled)
        with (
            pq.ParquetWriter(temporary, first.schema, compression="zstd") as writer,
            ipc.new_file(str(map_beside), first.schema) as table,
            ThreadPoolExecutor(2) as threads,  # Arrow compresses on one core
        ):
            for group in itertools.chain([first], groups):
                for task in [threads.submit(write, group) for write in (writer.write_batch, table.write_batch)]:
                    task.result()
        os.chmod(temporary, 0o644)
        key = file_hash(temporary)
        announce(key)
        os.replace(temporary, path)
        keep_map(map_beside, path.stem, key)
    return key


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write a few examples that are in memory; see write_batches."""
    write_batches(path, lambda: [to_batch(examples)])


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Tokens of each example, [N]; of prepared ones without reading them."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([len(example.input_ids) for example in examples], np.int64)


def trained_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Tokens of each example with loss, [N], the first never; of prepared ones without reading them."""
    if isinstance(examples, Examples):
        return examples.trained
    return np.array([sum(example.loss_mask[1:]) for example in examples], np.int64)


def read_examples(path: Path, key: str | None = None) -> Examples:
    """The examples of a file that write_batches wrote, in order, by memory map. key: the file's sha256, if known."""
    return Examples(ipc.open_file(pa.memory_map(str(map_of(path, key or file_hash(path))))).read_all())


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    return digest_of(path, hashlib.sha256())


def _grouped(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of a row group."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= _GROUP:
            yield pa.concat_batches(waiting)
            waiting = []
    if waiting:
        yield pa.concat_batches(waiting)


def _filled(batch: pa.RecordBatch) -> set[str]:
    """Columns, and fields of messages, that hold something."""
    turns = batch.column("messages").flatten()
    fields = {field.name: turns.field(field.name) for field in _TURN}
    columns = {name: batch.column(name) for name in batch.schema.names}
    return {name for name, column in (fields | columns).items() if column.null_count < len(column)}


def _pruned(batch: pa.RecordBatch, filled: set[str]) -> pa.RecordBatch:
    """The batch without columns and fields of messages that are not `filled`."""
    names = [name for name in batch.schema.names if name in filled]
    columns = {name: batch.column(name) for name in names}
    messages = columns["messages"]
    turns, fields = messages.flatten(), [field for field in _TURN if field.name in filled]
    kept = pa.StructArray.from_arrays([turns.field(field.name) for field in fields], fields=fields)
    offsets = np.asarray(messages.offsets)
    columns["messages"] = pa.ListArray.from_arrays(pa.array(offsets - offsets[0], pa.int32()), kept)
    return pa.record_batch(list(columns.values()), names=names)


def _lists(rows: Sequence[Any], kind: Any) -> pa.ListArray:
    """Lists of numbers, each [T], as one Arrow array without a Python object per number."""
    arrays = [np.asarray(row, kind) for row in rows]
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([np.zeros(0, kind), *arrays])))


def _pack(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return message if calls is None else {**message, "tool_calls": json.dumps(calls, ensure_ascii=False)}


def _unpack(message: dict[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in message.items() if value is not None}
    return found if "tool_calls" not in found else {**found, "tool_calls": json.loads(found["tool_calls"])}
