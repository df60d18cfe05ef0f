"""What `--show` prints of a sample, from a store written by hand."""

import io
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny

from eaft_verl.analysis.store import COLUMNS, TokenStore, stored_once
from eaft_verl.analysis.xray import show_samples
from eaft_verl.data.encode import encode
from eaft_verl.data.parquet import Example

ANSWER = "7\x1b[31m\n"


@pytest.fixture
def shown(tmp_path: Path) -> tuple[TokenStore, Example, Any]:
    tokenizer = tiny.tiny_tokenizer()
    messages = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": ANSWER}]
    (one,) = encode(tokenizer, messages, 400)
    example = Example("row\x1b]0;title\x07", messages, one.input_ids, one.loss_mask)
    positions = [t for t, kept in enumerate(one.loss_mask) if kept]
    size = len(positions)
    numbers = {name: [0.0] * size for name in ("full_entropy", "max_prob", "sum_p2", "top_k_mass")}
    columns = {
        **{"sample": [0] * size, "position": positions, "token": [one.input_ids[t] for t in positions]},
        **{"logprob": [math.log(0.1)] * size, "entropy": [0.25 * math.log(20)] * size, "argmax": [0] * size},
        **{"role": ["assistant"] * size, "source": [""] * size, **numbers},
    }
    table = pa.table({name: columns[name] for name in COLUMNS.names})
    meta = {"model": "m", "keys": {}, "k": 20, "vocab": 384, "origin": "data", "sampling": None, "samples": 1}
    return stored_once(tmp_path / "store", meta, 1, lambda part: table), example, tokenizer


def test_a_trained_token_is_a_line_with_probability_entropy_and_weight(shown: tuple[TokenStore, Example, Any]) -> None:
    stream = io.StringIO()
    show_samples(shown[0], [shown[1]], shown[2], 5, stream)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert lines[0] == f"--- data 1/1  row\\x1b]0;title\\x07  {len(shown[1].input_ids)} tokens, 8 trained"
    assert lines[1].split() == ["role", "p", "H", "weight", "token"]
    context = [line for line in lines if line.endswith("not trained)")]
    assert context[1].split()[:2] == ["user", "x" * 30] and "... " + "x" * 30 in context[1]
    rows = [line for line in lines[2:] if line not in context]
    assert rows[0] == "assistant   0.100  0.749  0.250  7"
    assert [row.split()[-1] for row in rows] == ["7", "\\x1b", "[", "3", "1", "m", "⏎", "<|im_end|>"]
    assert rows[-1].split()[0] == "template"


def test_nothing_that_steers_a_terminal_is_printed(shown: tuple[TokenStore, Example, Any]) -> None:
    stream = io.StringIO()
    show_samples(shown[0], [shown[1]], shown[2], 1, stream)
    assert all(one.isprintable() or one == "\n" for one in stream.getvalue())
