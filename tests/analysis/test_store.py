"""The store on disk: whole or not there, resumable, and never another model's numbers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_stores import random_columns, write_store

from eaft_verl.analysis.store import COLUMNS, FILE, META, TokenStore, stored_once
from eaft_verl.errors import DataError

KEYS = {"model": "m", "data": "d", "template": "t"}
IDENTITY: dict[str, Any] = {"model": "tiny", "keys": KEYS, "k": 20, "vocab": 384, "origin": "data", "sampling": None}
ROWS = 7  # trained tokens of each part


def part_of(part: int) -> pa.Table:
    """Two samples of a part, values that name their place."""
    rows = np.arange(part * ROWS, (part + 1) * ROWS)
    values = {
        name: (rows // 4 if name == "sample" else rows) if pa.types.is_integer(kind) else rows + 0.5
        for name, kind in zip(COLUMNS.names, COLUMNS.types, strict=True)
        if not pa.types.is_dictionary(kind)
    }
    return pa.table({**values, "role": ["assistant"] * ROWS, "source": [f"part{part}"] * ROWS})


def filled(path: Path, parts: int = 3) -> TokenStore:
    return stored_once(path, {**IDENTITY, "samples": 6}, parts, part_of)


def test_rows_come_back_in_order_with_the_metadata(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    assert store.meta["tokens"] == 21 and store.meta["keys"] == KEYS and store.meta["schema"] == 1
    batches = list(store.batches(size=5))
    assert max(map(len, batches)) <= 5 and pa.Table.from_batches(batches).schema.names == COLUMNS.names
    assert np.concatenate([batch["position"] for batch in batches]).tolist() == list(range(21))
    assert store.column("logprob").to_pylist() == [row + 0.5 for row in range(21)]
    assert store.column("source").to_pylist() == ["part0"] * 7 + ["part1"] * 7 + ["part2"] * 7
    assert store.sample(1)["position"].to_pylist() == [4, 5, 6, 7]
    assert [path.name for path in tmp_path.iterdir() if path.name != ".store.lock"] == ["store"]


def test_row_groups_are_large_whatever_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eaft_verl.analysis.store.GROUP", 10)
    filled(tmp_path / "store", parts=5)
    footer = pq.read_metadata(tmp_path / "store" / FILE)
    assert [footer.row_group(group).num_rows for group in range(footer.num_row_groups)] == [10, 4, 10, 4, 7]


def test_a_killed_pass_goes_on_at_its_first_missing_part(tmp_path: Path) -> None:
    made: list[int] = []

    def make(part: int) -> pa.Table:
        if part == 2 and part not in made:
            made.append(part)
            raise KeyboardInterrupt
        made.append(part)
        return part_of(part)

    meta = {**IDENTITY, "samples": 6}
    with pytest.raises(KeyboardInterrupt):
        stored_once(tmp_path / "store", meta, 3, make)
    assert not (tmp_path / "store").exists()
    store = stored_once(tmp_path / "store", meta, 3, make)
    assert made == [0, 1, 2, 2] and store.meta["tokens"] == 21
    assert stored_once(tmp_path / "store", meta, 3, make).meta == store.meta and made == [0, 1, 2, 2]


def test_parts_begun_for_another_model_are_not_used(tmp_path: Path) -> None:
    def stop(part: int) -> pa.Table:
        if part == 1:
            raise KeyboardInterrupt
        return part_of(part)

    with pytest.raises(KeyboardInterrupt):
        stored_once(tmp_path / "store", {**IDENTITY, "samples": 6, "keys": {**KEYS, "model": "other"}}, 2, stop)
    made: list[int] = []
    stored_once(tmp_path / "store", {**IDENTITY, "samples": 6}, 2, lambda part: made.append(part) or part_of(part))
    assert made == [0, 1]


def test_parts_that_were_cut_otherwise_are_not_used(tmp_path: Path) -> None:
    def stop(part: int) -> pa.Table:
        if part == 1:
            raise KeyboardInterrupt
        return part_of(part)

    meta, made = {**IDENTITY, "samples": 6}, list[int]()
    with pytest.raises(KeyboardInterrupt):
        stored_once(tmp_path / "store", meta, 2, stop, plan=[4, 2])
    stored_once(tmp_path / "store", meta, 2, lambda part: made.append(part) or part_of(part), plan=[3, 3])
    assert made == [0, 1]


def test_a_store_of_another_identity_is_refused_and_kept(tmp_path: Path) -> None:
    before = (filled(tmp_path / "store").path / FILE).read_bytes()
    for change in ({"keys": {**KEYS, "template": "other"}}, {"k": 5}, {"origin": "own", "sampling": {"seed": 1}}):
        with pytest.raises(DataError, match=f"made with {next(iter(change))} .*stale"):
            stored_once(tmp_path / "store", {**IDENTITY, "samples": 6, **change}, 3, part_of)
    assert (tmp_path / "store" / FILE).read_bytes() == before


def broken_stores() -> Iterator[tuple[str, Any]]:
    whole = {**IDENTITY, "schema": 1, "samples": 6, "tokens": ROWS, "seconds": 0.1}
    table = part_of(0).cast(COLUMNS)
    yield "schema 2", table.replace_schema_metadata({META: json.dumps({**whole, "schema": 2})})
    yield "with columns sample, position", table.drop_columns("role").replace_schema_metadata({META: json.dumps(whole)})
    text = table.set_column(3, "logprob", table["logprob"].cast(pa.string()))
    yield "of another type: logprob", text.replace_schema_metadata({META: json.dumps(whole)})
    lacks = {name: value for name, value in whole.items() if name != "k"}
    yield "of another type: k", table.replace_schema_metadata({META: json.dumps(lacks)})
    yield "too small or of another type: k", table.replace_schema_metadata({META: json.dumps({**whole, "k": 1})})
    yield "names no model", table.replace_schema_metadata({META: "[1]"})
    yield "6 of 7 tokens", table.slice(0, 6).replace_schema_metadata({META: json.dumps({**whole, "samples": 6})})
    yield "names no model", table
    yield "names no model", table.replace_schema_metadata({META: "{"})
    yield "not whole or no parquet file", b"PAR1 and then nothing"


@pytest.mark.parametrize(
    ("said", "content"), broken_stores(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_no_whole_store_of_this_schema_is_refused_in_one_line(tmp_path: Path, said: str, content: Any) -> None:
    if isinstance(content, bytes):
        (tmp_path / FILE).write_bytes(content)
    else:
        pq.write_table(content, tmp_path / FILE)
    with pytest.raises(DataError, match=said) as caught:
        TokenStore(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_holds_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="something else"):
        filled(tmp_path / "store")
    with pytest.raises(DataError, match="is missing"):
        TokenStore(tmp_path / "store")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="something else"):
        filled(tmp_path / "file")
    assert (tmp_path / "store" / "thesis.tex").read_text() == "years of work"


def test_nothing_trained_is_an_error_and_leaves_no_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every loss mask is empty"):
        stored_once(tmp_path / "store", {**IDENTITY, "samples": 1}, 1, lambda part: part_of(0).slice(0, 0))
    assert not (tmp_path / "store").exists()


def test_a_flipped_bit_anywhere_in_the_numbers_is_named(tmp_path: Path) -> None:
    """Each was read as another number before, or ended in a traceback."""
    store = write_store(tmp_path, **random_columns(20, 30))
    file = tmp_path / "tokens.parquet"
    whole = file.read_bytes()
    pages = pq.read_metadata(file).row_group(0)
    assert len(list(store.batches())) == 1
    for column in range(pages.num_columns):
        chunk = pages.column(column)
        damaged = bytearray(whole)
        damaged[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 2] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="tokens.parquet is not whole"):
            list(store.batches())
