"""Files that are whole or not there: atomic text, JSON, JSON lines, locks, and what is computed once and kept."""

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from eaft_verl.boundary import masked
from eaft_verl.errors import RunError


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of the text as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one move, so that a reader or a crash never sees half of it."""
    with new_file(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """What is written into this stream is the file, whole, when the block ends; nothing where the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        _name(error, path)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """What is put into this empty folder is `path`, whole, when the block ends; nothing where the block fails."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _name(error, path)
        raise


def _name(error: BaseException, path: Path) -> None:
    """Have an error of writing say which file: a full disk tells the system call alone."""
    if isinstance(error, OSError) and error.errno and not error.filename:  # else it has words of its own
        error.filename = str(path)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new file beside `path`, gone afterwards unless it was moved."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
    except OSError as error:
        _name(error, path)
        raise
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, exact: bool = False) -> None:
    """Atomic, readable JSON. NaN and infinities become strings, because JSON has none; secrets are `masked`.

    `exact`: for state that only we read back; they stay the numbers they are, as Python writes and reads them.
    """
    write_text(path, json_text(value, exact=exact))


def json_text(value: Any, *, exact: bool = False) -> str:
    """What `write_json` writes."""
    chosen = value if exact else masked(_finite(value))
    return json.dumps(chosen, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Atomic JSON lines."""
    write_text(path, "".join(map(json_line, rows)))


def json_line(row: dict[str, Any]) -> str:
    """One row of a JSON lines file, its newline included."""
    return json.dumps(masked(_finite(row)), ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Parse a JSON file; RunError names the file when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist") from None
    except (ValueError, RecursionError, OSError) as error:  # ValueError: bytes that are no text, too
        raise RunError(f"{path} is not valid JSON ({error}); delete it and run the stage again") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete rows; a torn last line (the process was killed while writing) is left out."""
    if not path.exists():
        return []
    rows, damaged = scan_jsonl(path)
    if damaged:
        raise RunError(f"{path}:{damaged[0]} is not valid JSON; remove that line, or put the file back from a backup")
    return list(rows.values())


def scan_jsonl(path: Path) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """{number: row} of a file's lines, from 1, and the numbers of damaged ones; a torn last line is neither."""
    rows, damaged = {}, []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else None
        except ValueError:  # no JSON, or no UTF-8
            row = ...
        if isinstance(row, dict):
            rows[number] = row
        elif row is not None and number < len(lines):  # with no newline after it: torn by a kill
            damaged.append(number)
    return rows, damaged


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


@contextlib.contextmanager
def locked(path: Path, *, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` for this process. Where another one holds it: RunError(busy), or waiting for it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise RunError(busy) from None
        print(f"eaft: {busy}; waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    except OSError as error:
        _name(error, path)
        raise
    try:
        yield
    finally:
        lock.release()


def computed_once(folder: Path, key: str, make: Callable[[Path], None]) -> Path:
    """`folder` as `make` filled it, made once for every process that asks, and kept.

    `make` writes into an empty folder of this process alone, which gets its name when it is whole; meta.json holds
    `key`, the seconds it took and the size and hash of every file. RunError for a folder that was made for another key,
    or that has lost a part or has another in its place.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), busy=f"another process computes {folder}", wait=True):
        if not (folder / "meta.json").exists():
            _make(folder, key, make)
        stored = _meta(folder)
        if stored["key"] != key:
            raise RunError(
                f"{folder} was computed for another model, data set or chat template (key {stored['key']}, now {key}): "
                "stale; delete it, or use another output folder"
            )
        for name, size in stored["sizes"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise RunError(f"{folder / name} is not whole ({size} bytes were written); delete {folder}")
            if content_hash(folder / name) != stored["hashes"].get(name):
                raise RunError(f"{folder / name} is not the file that was written; delete {folder}")
    return folder


def _make(folder: Path, key: str, make: Callable[[Path], None]) -> None:
    """A new `folder`; nothing is left of one whose making fails, nor of one whose process was killed."""
    for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(leftover)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
    partial.chmod(0o755)
    try:
        started = time.monotonic()
        make(partial)
        seconds = time.monotonic() - started
        files = sorted(partial.iterdir())
        meta = {"key": key, "seconds": seconds, "sizes": {file.name: file.stat().st_size for file in files}}
        write_json(partial / "meta.json", meta | {"hashes": {file.name: bytes_hash(file) for file in files}})
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _meta(folder: Path) -> dict[str, Any]:
    """meta.json of a folder that was computed once."""
    stored = read_json(folder / "meta.json")
    kinds = {"key": str, "sizes": dict, "hashes": dict, "seconds": float}
    if not isinstance(stored, dict) or any(not isinstance(stored.get(name), kind) for name, kind in kinds.items()):
        raise RunError(f"{folder / 'meta.json'} is not what this version writes; delete {folder}")
    return stored


def seconds_to_compute(folder: Path) -> float:
    """What `computed_once` took: all who need it have spent that, whoever made it."""
    return float(_meta(folder)["seconds"])


def cache_dir() -> Path:
    """$EAFT_CACHE, or ~/.cache/eaft-verl."""
    try:
        return Path(os.environ.get("EAFT_CACHE") or Path.home() / ".cache" / "eaft-verl").expanduser().resolve()
    except RuntimeError:  # a user that the system does not know, as in some containers
        raise RunError("there is no home folder to keep models and hashes in; export EAFT_CACHE=FOLDER") from None


def digest_of(file: Path, digest: Any) -> str:
    """Hexadecimal digest of every byte of a file by a new hash object, of hashlib or xxhash."""
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return str(digest.hexdigest())


def bytes_hash(file: Path) -> str:
    """xxh3 (128 bits) of every byte of a file."""
    import xxhash

    return digest_of(file, xxhash.xxh3_128())


def content_hash(file: Path) -> str:
    """`bytes_hash`, remembered by place, size and times: 60 GB are read once."""
    import xxhash

    stat = file.stat()
    seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    memory = cache_dir() / "hashes" / f"{xxhash.xxh3_64_hexdigest(str(file.resolve()).encode())}.json"
    with contextlib.suppress(RunError, OSError, KeyError, TypeError):
        if (known := read_json(memory))["seen"] == seen:
            return str(known["hash"])
    found = bytes_hash(file)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        write_json(memory, {"file": str(file), "seen": seen, "hash": found})
    return found
