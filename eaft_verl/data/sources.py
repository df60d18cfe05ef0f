"""Rows as dictionaries, from files, a generator of this project or the Hugging Face hub, one after the other.

Bytes are read strictly: a file that is not UTF-8 or holds NUL bytes is refused with the number of the row, because a
replacement character would be trained on like any other text. What a file is shows in its first bytes, not its name.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from eaft_verl.data.readers import CHUNK, SUFFIXES, count_in_file, plain, read_file
from eaft_verl.errors import DataError

GENERATED = "generate:"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(:[\w.-]*){0,2}$")
_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")
_SHARD = re.compile(r"\.(jsonl?|ndjson|parquet)(\.(gz|zst))?$")
_SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?:[-_./]|$)")
_GLOB = re.compile(r"[*?\[]")


def read_rows(source: str) -> list[dict[str, Any]]:
    """All rows of a source, in order; see iter_rows."""
    return list(iter_rows(source))


def iter_rows(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a source, in order, without holding all of them.

    source: path, folder or glob of JSON Lines, JSON arrays or parquet files, also as .gz or .zst; an address such as
    s3:// or hf:// that fsspec opens; `generate:NAME`; or a hub id `org/name[:config[:split]]`, split `train` unless
    given. Raises DataError naming the file and, where one is at fault, the row (1-based; blank lines are no rows).
    """
    if source.startswith(GENERATED):
        from eaft_verl.data.synthesis import generate

        yield from generate(source.removeprefix(GENERATED))
        return
    files = files_of(source)
    if files is None:
        yield from _read_hub(_hub_id(source))
        return
    for file in files:
        for number, row in enumerate(read_file(file), 1):
            if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row):
                row = {"messages": row}
            if not isinstance(row, dict):
                raise DataError(
                    f"{file} row {number} is {type(row).__name__}; every row must be an object of named fields"
                )
            yield row


def count_rows(source: str, limit: int | None = None) -> int | None:
    """Rows of a source, at most `limit`, if they can be counted without parsing or asking a hub; else None."""
    if source.startswith(GENERATED):
        return len(list(islice(iter_rows(source), limit)))
    try:
        counts = [count_in_file(file) for file in files_of(source) or [""]]
    except DataError:
        return None
    known = [count for count in counts if count is not None]
    return min(sum(known), limit or sum(known)) if len(known) == len(counts) else None


def source_hash(source: str) -> str:
    """sha256 of a local file's bytes, or of the hashes of several; of any other source, of its rows' canonical JSON."""
    files = None if source.startswith(GENERATED) else files_of(source)
    if files:
        hashes = [_hash_file(file) for file in files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    text = json.dumps(read_rows(source), sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def files_of(source: str) -> list[str] | None:
    """The files of a path, folder, glob or fsspec address, in order; None for what may be a hub id."""
    if "://" in source:
        return _remote_files(source)
    path = Path(source).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        found = [one.relative_to(path).as_posix() for one in path.rglob("*") if one.is_file()]
        return [str(path / name) for name in _shards(source, found)]
    if _GLOB.search(source):
        import glob

        found = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"{source} is not a file and matches none; give an existing {', '.join(SUFFIXES)} file")
        return found
    return None


def _shards(folder: str, names: list[str]) -> list[str]:
    """The data files of a folder; a split among several must be chosen."""
    shown = [name for name in names if not any(part.startswith((".", "_")) for part in name.split("/"))]
    shards = sorted(name for name in shown if _SHARD.search(name.lower()))
    if not shards:
        raise DataError(f"{folder} is not a file and holds none; give an existing {', '.join(SUFFIXES)} file")
    splits = sorted({found[1] for name in shards if (found := _SPLIT.search(name.lower()))})
    if len(splits) > 1:
        raise DataError(f"{folder} holds the splits {', '.join(splits)}; name one, for example {folder}/*{splits[0]}*")
    return shards


def _remote_files(source: str) -> list[str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(source)
        if not _GLOB.search(source) and system.isfile(path):
            return [source]
        names = system.glob(path) if _GLOB.search(source) else system.find(path)
        names = [system.unstrip_protocol(name) for name in sorted(names) if _GLOB.search(source) or _SHARD.search(name)]
    except (ImportError, OSError, ValueError) as error:
        raise DataError(
            f"{source} cannot be opened ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from None
    if not names:
        raise DataError(f"{source} is not a file and holds none; give an existing {', '.join(SUFFIXES)} file")
    return names


def _hash_file(file: str) -> str:
    digest = hashlib.sha256()
    import fsspec

    with fsspec.open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def names_file(source: str) -> bool:
    """Whether the source must exist here: it looks like a path, or there is something of that name."""
    if source.startswith(GENERATED) or "://" in source:
        return False
    path_like = source.startswith((".", "/", "~")) or _SUFFIX.search(source) or _GLOB.search(source)
    return bool(path_like) or Path(source).exists()


def at_hand(source: str) -> bool:
    """Whether the source is read without asking a hub or a store."""
    try:
        return source.startswith(GENERATED) or ("://" not in source and bool(files_of(source)))
    except DataError:
        return False


def _hub_id(source: str) -> str:
    """`source` if it can be a hub id; anything that looks like a path must exist and is never asked of the hub."""
    if names_file(source):
        raise DataError(f"{source} is not a file; give an existing {', '.join(SUFFIXES)} file")
    if not _HUB_ID.fullmatch(source):
        raise DataError(
            f"{source!r} is neither a local file nor a hub id; allowed are a {', '.join(SUFFIXES)} file, "
            "generate:NAME, or org/name[:config[:split]]"
        )
    return source


def _read_hub(source: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    name, config, split = ([*source.split(":"), "", ""])[:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source!r} is neither a local file nor reachable as hub data set; give an existing "
            f"{', '.join(SUFFIXES)} file, or check the id and the connection ({cause})"
        ) from None
    yield from ({key: plain(value) for key, value in row.items()} for row in rows)
