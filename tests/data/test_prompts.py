"""Prepared data as GRPO prompts: what is written, and every row that cannot be asked."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from eaft_verl.data.prepare import manifest_path, prepare
from eaft_verl.data.prompts import write_prompts
from eaft_verl.data.spec import DataSpec
from eaft_verl.errors import ConfigError, DataError
from eaft_verl.grading.process import Grade, GradingProcess

GOOD = [
    {"id": "a", "prompt": "What is 3 + 4?", "response": "3 + 4 = 7\n#### 7"},  # answer from the mark
    {"id": "b", "prompt": "Half?", "response": "It is 1/2.", "answer": "0.5"},
    {"question": "Twice 4?", "answer": "2 * 4 = 8\n#### 8"},  # GSM8K: the response is the field `answer`
    {"instruction": "Add", "input": "1 2", "output": r"\boxed{3}"},  # Alpaca
    {
        "id": "shots",
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
        ],
        "answer": 4,
    },
]


@pytest.fixture
def write(tmp_path, make_tokenizer):
    """write(rows, grader, ...) -> path of the prompts."""

    def write(rows, grader="number", length=200, template="chatml", **options):
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepared = prepare(DataSpec(str(source), **options), make_tokenizer(template), tmp_path / "t.parquet")
        path = tmp_path / "out" / "prompts.parquet"
        tokenizer = make_tokenizer(template)
        assert write_prompts(prepared, path, max_prompt_length=length, tokenizer=tokenizer, grader=grader) == path
        assert [row["extra_info"]["id"] for row in pq.read_table(path).to_pylist()] == [
            example.id for example in prepared.examples if example.id not in dropped(path)
        ]
        return path

    return write


def dropped(path: Path) -> list[str]:
    return [entry["id"] for entry in json.loads(manifest_path(path).read_text())["dropped"]]


def test_rows_are_what_verl_reads(write):
    rows = pq.read_table(write(GOOD)).to_pylist()
    assert [row["reward_model"] for row in rows] == [
        {"style": "rule", "ground_truth": truth} for truth in ("7", "0.5", "8", "3", "4")
    ]
    assert rows[0]["prompt"] == [{"role": "user", "content": "What is 3 + 4?"}]
    assert rows[3]["prompt"] == [{"role": "user", "content": "Add\n1 2"}]
    assert [turn["content"] for turn in rows[4]["prompt"]] == ["S", "1 + 1?", "2", "2 + 2?"]
    assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert {row["data_source"] for row in rows} == {"eaft_verl"}


def test_a_prompt_is_how_the_sft_row_begins(write, make_tokenizer, tmp_path):
    from eaft_verl.data.parquet import read_examples

    rows = pq.read_table(write(GOOD)).to_pylist()
    tokenizer = make_tokenizer()
    for row, example in zip(rows, read_examples(tmp_path / "t.parquet"), strict=True):
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(example.input_ids).startswith(text)


def test_manifest(write, tmp_path):
    manifest = json.loads(manifest_path(write(GOOD, length=90)).read_text())
    prepared = json.loads((tmp_path / "t.manifest.json").read_text())
    assert manifest["prepared_sha256"] == prepared["parquet_sha256"]
    assert (manifest["grader"], manifest["max_prompt_length"], manifest["prompts"]) == ("number", 90, 5)
    assert manifest["dropped"] == [] and 20 < manifest["longest"] <= 90


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOL_TURNS = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "7"},
]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "Q", "response": "It is 7"}, {}, "1 rows: give every row an `answer`.*row x: it has no `answer`"),
        ({"prompt": "Q", "response": "7", "answer": "  "}, {}, "it has no `answer`"),
        ({"prompt": "Q", "response": "7", "answer": "seven"}, {}, "correct these answers.*'seven' cannot be graded by"),
        ({"prompt": "Q", "response": "7", "answer": "7 or 8"}, {}, "it is not one number"),
        ({"prompt": "Q", "response": "Paris", "answer": "Paris"}, {"grader": "choice"}, "it is not a letter"),
        ({"prompt": "Q", "response": "It is 8.", "answer": "7"}, {}, "reward 0 for answer '7'; it ends in 'It is 8.'"),
        ({"prompt": "q" * 200, "response": "7", "answer": "7"}, {}, "prompt has 2.. tokens, allowed are 200"),
        ({"messages": TOOL_TURNS, "answer": "7"}, {"template": "thinking"}, "3 turns answer the last user turn"),
        ({"prompt": "Q", "response": "raise", "answer": "7"}, {"grader": "operator:truediv"}, "the grader raises on"),
    ],
)
def test_rows_that_cannot_be_asked(write, row: dict, options: dict, message: str):
    if "messages" in row:
        options = {**options, "turns": "split"}
    with pytest.raises(DataError, match=f"(?s)of . rows cannot be GRPO prompts.*{message}"):
        write([GOOD[1] if "grader" not in options else row, {"id": "x", **row}], **options)


def test_long_prompts_are_dropped_where_the_data_says_so(write):
    path = write([GOOD[0], {"id": "long", "prompt": "q" * 200, "response": "#### 7"}], over_long="drop", length=100)
    assert dropped(path) == ["long"]
    with pytest.raises(DataError, match="none of 2 prompts fits in 5 tokens"):
        write([GOOD[0], {"id": "long", "prompt": "q" * 200, "response": "#### 7"}], over_long="drop", length=5)


def test_three_rows_of_each_fault_are_named(write):
    rows = [{"prompt": f"Q{n}", "response": "8", "answer": "7"} for n in range(5)]
    rows += [{"prompt": f"P{n}", "response": "8"} for n in range(2)]
    with pytest.raises(DataError) as caught:
        write(rows)
    assert str(caught.value).count("\n  row ") == 5
    assert "\n5 rows: correct or remove" in str(caught.value) and "\n2 rows: give every row" in str(caught.value)


def test_an_unknown_grader_is_no_data_error(write):
    with pytest.raises(ConfigError, match="choose one of number"):
        write(GOOD, grader="numbr")


def test_a_grader_that_hangs_ends_after_three_rows_not_after_all(write, monkeypatch):
    asked, hang = [], {"Q2", "Q5", "Q6", "Q7", "Q8", "Q9"}

    class Slow(GradingProcess):
        def grade(self, response: str, answer: str) -> Grade:
            asked.append(response)
            return Grade(0.0, "timeout") if response in hang else Grade(1.0)

    monkeypatch.setattr("eaft_verl.data.prompts.GradingProcess", Slow)
    rows = [{"id": f"r{n}", "prompt": "Q", "response": f"Q{n}", "answer": "7"} for n in range(10)]
    with pytest.raises(DataError, match="'number' hangs or crashes on 3 demonstrations .* the last of them of row r7;"):
        write(rows)
    assert asked == [f"Q{n}" for n in range(8)]
