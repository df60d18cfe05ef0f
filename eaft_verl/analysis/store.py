"""A store of token statistics: what a model says of every trained token of a data set, one parquet file on disk.

FOLDER/tokens.parquet, LZ4, row groups of GROUP rows; a row is a trained token, in order of (sample, position). The
file's metadata names model, data and template, so that a figure or a threshold is never taken from another model's
numbers. A store is filled part by part beside its place and gets its name when it is whole: a pass that was killed
goes on at its first missing part.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eaft_verl.errors import DataError
from eaft_verl.files import locked, read_json, write_json

SCHEMA = 1
META = b"eaft_verl"  # key of the file's metadata: JSON
FILE = "tokens.parquet"
GROUP = 1 << 20  # rows of a row group
BATCH = 1 << 17  # rows in memory at a time
TEXT = pa.dictionary(pa.int32(), pa.string())
COLUMNS = pa.schema(
    [
        ("sample", pa.int32()),  # row of the prepared data
        ("position", pa.int32()),  # of the token itself in its example
        ("token", pa.int32()),
        ("logprob", pa.float32()),  # ln p(token), nats
        ("entropy", pa.float32()),  # of the k most likely tokens, renormalised, nats
        ("full_entropy", pa.float32()),  # over the vocabulary, nats
        ("max_prob", pa.float32()),
        ("argmax", pa.int32()),  # the most likely token
        ("sum_p2", pa.float32()),  # sum over the vocabulary of p^2
        ("top_k_mass", pa.float32()),  # probability of the k most likely tokens together
        ("role", TEXT),  # assistant, reasoning, tool call, ...; `template`: inserted by the chat template
        ("source", TEXT),  # part of a mixture
    ]
)
CHECKED: dict[str, Any] = {"page_checksum_verification": True}  # a page without a checksum passes
_REPEATED = ["sample", "position", "token", "argmax", "role", "source"]  # a dictionary of floats only costs
# LZ4 takes a third of the time of zstd to read, which is most of what a page takes, for files that are a seventh larger
WRITTEN: dict[str, Any] = {"compression": "lz4", "use_dictionary": _REPEATED, "write_page_checksum": True}
KNOWN = {"model": str, "keys": dict, "k": int, "vocab": int, "origin": str, "samples": int, "tokens": int}  # of META
IDENTITY = ("keys", "k", "origin", "sampling")  # of the metadata: what decides whether two stores are the same
_DIFFERS = "stale: delete it, or choose another output folder"


class TokenStore:
    """A whole store, open for reading.

    meta: {"schema", "model", "keys": {"model", "data", "template"}, "k", "vocab", "origin": "data" | "own" |
    "rollouts", "sampling": {...} or None, "samples", "tokens", "seconds": of the pass}.
    DataError where there is none, it is not whole, of another schema, or something else's file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        file = self.path / FILE
        if not file.is_file():
            raise DataError(f"{self.path} holds no token statistics ({FILE} is missing); run `eaft analyze`")
        with _damage_named(file):
            self._footer = pq.read_metadata(file)
            found = pq.read_schema(file)
        try:
            self.meta: dict[str, Any] = json.loads((self._footer.metadata or {})[META])
            schema = self.meta["schema"]
        except (KeyError, ValueError, TypeError):
            raise DataError(f"{file} was not written by `eaft analyze`: it names no model; give another") from None
        wrong = self._wrong(found)
        if schema != SCHEMA or found.names != COLUMNS.names or wrong:
            raise DataError(
                f"{file} has schema {schema!r} with columns {', '.join(found.names)}; this version reads {SCHEMA} with "
                f"{', '.join(COLUMNS.names)} (missing, too small or of another type: {', '.join(wrong) or 'none'}): "
                "delete it and run `eaft analyze` again"
            )
        if self.meta["tokens"] != self._footer.num_rows:
            raise DataError(f"{file} is not whole: {self._footer.num_rows} of {self.meta['tokens']} tokens; delete it")

    def _wrong(self, found: pa.Schema) -> list[str]:
        """Columns and entries of `meta` that are missing, too small or of another type."""
        wrong = [field.name for field in COLUMNS if field not in list(found)]
        wrong += [name for name, kind in KNOWN.items() if not isinstance(self.meta.get(name), kind)]
        return wrong + [name for name in ("k", "vocab") if name not in wrong and self.meta[name] < 2]  # no entropy

    def batches(self, columns: Sequence[str] | None = None, size: int = BATCH) -> Iterator[pa.RecordBatch]:
        """All rows in order, at most `size` at a time; memory does not grow with the store."""
        options = {"pre_buffer": False, "buffer_size": 1 << 20, **CHECKED}  # else all is kept
        with _damage_named(self.path / FILE), pq.ParquetFile(self.path / FILE, **options) as file:
            yield from file.iter_batches(size, columns=columns and list(columns))

    def column(self, name: str) -> pa.ChunkedArray:
        """One column whole: 4 bytes a token."""
        with _damage_named(self.path / FILE):
            return pq.read_table(self.path / FILE, columns=[name], **CHECKED).column(0)

    def sample(self, index: int) -> pa.Table:
        """The rows of one sample, [T]; reads its row groups alone."""
        with _damage_named(self.path / FILE):
            return pq.read_table(self.path / FILE, filters=pc.field("sample") == index, **CHECKED)


@contextlib.contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """DataError for a file with pages that are not as they were written."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        raise DataError(
            f"{file} is not whole or no parquet file ({said}); delete it and run `eaft analyze` again"
        ) from None


def stored_once(
    path: Path, meta: dict[str, Any], parts: int, make: Callable[[int], pa.Table], *, plan: Any = None
) -> TokenStore:
    """The store at `path`, from `make(part)` of every part that is not there yet, one after the other; then kept.

    meta: all of TokenStore.meta but schema, tokens and seconds. plan: JSON that says which rows a part holds; parts
    that were made by another plan are made anew. Whoever comes second waits, and finds it made.
    DataError, and nothing is touched, where `path` holds a store of another identity, or something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock"), busy=f"another process fills {path}", wait=True):
        partial = path.with_name(f".{path.name}.partial")
        begun, begin = partial / "meta.json", {"meta": meta, "parts": parts, "plan": plan}
        if path.is_file() or (path.exists() and any(path.iterdir())):
            return _checked(path, meta)
        if partial.exists() and not (begun.exists() and read_json(begun) == begin):
            shutil.rmtree(partial)  # begun for another model, other data or other parts
        partial.mkdir(exist_ok=True)
        write_json(begun, begin, exact=True)
        files = [partial / f"{part:06d}.parquet" for part in range(parts)]
        for part, file in enumerate(files):
            if not file.exists():
                started = time.monotonic()
                table = make(part).cast(COLUMNS)
                _write(file, table, {"seconds": time.monotonic() - started})
        _join(partial / FILE, files, meta)
        path.mkdir(exist_ok=True)
        os.replace(partial / FILE, path / FILE)
        shutil.rmtree(partial)
        return TokenStore(path)


def _checked(path: Path, meta: dict[str, Any]) -> TokenStore:
    """The store that is there, if it is what was asked for."""
    if not (path / FILE).is_file():
        raise DataError(f"{path} holds something else than token statistics; nothing was written, give another folder")
    store = TokenStore(path)
    for name in IDENTITY:
        if store.meta[name] != meta[name]:
            raise DataError(f"{path} was made with {name} {store.meta[name]}, now {meta[name]}: {_DIFFERS}")
    return store


def _write(file: Path, table: pa.Table, meta: dict[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    pq.write_table(table.replace_schema_metadata({META: json.dumps(meta)}), temporary, **WRITTEN)
    os.replace(temporary, file)


def _join(target: Path, files: Sequence[Path], meta: dict[str, Any]) -> None:
    """The parts as one file of large row groups; parts hold whole samples and are read one at a time."""
    footers = []
    for file in files:
        with _damage_named(file):
            footers.append(pq.read_metadata(file))
    seconds = sum(json.loads(footer.metadata[META])["seconds"] for footer in footers)
    tokens = sum(footer.num_rows for footer in footers)
    if not tokens:
        raise DataError("no token is trained: every loss mask is empty; look at the rows with `eaft prepare --show`")
    whole = {**meta, "schema": SCHEMA, "tokens": tokens, "seconds": seconds}
    schema = COLUMNS.with_metadata({META: json.dumps(whole)})
    with pq.ParquetWriter(target, schema, **WRITTEN) as writer:
        waiting: list[pa.Table] = []
        for file in files:
            with _damage_named(file):
                waiting.append(pq.read_table(file, **CHECKED))
            if sum(map(len, waiting)) >= GROUP or file == files[-1]:
                group = pa.concat_tables(waiting).unify_dictionaries().replace_schema_metadata(schema.metadata)
                writer.write_table(group, row_group_size=GROUP)
                waiting = []
