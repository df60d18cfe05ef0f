"""Reading: strict about bytes, exact about row numbers, and clear about what cannot be reached."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eaft_verl.data.sources import count_rows, iter_rows, read_rows, source_hash
from eaft_verl.errors import DataError

ROWS = [{"prompt": "é €", "response": "1"}, {"prompt": "b", "response": "2"}]


def test_three_file_types_give_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8-sig")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "parquet"):
        assert read_rows(str(tmp_path / f"a.{suffix}")) == ROWS


def test_what_a_file_is_shows_in_its_bytes(tmp_path):
    import gzip

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    packed = pa.compress(lines.encode(), codec="zstd", asbytes=True)
    contents = {
        **{"a.json": lines, "a.txt": lines, "noname": lines, "crlf.jsonl": "\ufeff" + lines.replace("\n", "\r\n")},
        **{"array.jsonl": json.dumps(ROWS), "pretty.jsonl": json.dumps(ROWS, indent=1), "a.ndjson": lines.rstrip()},
        **{"a.jsonl.gz": gzip.compress(lines.encode()), "b.json.gz": gzip.compress(json.dumps(ROWS).encode())},
        **{"a.jsonl.zst": packed, "w.json": json.dumps({"data": ROWS})},
        **{"cr.jsonl": lines.replace("\n", "\r"), "cr.json": "\ufeff" + lines.replace("\n", "\r\r")},
        "parts.jsonl.gz": b"".join(gzip.compress(part.encode()) for part in ("\ufeff", lines[:9], lines[9:])),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert read_rows(str(tmp_path / name)) == ROWS, name
        assert count_rows(str(tmp_path / name)) in (None, len(ROWS)), name
    (tmp_path / "turns.json").write_text('[[{"from": "human", "value": "Hi"}]]')
    assert read_rows(str(tmp_path / "turns.json")) == [{"messages": [{"from": "human", "value": "Hi"}]}]


@pytest.mark.parametrize("name", ["UTF-16", "UTF-16-LE", "UTF-16-BE", "UTF-32"])
def test_other_encodings_are_named(tmp_path, name):
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "x"}'.encode(name))
    with pytest.raises(DataError, match=f"is {name[:6]}; convert the file to UTF-8"):
        read_rows(str(tmp_path / "a.jsonl"))


def test_a_list_a_line_is_a_row_a_line(tmp_path):
    """Conversations without a name around them: none is taken for the whole file."""
    said = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "A"}] for n in range(3)]
    asked = [[{"from": "human", "value": f"{n}"}, {"from": "gpt", "value": "A"}] for n in range(3)]
    for name, turns in (("a.jsonl", said), ("b.json", said), ("c.txt", asked)):
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in turns))
        assert read_rows(str(tmp_path / name)) == [{"messages": one} for one in turns]
    (tmp_path / "one.jsonl").write_text(json.dumps(said[0]))
    assert read_rows(str(tmp_path / "one.jsonl")) == [{"messages": said[0]}]
    (tmp_path / "rows.json").write_text(json.dumps(ROWS) + "\n \n")
    assert read_rows(str(tmp_path / "rows.json")) == ROWS


def test_folders_of_shards_globs_and_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for number, row in enumerate(ROWS):
        (tmp_path / "data" / f"train-0000{number}.jsonl").write_text(json.dumps(row))
    (tmp_path / "README.md").write_text("x")
    assert read_rows(str(tmp_path)) == ROWS
    assert source_hash(str(tmp_path)) == source_hash(str(tmp_path / "data" / "*.jsonl"))
    (tmp_path / "data" / "test-00000.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(DataError, match="holds the splits test, train; name one"):
        read_rows(str(tmp_path))
    assert read_rows(str(tmp_path / "data" / "*test*")) == ROWS[:1]
    with pytest.raises(DataError, match="is not a file and matches none"):
        read_rows(str(tmp_path / "*.parquet"))


def test_addresses_go_through_fsspec():
    import fsspec

    with fsspec.open("memory://shards/a.jsonl.gz", "wb", compression="gzip") as stream:
        stream.write(json.dumps(ROWS[0]).encode())
    with fsspec.open("memory://shards/b.jsonl", "wb") as stream:
        stream.write(json.dumps(ROWS[1]).encode())
    assert read_rows("memory://shards") == ROWS
    assert read_rows("memory://shards/b.jsonl") == ROWS[1:]
    assert source_hash("memory://shards/b.jsonl") == hashlib.sha256(json.dumps(ROWS[1]).encode()).hexdigest()
    for source in ("memory://none", "nosuch://a/b.jsonl"):
        with pytest.raises(DataError) as caught:
            read_rows(source)
        assert "\n" not in str(caught.value)


def test_a_long_array_is_read_element_by_element(tmp_path):
    rows = [{"prompt": "é" * 300_000, "response": str(number), "n": 1.5} for number in range(12)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    found = iter_rows(str(tmp_path / "a.json"))
    assert next(found) == rows[0] and list(found) == rows[1:]
    assert count_rows(str(tmp_path / "a.json")) is None and count_rows("generate:neutral_prompts") > 5


def test_source_hash_is_of_the_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n')
    assert source_hash(str(path)) == hashlib.sha256(b'{"a": 1}\n').hexdigest()


def _parquet_with_bad_text(path):
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe")]
    )
    pq.write_table(pa.table({"prompt": bad, "response": bad}), path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"p": "x"}\n\n{"p": "\xff"}\n', r"row 2 \(line 3\) is not valid UTF-8 .byte 0xff at column 8"),
        ("a.jsonl", b'{"p": "x"}\n{"p": "\0"}\n', r"row 2 \(line 2\) holds a NUL byte at column 8"),
        ("a.jsonl", b'{"p": "x"}\n{"p": \n', r"row 2 \(line 2\) is not valid JSON"),
        ("a.jsonl", b'{"p": "x"}\n[1]\n', "row 2 is list; every row must be an object"),
        ("a.json", b'[{"p": "x"}, {"p": "\xff"}]', "row 2 is not valid UTF-8"),
        ("a.json", b'[{"p": "x"}, {"p": "\0"}]', "row 2 holds a NUL byte"),
        (
            "a.jsonl",
            b'{"p": 1}\r{"p": 1, "q": 2, "p": 3}\r',
            r"row 2 .line 1. is not valid JSON .the key 'p' stands twice",
        ),
        ("a.json", b'[{"p": {"x": 1, "x": 1}}]', "is not valid JSON .the key 'x' stands twice in one object"),
        ("a.json", b'{"data": [], "data": []}', "the key 'data' stands twice in one object"),
        ("a.jsonl.bz2", b"BZh91AY", "has suffix '.bz2'; readable are"),
        ("a.json", b'{"p": "x"}', "holds dict; a list of objects"),
        ("a.json", b'[{"p": ', "is not valid JSON"),
        ("a.json", b'[{"p": 1}]\n{"p": 2}\n', "goes on behind its list of 1 rows ..{.p.: 2}.*or a row a line"),
        ("a.json", b'[{"p": 1}, {"p": 2}]]', "goes on behind its list of 2 rows"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
        ("a.parquet", b"PAR1 no", "not a readable parquet file"),
        ("a.parquet", _parquet_with_bad_text, "row 2 is not valid UTF-8"),
        ("a.csv", b"a,b", "suffix '.csv'; readable are .jsonl, .json, .parquet"),
    ],
)
def test_unreadable_files(tmp_path, name, content, reason):
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_rows(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/missing/x", "org/missing.parquet", "~/x"])
def test_missing_path_is_never_tried_as_hub_id(source):
    with pytest.raises(DataError, match="is not a file; give an existing"):
        read_rows(source)


def test_folder_and_nonsense_are_no_hub_ids(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        read_rows(str(tmp_path))
    with pytest.raises(DataError, match="neither a local file nor a hub id"):
        read_rows("just a name")


def test_hub_offline(monkeypatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match="'some-org/some-set:main' is neither a local file nor reachable as hub data set; "
    ):
        read_rows("some-org/some-set:main")


def test_generated_rows_are_a_source():
    rows = read_rows("generate:neutral_prompts")
    assert rows and all(isinstance(row, dict) for row in rows)
    assert source_hash("generate:neutral_prompts") == source_hash("generate:neutral_prompts")


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(["Q"]), pa.array(["A"]), pa.array(["B"])], names=["prompt", "response", "response"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns named 'response'"):
        read_rows(str(tmp_path / "a.parquet"))


def test_one_row_over_several_lines_is_one_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
    assert read_rows(str(tmp_path / "a.json")) == [row]
