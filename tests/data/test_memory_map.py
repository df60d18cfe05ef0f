"""Where the memory map of a prepared file lies."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from eaft_verl.data.memory_map import map_of
from eaft_verl.data.parquet import Example, file_hash, read_examples, write_examples


@pytest.mark.parametrize("writable", [True, False])
def test_a_map_lies_beside_its_file_or_in_the_users_own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    """Never in /tmp, where anybody could put another one; whoever may read the data may read it."""
    file = tmp_path / "data" / "x.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table({"token": [3, 5]}), file)
    monkeypatch.setenv("EAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: writable)
    made = map_of(file, "k" * 64)
    assert made.parent == (file.parent if writable else tmp_path / "cache" / "maps")
    assert made.stat().st_mode & 0o777 == 0o644 and map_of(file, "k" * 64) == made
    with ipc.open_file(str(made)) as table:
        assert table.read_all().to_pydict() == {"token": [3, 5]}


def test_the_map_that_is_written_with_a_file_is_the_one_that_would_be_made_of_it(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "2"}]
    rows = [Example(f"r{i}", turns, list(range(i % 7 + 2)), [0] * (i % 7 + 1) + [1]) for i in range(9000)]
    file = tmp_path / "x.parquet"
    write_examples(file, rows)
    (beside,) = tmp_path.glob(".x.*.arrow")
    assert map_of(file, file_hash(file)) == beside  # found, not made
    with ipc.open_file(str(beside)) as table:
        written = table.read_all()
    beside.unlink()
    with ipc.open_file(str(map_of(file, file_hash(file)))) as table:
        made = table.read_all()
    assert written.equals(made) and written.schema.names == made.schema.names and len(made) == 9000
    assert read_examples(file) == rows
