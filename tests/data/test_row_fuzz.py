"""Whatever a row holds, it is taken or rejected with a reason: nothing else may come of 20,000 damaged rows."""

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from eaft_verl.data.accept import Taker
from eaft_verl.data.sources import read_rows
from eaft_verl.data.spec import DataSpec
from eaft_verl.errors import DataError

COUNT, CHUNK = 20_000, 125
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "2"}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "", "reasoning_content": "add", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
    {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "2."}], "weight": 1},
]
ROWS: list[dict[str, Any]] = [
    {"messages": TURNS, "tools": [TOOL], "id": "a", "answer": "2", "weight": 0.5, "chat_template_kwargs": {}},
    {"messages": json.dumps(TURNS[:2] + TURNS[-1:]), "tools": json.dumps([TOOL]), "train_mask": [0, 0, 1]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho", "loss": True}], "system": "s"},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": json.dumps(CALL)}]},
    {"instruction": "say", "input": "this", "output": "this", "history": [["a", "b"]], "idx": 7},
    {"question": "q", "reasoning": "because", "response": "r", "reference": 5, "options": ["a", "b"]},
]
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
NAMES = ["role", "from", "content", "tools", "weight", "é", "image", 5, "\ud800"]
ODD = [
    *(None, True, 0, -1, 1, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", " ", "a", "true", "user"),
    *("assistant", "\0", "\ud800", "a\udfffb", "<|im_end|>", "[", "{", "[1]", "{}", "null", "NaN", "9" * 5000),
    *("[" * 2000, '{"a":' * 2000, "x" * 600, "\u202e", "<think>", "</think>", b"bytes", (), [], {}, [[]], [None]),
    *({"": ""}, {"role": "user"}, {1: 2}, {None: "x"}, {"\ud800": "\udc00"}, {"name": 5}, ["function"], [1], DEEP, 5),
    *({"type": "text", "text": 5}, {"type": ["text"]}, {"function": {"name": "f", "arguments": "[1]"}}),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    inner = [place for _, item in pairs if isinstance(item, dict | list) for place in places(item)]
    return [(value, key) for key, _ in pairs] + inner


def damaged(draw: random.Random) -> dict[str, Any]:
    """A sound row with one to three of its parts replaced, removed, doubled or renamed."""
    row = copy.deepcopy(draw.choice(ROWS))
    for _ in range(draw.randint(1, 3)):
        if not (found := places(row)):
            break
        inside, key = draw.choice(found)
        match draw.randrange(6):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside[draw.choice(NAMES)] = inside.pop(key)
            case 2 if isinstance(inside, list):
                inside.insert(key, copy.deepcopy(inside[key]))
            case 3:
                inside[key] = [inside[key]]
            case _:
                inside[key] = copy.deepcopy(draw.choice(ODD))
    return row


@pytest.mark.parametrize("turns", ["whole", "split"])
def test_a_damaged_row_is_taken_or_rejected_with_a_reason(turns: str) -> None:
    draw, tokenizer = random.Random(turns), tiny.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    take, kinds = Taker(DataSpec("x", max_length=512, turns=turns), tokenizer), Counter[str]()
    for start in range(0, COUNT // 2, CHUNK):  # whatever is raised here is a defect
        for taken in take([(0, start + number, damaged(draw)) for number in range(CHUNK)]).rows:
            kinds[taken.fault[0] if taken.fault else "kept"] += 1
            assert bool(taken.fault) != bool(taken.examples)
            assert taken.fault is None or taken.fault[1].strip()
    assert kinds["kept"] > 500 and len(kinds) > 12, kinds


BAD_JSON = {
    "a number of more than 4,300 digits": '{"prompt": "p", "response": "r", "x": ' + "9" * 5000 + "}",
    "nested too deeply": '{"prompt": "p", "response": "r", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("form", ["%s\n", "[%s]", '[{"a": 1}, %s]', "%s"])
@pytest.mark.parametrize(("said", "row"), BAD_JSON.items(), ids=BAD_JSON)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_json_that_python_does_not_read_is_one_line_with_the_file(
    tmp_path: Path, name: str, said: str, row: str, form: str
) -> None:
    path = tmp_path / name
    path.write_text(form % row)
    with pytest.raises(DataError, match=rf"^{path}.*not valid JSON \({said}\)"):
        read_rows(str(path))


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": pa.array(["p"]), "response": pa.array(["r"]), "tools": pa.array([b"\xff"])},
        {"prompt": pa.array([b"p"]), "response": pa.array(["r"])},
        {"messages": pa.array([[("role", "user"), ("role", "x")]], pa.map_(pa.string(), pa.string()))},
        {"prompt": pa.array([2**62], pa.timestamp("us")), "response": pa.array(["r"])},
        {"prompt": pa.array(["p"]), "x": pa.array(["{"], pa.json_(pa.string()))},
        {"prompt": pa.array(["p"]), "x": pa.array(["[" * 100_000], pa.json_(pa.string()))},
    ],
)
def test_values_that_only_parquet_can_hold_are_refused_by_file_or_by_row(
    tmp_path: Path, columns: dict[str, pa.Array]
) -> None:
    pq.write_table(pa.table(columns), path := tmp_path / "x.parquet")
    refused = ""
    try:
        rows = read_rows(str(path))
    except DataError as error:
        refused = str(error)
    else:
        (taken,) = Taker(DataSpec("x"), tiny.tiny_tokenizer())([(0, 1, row) for row in rows]).rows
        assert taken.fault
    assert not refused or refused.startswith(f"{path} ")
