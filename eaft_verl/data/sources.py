"""Rows as dictionaries, from a file, a generator of this project or the Hugging Face hub.

Bytes are read strictly: a file that is not UTF-8 or holds NUL bytes is refused with the number of the row, because a
replacement character would be trained on like any other text.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from eaft_verl.errors import DataError

GENERATED = "generate:"
SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(:[\w.-]*){0,2}$")
_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")
_SURROGATE = re.compile("[\udc80-\udcff]")


def read_rows(source: str) -> list[dict[str, Any]]:
    """All rows of a source, in order.

    source: path of a .jsonl, .json (a list of objects) or .parquet file; `generate:NAME`; or a hub id
    `org/name[:config[:split]]`, split `train` unless given.
    Raises DataError naming the file and, where one is at fault, the row (1-based; blank lines are no rows).
    """
    if source.startswith(GENERATED):
        from eaft_verl.data.synthesis import generate

        return generate(source.removeprefix(GENERATED))
    path = Path(source)
    if not path.is_file():
        return _read_hub(_hub_id(source))
    if path.suffix not in SUFFIXES:
        raise DataError(f"{source} has suffix {path.suffix!r}; readable are {', '.join(SUFFIXES)}")
    rows = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}[path.suffix](path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{source} row {number} is {type(row).__name__}; every row must be an object of named fields"
            )
    return rows


def source_hash(source: str) -> str:
    """sha256 of a local file's bytes; of any other source, of its rows' canonical JSON."""
    path = Path(source)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    text = json.dumps(read_rows(source), sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _read_jsonl(path: Path) -> list[Any]:
    rows: list[Any] = []
    for line, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        where = f"{path} row {len(rows) + 1} (line {line})"
        if b"\0" in raw:
            raise DataError(f"{where} holds a NUL byte at column {raw.index(0) + 1}; remove it")
        try:
            rows.append(json.loads(raw.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where} is not valid UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}); "
                "convert the file to UTF-8"
            ) from None
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not valid JSON ({error}); one object per line is expected") from None
    return rows


def _read_json(path: Path) -> list[Any]:
    # Undecodable bytes are carried through the parser as lone surrogates: only the parser knows which row they are in.
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    broken = _SURROGATE.search(text) is not None
    try:
        rows = json.loads(text, strict="\0" not in text)
    except json.JSONDecodeError as error:
        cause = ", or not valid UTF-8" if broken else ""
        raise DataError(f"{path} is not valid JSON{cause} ({error})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {type(rows).__name__}; a list of objects is expected (or use .jsonl)")
    for number, row in enumerate(rows, 1):
        plain = json.dumps(row, ensure_ascii=False)
        if broken and _SURROGATE.search(plain):
            raise DataError(f"{path} row {number} is not valid UTF-8; convert the file to UTF-8")
        if "\0" in text and "\\u0000" in plain:
            raise DataError(f"{path} row {number} holds a NUL byte; remove it")
    return rows


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file ({error})") from None
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        pass
    for number in range(table.num_rows):
        try:
            table.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} row {number + 1} is not valid UTF-8 ({error.reason}); write the file anew"
            ) from None
    raise DataError(f"{path} is not valid UTF-8; write the file anew")


def _hub_id(source: str) -> str:
    """`source` if it can be a hub id; anything that looks like a path must exist and is never asked of the hub."""
    if source.startswith((".", "/", "~")) or _SUFFIX.search(source) or Path(source).is_dir():
        raise DataError(f"{source} is not a file; give an existing {', '.join(SUFFIXES)} file")
    if not _HUB_ID.match(source):
        raise DataError(
            f"{source!r} is neither a local file nor a hub id; allowed are a {', '.join(SUFFIXES)} file, "
            "generate:NAME, or org/name[:config[:split]]"
        )
    return source


def _read_hub(source: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    name, config, split = ([*source.split(":"), "", ""])[:3]
    try:
        return load_dataset(name, config or None, split=split or "train").to_list()
    except (OSError, ValueError, RuntimeError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source!r} is neither a local file nor reachable as hub data set; give an existing "
            f"{', '.join(SUFFIXES)} file, or check the id and the connection ({cause})"
        ) from None
