"""States to resume from, in RUN/resume: whole or not there, each described by a manifest and verified before its use.

resume/step_000012/manifest.json        written last, flushed; every other file of the folder with its size and xxh3
resume/step_000012.damaged/             set aside, because it was not as its manifest says
resume/.step_000016.partial/            being written, or cut off
A GRPO arm's folders are verl's, resume/global_step_12, and count its rollout batches.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from eaft_verl.cluster.node_probe import version_of
from eaft_verl.errors import RunError
from eaft_verl.files import json_text, read_json, write_json
from eaft_verl.runs import Run

FOLDER, MANIFEST = "resume", "manifest.json"
EVER = ".state_saved"  # in the run: it has been saved once, as a state or to its end
SHARDS = "shards.json"  # of the workers: {"files": {name: {"bytes", "xxh3"}}, "nonfinite": name of a tensor or null}
FEWEST = 2  # states that are never removed: the newest may be damaged
PACKAGES = ("eaft-verl", "verl", "torch", "transformers")
SCHEMA = 1
_NAME = re.compile(r"^(?:global_)?step_(\d+)$")
_FIELDS = {"step": int, "number": int, "state": dict, "files": dict, "world_size": int, "saved": float}
_READERS = 8  # threads: one file system serves several files faster than one


class Saved(NamedTuple):
    """A state on disk: the number in its folder's name, the folder, its manifest."""

    number: int
    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer updates that it holds."""
        return int(self.manifest["step"])


def describe(file: Path, *, flush: bool = False) -> dict[str, Any]:
    """Size and xxh3 (128 bits) of every byte of a file; `flush`: bring it to the disk first."""
    with file.open("rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        digest = xxhash.xxh3_128()
        while block := stream.read(1 << 24):
            digest.update(block)
        return {"bytes": os.fstat(stream.fileno()).st_size, "xxh3": digest.hexdigest()}


def nonfinite_in(folder: Path) -> str | None:
    """Name of a tensor that is not finite, for which the workers have refused to save; None where all is finite."""
    named = [read_json(file)["nonfinite"] for file in folder.rglob(SHARDS)]
    return next(filter(None, named), None)


def seal(folder: Path, run: Run, number: int, step: int, state: dict[str, Any], world_size: int) -> None:
    """Describe every file of a state that is written, last of all, and bring folder and manifest to the disk.

    number: in the folder's name; step: updates; state: what the driver must remember. RunError where a worker's file is
    not seen from here.
    """
    files: dict[str, Any] = {}
    for shards in folder.rglob(SHARDS):
        written = read_json(shards)["files"]
        files |= {(shards.parent / name).relative_to(folder).as_posix(): entry for name, entry in written.items()}
    for name, entry in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]:
            raise RunError(
                f"{folder / name}: a worker wrote {entry['bytes']} bytes that are not seen here; output= must be a "
                "folder that all nodes share"
            )
    files |= {name: describe(folder / name, flush=True) for name in _files(folder) - files.keys()}
    info = run.info
    about = {
        "schema": SCHEMA,
        "saved": time.time(),
        "config": hashlib.sha256((run.path / "config.yaml").read_bytes()).hexdigest()[:16],
        "keys": info.get("keys"),
        "objective": info.get("calibrated", info.get("objective")),
        "seed": info.get("seed"),
        "versions": {name: version_of(name) for name in PACKAGES},
    }
    counts = {"number": number, "step": step, "world_size": world_size, "state": state, "files": files}
    manifest = about | counts
    write_json(folder / MANIFEST, {**manifest, "digest": _digest(manifest)}, exact=True)
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def problem(folder: Path, keys: Any = None) -> str:
    """What is wrong with a state, the file at fault first; '' where every byte is as it was written.

    keys: of the run's model, data and template, where they have to be these.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was not written to its end, or lost that file"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, kind in _FIELDS.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(name), kind):
            return f"{MANIFEST} lacks {name!r}, or holds no {kind.__name__} there"
    if manifest.pop("digest", None) != _digest(manifest):
        return f"{MANIFEST} is not as it was written"
    if (match := _NAME.match(folder.name)) and manifest["number"] != int(match[1]):
        return f"{MANIFEST} is that of step {manifest['number']}"
    if keys is not None and manifest.get("keys") != keys:
        return f"{MANIFEST} names another model, data set or template: {manifest.get('keys')}"
    return _altered(folder, manifest["files"])


def _altered(folder: Path, files: dict[str, Any]) -> str:
    there = _files(folder)
    if missing := sorted(files.keys() - there):
        return f"{missing[0]} is missing"
    if foreign := sorted(there - files.keys()):
        return f"{foreign[0]} was not there when it was saved"
    names = sorted(files)
    try:
        with ThreadPoolExecutor(_READERS) as readers:
            for name, now in zip(names, readers.map(lambda name: describe(folder / name), names), strict=True):
                if now != files[name]:
                    return f"{name} is not as it was written: {now}, and {files[name]} in {MANIFEST}"
    except OSError as error:
        return f"a file cannot be read ({error})"
    return ""


def folders(run: Path) -> dict[int, Path]:
    """{number: folder} of what has the name of a state, ascending; it may be damaged."""
    found = {int(m[1]): path for path in (run / FOLDER).glob("*step_*") if (m := _NAME.match(path.name))}
    return dict(sorted(found.items()))


def whole(run: Path) -> dict[int, Path]:
    """{number: folder} of states that were written to their end, ascending; their bytes are not looked at."""
    return {number: path for number, path in folders(run).items() if (path / MANIFEST).is_file()}


def newest_sound(run: Run, *, strict: bool) -> Saved | None:
    """The newest state whose every byte is as it was written; a damaged one is set aside with a warning.

    strict: RunError for a damaged one instead. None where there is no sound one.
    """
    for cut_off in (run.path / FOLDER).glob(".*.partial"):
        shutil.rmtree(cut_off, ignore_errors=True)
    keys = run.info.get("keys")
    for number, folder in reversed(folders(run.path).items()):
        wrong = problem(folder, keys)
        if not wrong:
            return Saved(number, folder, read_json(folder / MANIFEST))
        if strict:
            raise RunError(
                f"{folder} is damaged: {wrong}. resume=strict goes on from the newest state only; put that file back, "
                "or leave resume= out to go on from an older one"
            )
        aside = folder.with_name(f"{folder.name}.damaged")
        print(f"eaft: warning: {folder} is damaged: {wrong}. Set aside as {aside.name}", file=sys.stderr, flush=True)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return None


def retain(run: Path, keep: int | None) -> None:
    """After a save: remove all but the newest `keep` whole states; None: none, and never below FEWEST."""
    (run / EVER).touch()
    if keep is not None:
        for folder in list(whole(run).values())[: -max(keep, FEWEST)]:
            shutil.rmtree(folder, ignore_errors=True)


def remove(run: Path) -> None:
    """A finished run needs its exports only."""
    (run / EVER).touch()
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def _digest(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json_text(manifest, exact=True).encode())


def _files(folder: Path) -> set[str]:
    return set(_names(folder)) - {MANIFEST}


def _names(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
