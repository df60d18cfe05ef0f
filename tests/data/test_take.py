"""Rows on several cores: the same data set as on one, in the same order; and what training opens of it."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from template_families import tokenizer_of

from eaft_verl.data import take
from eaft_verl.data.leakage import Against
from eaft_verl.data.parquet import Example, Examples, read_examples, to_batch, write_batches
from eaft_verl.data.prepare import load_prepared, prepare
from eaft_verl.data.spec import DataSpec
from eaft_verl.errors import DataError


@pytest.fixture
def source(tmp_path):
    rows = [{"id": str(n % 900), "prompt": f"Q{n % 1400}", "response": "A" * (n % 7)} for n in range(2100)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_several_processes_make_the_file_that_one_makes(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    against = Against({"bench": ["Q8", "one two three four five six seven eight"]})
    many = prepare(DataSpec(source), tokenizer_of("chatml"), tmp_path / "many.parquet", against)
    assert "2100/2100" in capsys.readouterr().err
    monkeypatch.setattr(take, "_ALONE", 10**6)
    one = prepare(DataSpec(source), tokenizer_of("chatml"), tmp_path / "one.parquet", against)
    assert many.key == one.key and many.manifest == one.manifest
    counts = many.manifest["counts"]
    assert counts["rejected"] == {"empty_assistant": 300, "duplicate": 600}  # the last 700 less 100
    assert len({example.id for example in many.examples}) == len(many.examples) == counts["kept"] == 1200
    assert many.manifest["leakage"]["against"]["bench"]["ids"] == ["8"]


def test_a_killed_process_is_one_line(monkeypatch):
    def die(_):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataError, match="a process that takes rows was killed"):
        list(take.in_order(die, iter([[], []]), 2))


def test_examples_are_views_of_a_map(source, tmp_path):
    prepared = prepare(DataSpec(source), tokenizer_of("chatml"), tmp_path / "t.parquet")
    examples = prepared.examples
    assert isinstance(examples, Examples)
    lengths = [len(one.input_ids) for one in examples]
    assert examples.lengths.tolist() == lengths and examples.trained.tolist() == [sum(o.loss_mask) for o in examples]
    assert examples[-1].id == examples[len(examples) - 1].id and [o.id for o in examples[3:5]] == [
        examples[3].id,
        examples[4].id,
    ]
    with pytest.raises(IndexError):
        examples[len(examples)]
    (mapped,) = tmp_path.glob(".t.*.arrow")
    mapped.unlink()  # made again from the parquet file
    assert load_prepared(tmp_path / "t.parquet").examples == examples
    assert sum(1 for _ in tmp_path.glob(".t.*.arrow")) == 1
    (mapped,) = tmp_path.glob(".t.*.arrow")
    whole = mapped.read_bytes()
    for damage in (b"", whole[:-100], whole.replace(bytes(examples[0].input_ids), bytes(len(lengths)), 1), b"foreign"):
        mapped.unlink()  # it may still be mapped
        mapped.write_bytes(damage)
        assert load_prepared(tmp_path / "t.parquet").examples == examples, "never used as it is"
        assert mapped.read_bytes() == whole
    (tmp_path / "u.parquet").write_bytes((tmp_path / "t.parquet").read_bytes())
    assert np.array_equal(read_examples(tmp_path / "u.parquet").lengths, examples.lengths)


_OPEN = """
import re, sys
from array import array
from pathlib import Path
from eaft_verl.data.parquet import read_examples

def anonymous():
    return int(re.search("RssAnon:[ \\t]+([0-9]+)", Path("/proc/self/status").read_text())[1])

before = anonymous()
examples = read_examples(Path(sys.argv[1]), sys.argv[2])
assert examples.lengths.sum() == 600 * len(examples)
for index in range(0, len(examples), 97):
    one = examples[index]
    assert type(one.input_ids) is type(one.loss_mask) is array and one.input_ids[599] == 599
print(len(examples), anonymous() - before)
"""


def test_opening_takes_the_same_memory_for_ten_times_the_rows(tmp_path):
    """Maps of 6 and 60 MB opened, counted and read here and there, each in a process of its own."""
    rows = to_batch([Example(str(n), [], range(600), [0] + [1] * 599) for n in range(500)])
    held = {}
    for times in (4, 40):
        path = tmp_path / f"{times}.parquet"
        key = write_batches(path, lambda times=times: iter([rows] * times))
        read_examples(path, key)
        (mapped,) = tmp_path.glob(f".{times}.*.arrow")
        assert mapped.stat().st_size > times * 500 * 600 * 5
        command = [sys.executable, "-c", _OPEN, str(path), key]
        count, kilobytes = subprocess.run(command, check=True, timeout=600, capture_output=True).stdout.split()
        assert int(count) == times * 500
        held[times] = int(kilobytes)
    assert held[40] - held[4] < 4_000, held
