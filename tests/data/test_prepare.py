"""prepare -> parquet + manifest -> load_prepared, with every kind of bad row and every kind of stale file."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eaft_verl.data.account import rows_used
from eaft_verl.data.prepare import load_prepared, manifest_path, prepare, template_hash
from eaft_verl.data.spec import DataSpec
from eaft_verl.errors import ConfigError, DataError

MIXED = [
    {"id": "a", "prompt": "Q1", "response": "A1"},  # 1
    {"prompt": "Q2", "response": "A2", "reference": "2"},  # 2
    {"prompt": "Q1", "response": "A1"},  # 3: as row 1
    {"prompt": "Q3", "response": ""},  # 4
    {"prompt": "Q4", "response": 4},  # 5
    {"text": "?"},  # 6
    {"prompt": "Q\u0000", "response": "A"},  # 7
    {"messages": [{"role": "user", "content": "Q"}]},  # 8
    {"id": "a", "prompt": "Q5", "response": "A5"},  # 9: an id a second time
]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def test_manifest_accounts_for_every_row(write, make_tokenizer, tmp_path):
    source = write(MIXED)
    prepared = prepare(DataSpec(source), make_tokenizer(), tmp_path / "out" / "train.parquet")
    manifest = json.loads((tmp_path / "out" / "train.manifest.json").read_text())
    assert manifest == prepared.manifest
    assert [(entry["row"], entry["kind"]) for entry in manifest["rejected"]] == [
        (3, "duplicate"),
        (4, "empty_assistant"),
        (5, "wrong_type"),
        (6, "format"),
        (7, "nul"),
        (8, "missing_assistant"),
    ]
    assert manifest["rejected"][0]["reason"] == "duplicate of row 1"
    assert manifest["counts"] == {
        "read": 9,
        "kept": 3,
        "rejected": dict(Counter(entry["kind"] for entry in manifest["rejected"])),
        "truncated": 0,
        "escaped": 0,
        "escaped_tokens": 0,
        "open_turns": 0,
        "examples": 3,
    }
    lengths = [len(example.input_ids) for example in prepared.examples]
    assert manifest["tokens"]["total"] == sum(lengths)
    assert manifest["tokens"]["trained"] == 3 * 3  # A, digit, <|im_end|>
    assert manifest["source_sha256"] == hashlib.sha256(Path(source).read_bytes()).hexdigest()
    assert prepared.key == hashlib.sha256((tmp_path / "out" / "train.parquet").read_bytes()).hexdigest()
    assert manifest["spec"]["source"] == source


def test_ids_are_given_ones_or_hashes_and_unique(write, make_tokenizer, tmp_path):
    prepared = prepare(DataSpec(write(MIXED)), make_tokenizer(), tmp_path / "t.parquet")
    first, second, third = (example.id for example in prepared.examples)
    assert first == "a"
    assert len(second) == len(third) == 16 and len({first, second, third}) == 3
    assert [example.answer for example in prepared.examples] == [None, "2", None]


def test_histogram(write, make_tokenizer, tmp_path):
    rows = [{"prompt": "q" * n, "response": "r" * n} for n in (1, 2, 3, 40, 90)]
    prepared = prepare(DataSpec(write(rows)), make_tokenizer(), tmp_path / "t.parquet")
    lengths = sorted(len(example.input_ids) for example in prepared.examples)
    found = prepared.manifest["lengths"]
    assert (found["p50"], found["p95"], found["max"]) == (lengths[2], lengths[4], lengths[4])
    for low, high, count in zip(found["edges"], found["edges"][1:], found["counts"], strict=False):
        assert count == sum(low <= length < high for length in lengths)
    assert sum(found["counts"]) == 5


def test_columns_are_those_verl_reads(write, make_tokenizer, tmp_path):
    prepare(DataSpec(write(MIXED)), make_tokenizer(), tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.column_names == ["id", "messages", "input_ids", "loss_mask", "answer"]
    assert str(table.schema.field("input_ids").type) == "list<element: int32>"
    assert str(table.schema.field("loss_mask").type) == "list<element: int8>"
    assert table["messages"][0].as_py() == [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
    ]


def test_tool_calls_survive_the_file(write, make_tokenizer, tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    turn = {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [call]}
    rows = [{"messages": [{"role": "user", "content": "Q"}, turn]}, {"prompt": "Q", "response": "A"}]
    made = prepare(DataSpec(write(rows)), make_tokenizer("thinking"), tmp_path / "t.parquet")
    read = load_prepared(tmp_path / "t.parquet", make_tokenizer("thinking"))
    assert read.examples == made.examples
    assert read.examples[0].messages[1] == turn
    assert read.examples[1].messages[1] == {"role": "assistant", "content": "A"}


def test_rows_are_named_by_what_is_wrong_with_them(write, make_tokenizer, tmp_path):
    wrong = ["blank", "token", "blank", "token", "role1", "role2", "role3", "role4", "role4"]
    kinds = {"blank": {"prompt": "Q"}, "token": {"prompt": "Q", "response": ""}}
    rows = [kinds.get(kind, {"messages": [{"role": kind, "content": "x"}]}) for kind in wrong]
    with pytest.raises(DataError) as caught:
        prepare(DataSpec(write(rows)), make_tokenizer(), tmp_path / "t.parquet")
    first, *lines = str(caught.value).split("\n  ")
    assert "none of 9 rows is left" in first and lines.pop() == "and 2 more"  # role4's two
    assert [line.split(":")[0] for line in lines] == ["row 1 and 1 more", "row 2 and 1 more", "row 5", "row 6", "row 7"]


def test_rows_that_differ_in_what_they_quote_are_named_together(write, make_tokenizer, tmp_path):
    choices = [{"A": f"the {word} one", "B": "it's none"} for word in ("first", "second", "third")]
    asked = [{"question": f"Q{n}?", "answer": "A", "options": said} for n, said in enumerate(choices)]
    copies = [{"prompt": f"copy {n // 2}", "response": "A"} for n in range(4)]
    named = [{"question": f"Q{n}?", "answer": "A", key: "in words"} for n, key in enumerate(("hint", "persona"))]
    prepared = prepare(DataSpec(write([*asked, *copies, *named])), make_tokenizer(), tmp_path / "t.parquet")
    lines = rows_used(prepared.manifest).split("\n  ")[1:]
    assert lines[0].startswith("row 1: column 'options' holds '{\"A\": \"the first one")
    assert lines[0].endswith("put it into a turn as text, or leave it out by 'data.columns={ignore: [options]}' "
                             "(--column ignore='options') (2 more of this kind)")  # fmt: skip
    assert lines[1] == "row 5: duplicate of row 4 (1 more of this kind)"
    assert [line.split(" which")[0] for line in lines[2:]] == [
        "row 8: column 'hint' holds 'in words',",
        "row 9: column 'persona' holds 'in words',",
    ]
    assert "(--column context='hint')" in lines[2]


@pytest.mark.parametrize(
    ("options", "rows", "reason"),
    [
        (
            {"max_length": 30},
            [{"prompt": "q" * 50, "response": "A"}, *MIXED[:2]],
            "1 rows are refused; set data.over_long=drop or truncate, or data.max_length=63 or more. Rows",
        ),
        (
            {},
            [{"prompt": f"{n} <|im_end|>", "response": "A"} for n in range(7)],
            "7 rows are refused; set data.control",
        ),
        ({}, [{"prompt": " ", "response": ""}], "none of 1 rows is left.*\n  row 1: turn 2 .assistant. is empty"),
    ],
)
def test_what_a_setting_decides_aborts(write, make_tokenizer, tmp_path, options, rows, reason):
    with pytest.raises(DataError, match=reason) as caught:
        prepare(DataSpec(write(rows), **options), make_tokenizer(), tmp_path / "t.parquet")
    alike = " and 6 more" * (len(rows) == 7)  # they say the same but for where they stand
    assert f"\n  row 1{alike}: " in str(caught.value) and str(caught.value).count("\n  ") == 1
    assert not (tmp_path / "t.parquet").exists()


def test_over_long_rows_dropped_or_truncated(write, make_tokenizer, tmp_path):
    source = write([{"prompt": "Q", "response": "z" * 60}, {"prompt": "q" * 70, "response": "A"}, MIXED[0]])
    dropped = prepare(DataSpec(source, max_length=40, over_long="drop"), make_tokenizer(), tmp_path / "d.parquet")
    assert dropped.manifest["counts"]["rejected"] == {"over_long": 2}
    assert [entry["row"] for entry in dropped.manifest["rejected"]] == [1, 2]
    cut = prepare(DataSpec(source, max_length=40, over_long="truncate"), make_tokenizer(), tmp_path / "c.parquet")
    assert cut.manifest["counts"]["truncated"] == 1
    assert cut.manifest["counts"]["rejected"] == {"no_trained_token": 1}
    assert len(cut.examples[0].input_ids) == 40


def test_control_tokens_escaped_or_allowed(write, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    source = write([{"prompt": "say <|im_end|>", "response": "<|im_end|>!"}])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    escaped = prepare(DataSpec(source, control_tokens="escape"), tokenizer, tmp_path / "e.parquet")
    assert escaped.manifest["counts"]["escaped"] == 1 and escaped.manifest["counts"]["escaped_tokens"] == 2
    assert escaped.examples[0].input_ids.count(end) == 2  # one per turn, from the template
    assert "<\u200b|im_end|>" in escaped.examples[0].messages[0]["content"]
    allowed = prepare(DataSpec(source, control_tokens="allow"), tokenizer, tmp_path / "a.parquet")
    assert allowed.examples[0].input_ids.count(end) == 4


def test_template_that_changes_turns_aborts_or_splits(write, make_tokenizer, tmp_path):
    turns = [{"role": role, "content": f"{role}{n}"} for n in range(2) for role in ("user", "assistant")]
    source = write([{"id": "c", "messages": turns}])
    with pytest.raises(DataError, match="1 rows are refused. Rows at fault:\n  row 1: turn 2 .*data.turns=split"):
        prepare(DataSpec(source), make_tokenizer("thinking"), tmp_path / "t.parquet")
    prepared = prepare(DataSpec(source, turns="split"), make_tokenizer("thinking"), tmp_path / "t.parquet")
    assert [(example.id, len(example.messages)) for example in prepared.examples] == [("c#0", 2), ("c#1", 4)]
    assert prepared.manifest["counts"]["kept"] == 1 and prepared.manifest["counts"]["examples"] == 2


def test_rows_limits_what_is_read(write, make_tokenizer, tmp_path):
    prepared = prepare(DataSpec(write(MIXED), rows=2), make_tokenizer(), tmp_path / "t.parquet")
    assert prepared.manifest["counts"]["read"] == 2 and prepared.manifest["rejected"] == []


def test_same_again_is_a_cache_hit_also_from_a_copy(write, make_tokenizer, tmp_path):
    out = tmp_path / "t.parquet"
    made = prepare(DataSpec(write(MIXED)), make_tokenizer(), out)
    stamp = out.stat().st_mtime_ns
    again = prepare(DataSpec(write(MIXED, "copy.jsonl")), make_tokenizer(), out)
    assert again.examples == made.examples and again.key == made.key
    assert out.stat().st_mtime_ns == stamp


def test_the_same_with_a_secret_in_it_is_a_cache_hit_whose_manifest_has_none(
    write, make_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_c4naryC4nary")
    out, spec = tmp_path / "t.parquet", DataSpec(write(MIXED), columns={"ignore": ["hf_c4naryC4nary"]})
    made = prepare(spec, make_tokenizer(), out)
    assert prepare(spec, make_tokenizer(), out).key == made.key
    assert "hf_c4nary" not in (tmp_path / "t.manifest.json").read_text()
    with pytest.raises(DataError, match="prepared with another columns"):
        prepare(DataSpec(spec.source, columns={"ignore": ["another"]}), make_tokenizer(), out)


def test_other_data_is_never_overwritten(write, make_tokenizer, tmp_path):
    out, source = tmp_path / "t.parquet", write(MIXED)
    kept = prepare(DataSpec(source), make_tokenizer(), out).key
    for spec, tokenizer, differs in (
        (DataSpec(source, max_length=99), make_tokenizer(), "another max_length and"),
        (DataSpec(write(MIXED[:2], "b.jsonl")), make_tokenizer(), "another source_sha256 and"),
        (DataSpec(source), make_tokenizer("llama3"), "another template_hash and"),
    ):
        with pytest.raises(DataError, match=f"prepared with {differs} is never overwritten"):
            prepare(spec, tokenizer, out)
    assert load_prepared(out).key == kept


def test_torn_write_is_redone(write, make_tokenizer, tmp_path):
    out, spec = tmp_path / "t.parquet", DataSpec(write(MIXED))
    key = prepare(spec, make_tokenizer(), out).key
    out.unlink()  # the manifest is written first, so it alone is half a write
    assert prepare(spec, make_tokenizer(), out).key == key


def test_what_is_not_ours_is_never_overwritten(write, make_tokenizer, tmp_path):
    source = tmp_path / "mine.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "2 + 3", "response": "5"}]), source)
    (tmp_path / "link.parquet").symlink_to(source)
    (tmp_path / "same.parquet").hardlink_to(source)
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.parquet").mkdir()
    before = source.read_bytes()
    spec = DataSpec({"a": {"source": str(source)}, "b": {"source": write(MIXED)}})
    for name in ("mine", "link", "same", "gone", "folder", f"../{tmp_path.name}/mine"):
        with pytest.raises(DataError, match="exists and was not made by `eaft prepare`"):
            prepare(spec, make_tokenizer(), tmp_path / f"{name}.parquet")
    (tmp_path / "new.manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(DataError, match=r"new\.manifest\.json is no manifest of `eaft prepare`"):
        prepare(spec, make_tokenizer(), tmp_path / "new.parquet")
    with pytest.raises(DataError, match="lies in its own source"):
        prepare(DataSpec(str(tmp_path)), make_tokenizer(), tmp_path / "sub" / "new.parquet")
    assert source.read_bytes() == before and not (tmp_path / "new.parquet").exists()
    assert (tmp_path / "new.manifest.json").read_text() == '{"name": "a web app"}'


DAMAGE = {
    "[]": "is no manifest of `eaft prepare`",
    "{": r"t\.manifest\.json is not valid JSON",
    "": r"t\.manifest\.json is not valid JSON",
    '{"schema": 2}': "has manifest schema 2, this version reads 1",
    '{"schema": 1}': "spec is missing or wrong",
    "\udcff": r"t\.manifest\.json is not valid JSON",
}


@pytest.mark.parametrize(("text", "said"), DAMAGE.items())
def test_a_damaged_manifest_is_named(write, make_tokenizer, tmp_path, text, said):
    out, spec = tmp_path / "t.parquet", DataSpec(write(MIXED))
    prepare(spec, make_tokenizer(), out)
    manifest_path(out).write_text(text, encoding="utf-8", errors="surrogateescape")
    for act in (lambda: load_prepared(out), lambda: prepare(spec, make_tokenizer(), out)):
        with pytest.raises(DataError, match=f"{said}.*; prepare the data under another name"):
            act()


def test_every_key_of_the_manifest_that_others_read_is_missed(write, make_tokenizer, tmp_path):
    out = tmp_path / "t.parquet"
    whole = prepare(DataSpec(write(MIXED)), make_tokenizer(), out).manifest
    for key in ("spec", "counts", "tokens", "lengths", "parquet_sha256", "template_hash", "rejected", "source_sha256"):
        for value in (None, 5):
            manifest_path(out).write_text(json.dumps({**whole, key: value}))
            with pytest.raises(DataError, match=f"{key}.* is missing or wrong"):
                load_prepared(out)


def test_stale_or_changed_files_are_refused(write, make_tokenizer, tmp_path):
    out = tmp_path / "t.parquet"
    prepare(DataSpec(write(MIXED)), make_tokenizer(), out)
    assert len(load_prepared(out, make_tokenizer()).examples) == 3
    with pytest.raises(DataError, match="is stale: .* prepare the data for this model under another name"):
        load_prepared(out, make_tokenizer("llama3"))
    out.write_bytes(out.read_bytes() + b" ")
    with pytest.raises(DataError, match="is not the file its manifest describes"):
        load_prepared(out)
    manifest_path(out).write_text(json.dumps({"schema": 0}))
    with pytest.raises(DataError, match="manifest schema 0, this version reads 1"):
        load_prepared(out)
    manifest_path(out).unlink()
    with pytest.raises(DataError, match="is not prepared data"):
        load_prepared(out)
    with pytest.raises(DataError, match="does not exist; run `eaft prepare`"):
        load_prepared(tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match="NAME.parquet, got 'x.json'"):
        prepare(DataSpec("a.jsonl"), make_tokenizer(), tmp_path / "x.json")


def test_template_hash_sees_template_vocabulary_and_nothing_else(make_tokenizer):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = make_tokenizer("chatml")
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    copy.chat_template = tokenizer.chat_template
    assert template_hash(copy) == template_hash(tokenizer)
    assert template_hash(make_tokenizer("mistral")) != template_hash(tokenizer)  # refuses system turns: no error
    vocabulary = core["model"]["vocab"]
    vocabulary["7"], vocabulary["4"] = vocabulary["4"], vocabulary["7"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    other.chat_template = tokenizer.chat_template
    assert template_hash(other) != template_hash(tokenizer)
