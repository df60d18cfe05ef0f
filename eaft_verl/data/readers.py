"""Bytes of a file to rows, one after the other; what a file is shows in its first bytes, not in its name."""

import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, cast

from eaft_verl.data.spec import unrepeated, why_no_json
from eaft_verl.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet")
CHUNK = 1 << 20  # bytes or characters read at a time
_SURROGATE = re.compile("[\udc80-\udcff]")
_TURN = {"role", "from"}  # keys of a turn, not of a row
_BOM = b"\xef\xbb\xbf"
_WIDE = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def count_in_file(file: str) -> int | None:
    """Rows of a parquet file or of one whose name and beginning say JSON Lines; None where rows must be parsed."""
    path = Path(file)
    if not path.is_file():
        return None
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(path).metadata.num_rows
        except (pa.ArrowException, OSError):  # whoever reads it says what is wrong
            return None
    if path.suffix != ".jsonl":
        return None
    with path.open("rb") as stream:
        if stream.read(64).removeprefix(_BOM).lstrip()[:1] != b"{":  # an array, or packed
            return None
        stream.seek(0)
        return sum(len(_rows_in(line)) for line in stream)


def _open(file: str) -> IO[bytes]:
    """The file's bytes, unpacked if it is compressed."""
    import fsspec

    stream = cast(IO[bytes], fsspec.open(file, "rb").open())
    start = stream.read(4)
    stream.seek(0)
    if start[:2] == b"\x1f\x8b":
        import gzip

        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if start == b"\x28\xb5\x2f\xfd":
        import pyarrow as pa

        return cast(IO[bytes], io.BufferedReader(pa.CompressedInputStream(stream, "zstd")))
    return stream


def read_file(file: str) -> Iterator[Any]:
    """Rows of one file, its kind told by its first bytes."""
    try:
        with _open(file) as stream:
            start = stream.read(64)
        yield from _rows(file, start)
    except (OSError, EOFError, zlib.error) as error:  # a compressed file that is cut off or damaged anywhere
        raise DataError(f"{file} cannot be read ({error})") from None


def _rows(file: str, start: bytes) -> Iterator[Any]:
    if start[:4] == b"PAR1":
        return _read_parquet(file)
    if wide := _wide(start):
        raise DataError(f"{file} is {wide}; convert the file to UTF-8 (iconv -f {wide} -t UTF-8)")
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{file} is a git-lfs pointer, not the data; fetch it (git lfs pull)")
    text, suffix = start.removeprefix(_BOM).lstrip(), _suffix(file)
    if suffix == ".parquet":
        raise DataError(f"{file} is not a readable parquet file (it does not begin with PAR1)")
    if text[:1] not in (b"{", b"[", b"") and suffix not in (".jsonl", ".json"):
        raise DataError(f"{file} has suffix {suffix!r}; readable are {', '.join(SUFFIXES)}")
    if (text[:1] == b"[" or suffix == ".json") and not _is_lines(file):
        return _read_array(file)
    return _read_jsonl(file)


def _suffix(file: str) -> str:
    """Of the file's name, compression aside."""
    return Path(file.removesuffix(".gz").removesuffix(".zst")).suffix


def _wide(start: bytes) -> str | None:
    """The encoding of two or four bytes a character that the file is in, told by its mark or its zeros."""
    marked = next((name for mark, name in _WIDE.items() if start.startswith(mark)), None)
    return marked or ("UTF-16" if start[:4:2] == b"\0\0" or start[1:4:2] == b"\0\0" else None)


def _is_lines(file: str) -> bool:
    """Whether the first line of two or more is a whole JSON value and no array of rows, unless the next begins another;
    a line of .json is not."""
    with _open(file) as stream:
        first = stream.readline().removeprefix(_BOM).strip()
        while not first and (line := stream.readline()):
            first = line.strip()
        first, *others = _rows_in(first) or [b""]
        rest = (line.lstrip() for line in iter(lambda: stream.readline(CHUNK), b""))
        second = others[0].lstrip() if others else next(filter(None, rest), b"")
    try:
        value = json.loads(first.decode("utf-8", errors="surrogateescape"), strict=False)
    except (ValueError, RecursionError):
        # A broken first line is one of a file of lines if it ends as a row does.
        return first.startswith(b"{") and bool(second) and b"}" in first
    return bool(second or _suffix(file) != ".json") and (not _is_array(value) or second.startswith(b"["))


def _is_array(value: Any) -> bool:
    """Whether it is a list of rows, and not of the turns of one."""
    return isinstance(value, list) and all(isinstance(row, dict) and not _TURN & row.keys() for row in value)


def _read_jsonl(file: str) -> Iterator[Any]:
    number = 0
    with _open(file) as stream:
        for line, raw in enumerate(stream, 1):
            for text in _rows_in(raw.removeprefix(_BOM) if line == 1 else raw):
                number += 1
                yield _parse_line(text, f"{file} row {number} (line {line})")


def _rows_in(line: bytes) -> list[bytes]:
    """The line's rows: one, several where a carriage return alone ends them, none where it is blank."""
    return [row for row in line.rstrip(b"\r\n").split(b"\r") if row.strip()]


def _parse_line(raw: bytes, where: str) -> Any:
    if b"\0" in raw:
        raise DataError(f"{where} holds a NUL byte at column {raw.index(0) + 1}; remove it")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unrepeated)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not valid UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}); "
            "convert the file to UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({why_no_json(error)}); one object per line is expected") from None


def _read_array(file: str) -> Iterator[Any]:
    """The elements of one JSON array, parsed one after the other.

    Undecodable bytes are carried through the parser as lone surrogates: only the parser knows which row they are in.
    """
    decoder, number = json.JSONDecoder(strict=False, object_pairs_hook=unrepeated), 0
    with io.TextIOWrapper(cast(Any, _open(file)), "utf-8", errors="surrogateescape", newline="") as stream:
        buffer = stream.read(CHUNK).removeprefix("\ufeff").lstrip()
        if not buffer.startswith("["):
            yield from _wrapped(file, _parse_whole(file, buffer + stream.read()))
            return
        buffer = buffer[1:]
        while True:
            buffer = buffer.lstrip(" \t\r\n")
            buffer = buffer or stream.read(CHUNK).lstrip(" \t\r\n")
            if buffer.startswith("]"):
                _check_end(file, buffer[1:] + stream.read(CHUNK), number)
                return
            row, end, buffer = _next_element(file, decoder, buffer, lambda size: stream.read(size))
            number += 1
            _check_raw(buffer[:end], f"{file} row {number}")
            yield row
            buffer = buffer[end:].lstrip(" \t\r\n") or stream.read(CHUNK).lstrip(" \t\r\n")
            if not buffer.startswith((",", "]")):
                raise DataError(f"{file} is not valid JSON (after row {number} a comma or ] is expected)")
            buffer = buffer[1:] if buffer.startswith(",") else buffer


def _check_end(file: str, rest: str, number: int) -> None:
    if more := rest.strip():
        raise DataError(
            f"{file} goes on behind its list of {number} rows ({more[:20]!r}); write one list, or a row a line"
        )


def _wrapped(file: str, value: Any) -> list[Any]:
    """The rows of an object that holds nothing but a list of them, {data: [...]}."""
    lists = list(value.values()) if isinstance(value, dict) else []
    if len(lists) == 1 and isinstance(lists[0], list) and all(isinstance(row, dict) for row in lists[0]):
        return lists[0] if _is_array(lists[0]) else [value]  # one row, of turns
    raise DataError(f"{file} holds {type(value).__name__}; a list of objects is expected (or use .jsonl)")


def _next_element(
    file: str, decoder: json.JSONDecoder, buffer: str, read: Callable[[int], str]
) -> tuple[Any, int, str]:
    """(element, its end, buffer): the element at the start of a buffer that is read on, doubling, until it is whole."""
    while True:
        try:
            row, end = decoder.raw_decode(buffer)
            # A number may go on; nothing else that is whole does.
            if end < len(buffer) or not isinstance(row, int | float):
                return row, end, buffer
            error: ValueError = ValueError("a number at the end")
        except json.JSONDecodeError as found:
            error = found
        except (ValueError, RecursionError) as found:
            raise DataError(f"{file} is not valid JSON ({why_no_json(found)})") from None
        more = read(max(CHUNK, len(buffer)))
        if not more:
            cause = ", or not valid UTF-8" if _SURROGATE.search(buffer) else ""
            raise DataError(f"{file} is not valid JSON{cause} ({error})") from None
        buffer += more


def _parse_whole(file: str, text: str) -> Any:
    try:
        return json.loads(text, strict=False, object_pairs_hook=unrepeated)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({why_no_json(error)})") from None


def _check_raw(text: str, where: str) -> None:
    if _SURROGATE.search(text):
        raise DataError(f"{where} is not valid UTF-8; convert the file to UTF-8")
    if "\0" in text:
        raise DataError(f"{where} holds a NUL byte; remove it")


def _read_parquet(file: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _open(file) as stream:
            parquet = pq.ParquetFile(stream)
            types = {field.name: field.type for field in parquet.schema_arrow}
            _require_names(parquet.schema_arrow.names, file)
            for batch in parquet.iter_batches(1024):
                try:
                    rows = batch.to_pylist(maps_as_pydicts="strict")
                except UnicodeDecodeError:
                    rows = [
                        _arrow_row(batch.slice(one, 1), f"{file} row {number + one + 1}") for one in range(len(batch))
                    ]
                number += len(rows)
                for row in rows:
                    yield {key: _decoded(value, types[key]) for key, value in row.items()}
    except DataError:
        raise
    except (pa.ArrowException, ValueError, OverflowError, RecursionError, OSError, KeyError) as error:
        raise DataError(f"{file} is not a readable parquet file ({error})") from None


def _require_names(names: list[str], file: str) -> None:
    """DataError for two columns of one name: a row holds one of them only."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{file} has two columns named {twice!r}; rename one of them, or leave it out of the file")


def _arrow_row(batch: Any, where: str) -> dict[str, Any]:
    try:
        return batch.to_pylist(maps_as_pydicts="strict")[0]
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not valid UTF-8 ({error.reason}); write the file anew") from None


def _decoded(value: Any, kind: Any) -> Any:
    """A value of Arrow's type `kind` as JSON has it; JSON text, for which Arrow has a type, as what it says."""
    import pyarrow as pa

    if value is None or pa.types.is_string(kind):
        return value
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_decoded(item, kind.value_type) for item in value]
    return plain(value)


def plain(value: Any) -> Any:
    """A value of Arrow as JSON has it: dates and decimals as text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal) else value
