"""The memory map of a prepared file: an uncompressed copy that training and evaluation open instead of reading it."""

import glob
import os
from pathlib import Path

import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from eaft_verl.files import bytes_hash, cache_dir, content_hash, temporary_beside

_BATCH = 4096  # rows


def map_of(path: Path, key: str) -> Path:
    """The Arrow file of a parquet file whose sha256 is `key`, made where there is none that is whole.

    It lies beside the file, in the user's own cache where nothing can be written there (in /tmp anybody could put
    another), and is named after the hashes of the file and of itself.
    """
    folder = path.parent if os.access(path.parent, os.W_OK) else cache_dir() / "maps"
    folder.mkdir(parents=True, exist_ok=True)
    for found in _maps(folder, path.stem):
        if found.name.endswith(f".{key[:16]}.{content_hash(found)[:16]}.arrow"):
            return found
    with temporary_beside(folder / path.name) as temporary:
        with pq.ParquetFile(path) as source:
            schema = source.schema_arrow.remove_metadata()
            with ipc.new_file(str(temporary), schema) as table:
                for batch in source.iter_batches(_BATCH):
                    table.write_batch(batch)
        return keep_map(temporary, path.stem, key)


def keep_map(temporary: Path, stem: str, key: str) -> Path:
    """Give a map that is written its name, in the folder where it lies; maps of other contents of the file go."""
    temporary.chmod(0o644)  # others of a group who share the data open it too
    made = temporary.with_name(f".{stem}.{key[:16]}.{bytes_hash(temporary)[:16]}.arrow")
    os.replace(temporary, made)
    for old in set(_maps(made.parent, stem)) - {made}:
        old.unlink(missing_ok=True)
    return made


def _maps(folder: Path, stem: str) -> list[Path]:
    return list(folder.glob(f".{glob.escape(stem)}.{'?' * 16}.{'?' * 16}.arrow"))
