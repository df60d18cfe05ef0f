"""Several sources in one data set: shares, caps, weights, names, duplicates between them; columns kept and counted."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from template_families import tokenizer_of

from eaft_verl.data.mixture import choose
from eaft_verl.data.prepare import load_prepared, prepare
from eaft_verl.data.sources import read_rows
from eaft_verl.data.spec import DataSpec, Source
from eaft_verl.errors import DataError

CASES = Path(__file__).parents[3] / "shared" / "cases" / "data"


def kept(sources, available):
    """Rows of each source that are chosen."""
    source_N = np.repeat(np.arange(len(available)), available)
    digest_N = np.random.default_rng(0).permutation(len(source_N)).astype(np.uint64)
    chosen_N = choose([Source("x", **fields) for fields in sources], source_N, digest_N)
    return [int(chosen_N[source_N == index].sum()) for index in range(len(available))]


@pytest.mark.parametrize(
    ("sources", "available", "expected"),
    [
        ([{"name": "a"}, {"name": "b"}], [10, 20], [10, 20]),
        ([{"name": "a", "cap": 4}, {"name": "b", "cap": 99}], [10, 20], [4, 20]),
        ([{"name": "a"}, {"name": "b", "share": 0.1}], [90, 50], [90, 10]),  # 10 of 100
        ([{"name": "a", "cap": 45}, {"name": "b", "share": 0.1}], [90, 50], [45, 5]),
        ([{"name": "a"}, {"name": "b", "share": 0.25}, {"name": "c", "share": 0.25}], [10, 9, 9], [10, 5, 5]),
        ([{"name": "a", "share": 0.8}, {"name": "b", "share": 0.2}], [100, 10], [40, 10]),  # the largest with these
        ([{"name": "a", "share": 0.5}, {"name": "b", "share": 0.5, "cap": 3}], [100, 10], [3, 3]),
    ],
)
def test_rows_of_each_source(sources, available, expected):
    assert kept(sources, available) == expected


def test_a_share_that_cannot_be_had():
    with pytest.raises(
        DataError, match="b has 5 usable rows, and share 0.5 of 20 needs 10; lower its share .at most 0.25"
    ):
        kept([{"name": "a"}, {"name": "b", "share": 0.5}], [10, 5])


def test_a_choice_grows_by_adding_to_itself():
    digest_N = np.array([5, 1, 4, 2, 3], np.uint64)
    for cap, expected in ((1, [1]), (2, [1, 3]), (3, [1, 3, 4])):
        chosen_N = choose([Source("x", cap=cap)], np.zeros(5, np.int64), digest_N)
        assert np.flatnonzero(chosen_N).tolist() == expected


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def test_a_mixture_is_kept_and_accounted_by_source(write, tmp_path):
    medical = [{"Frage": f"M{n}", "Antwort": "A", "weight": 2} for n in range(9)]
    general = [{"prompt": f"G{n}", "response": "A", "topic": "x"} for n in range(5)] + [
        {"prompt": "M1", "response": "A"}
    ]
    source = {
        "medical": {"source": write("m.jsonl", medical), "columns": {"prompt": "Frage", "response": "Antwort"}},
        "general": {"source": write("g.jsonl", general), "share": 0.25, "weight": 0.5},
    }
    prepared = prepare(DataSpec(source), tokenizer_of("chatml"), tmp_path / "t.parquet")
    assert Counter(one.source for one in prepared.examples) == {"medical": 9, "general": 3}
    assert {one.source: one.weight for one in prepared.examples} == {"medical": 2.0, "general": 0.5}
    assert prepared.examples.weights.tolist() == [2.0] * 9 + [0.5] * 3
    manifest = prepared.manifest
    assert manifest["rejected"] == [
        {"row": 6, "kind": "duplicate", "reason": "duplicate of row 2 of medical", "source": "general"}
    ]
    assert manifest["columns_not_used"] == {"topic": 5}
    general = manifest["sources"]["general"]
    assert {key: general[key] for key in ("read", "kept", "left_out", "rejected", "examples")} == {
        **{"read": 6, "kept": 3, "left_out": 2, "rejected": {"duplicate": 1}, "examples": 3}
    }
    assert manifest["counts"]["kept"] == 12 and manifest["counts"]["read"] == 15
    assert general["tokens"]["trained"] == 3 * 2  # A, <|im_end|>
    again = load_prepared(tmp_path / "t.parquet", tokenizer_of("chatml"))
    assert again.examples == prepared.examples
    other = {**source, "general": {**source["general"], "share": 0.1}}
    with pytest.raises(DataError, match="prepared with another mixture and"):
        prepare(DataSpec(other), tokenizer_of("chatml"), tmp_path / "t.parquet")


def test_what_is_read_back_trains_the_same_turns(write, tmp_path):
    """Prepared files are evaluated from their messages: masks, ids and arguments of the template come along."""
    turns = [{"role": role, "content": f"{role}{n}"} for n in range(2) for role in ("user", "assistant")]
    row = {"messages": turns, "chat_template_kwargs": {"enable_thinking": False}}
    prepared = prepare(DataSpec(write("r.jsonl", [row]), turns="split"), tokenizer_of("qwen3"), tmp_path / "t.parquet")
    again = prepare(DataSpec(str(tmp_path / "t.parquet"), turns="split"), tokenizer_of("qwen3"), tmp_path / "u.parquet")
    assert [list(one.input_ids) for one in again.examples] == [list(one.input_ids) for one in prepared.examples]
    assert [list(one.loss_mask) for one in again.examples] == [list(one.loss_mask) for one in prepared.examples]
    assert prepared.examples[1].messages[1]["train"] is False
    assert prepared.examples[0].chat_template_kwargs == {"enable_thinking": False}


def test_a_split_row_that_is_over_long_loses_that_turn_only(write, tmp_path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    turns += [{"role": "user", "content": "long " * 99}, {"role": "assistant", "content": "B"}]
    source, tokenizer = write("r.jsonl", [{"messages": turns}]), tokenizer_of("chatml")
    spec = DataSpec(source, max_length=80, over_long="drop", turns="split")
    prepared = prepare(spec, tokenizer, tmp_path / "t.parquet")
    assert [one.messages[-1]["content"] for one in prepared.examples] == ["A"]
    assert prepared.manifest["turns_left_out"] == 1 and prepared.manifest["counts"]["kept"] == 1
    with pytest.raises(DataError, match="1 rows are refused; set data.over_long"):
        prepare(DataSpec(source, max_length=80, turns="split"), tokenizer, tmp_path / "u.parquet")


def test_what_ends_turns_stands_in_the_manifest(write, tmp_path):
    source = write("r.jsonl", [{"prompt": "Q", "response": "A"}, {"prompt": "Q2", "response": "A"}])
    manifest = prepare(DataSpec(source), tokenizer_of("glm4_5"), tmp_path / "t.parquet").manifest
    assert manifest["end_of_turn"] == {"<|user|>": 2} and manifest["counts"]["open_turns"] == 0


REFUSED = {
    **{"case01/documents.jsonl": "'documents'", "case01/images.jsonl": "'images'", "case02/both.jsonl": "differ"},
    **{"case03/name_none.jsonl": "tool 1 has no name", "case03/tools_number.jsonl": "tool 1 is 3"},
    **{"case15/utf16.jsonl": "is UTF-16", "case16/ends_with_user.jsonl": "the last turn is user"},
    **{"case16/greets_first.jsonl": "turn 1 is assistant", "case16/two_systems.jsonl": "turn 2 is a system turn"},
}
FILES = sorted(CASES.glob("case*/*")) if CASES.is_dir() else []


@pytest.mark.skipif(not FILES, reason="no shared cases here")
@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_reported_file_goes_in_whole_or_is_refused(path, tmp_path):
    name = "/".join(path.parts[-2:])
    spec = DataSpec(str(path), max_length=3000, over_long="drop", turns="split", control_tokens="allow")
    if name in REFUSED:
        with pytest.raises(DataError, match=REFUSED[name]):
            prepare(spec, tokenizer_of("qwen3"), tmp_path / "t.parquet")
        return
    prepared = prepare(spec, tokenizer_of("qwen3"), tmp_path / "t.parquet")
    assert prepared.manifest["counts"]["kept"] == len(read_rows(str(path)))
    texts = [tokenizer_of("qwen3").decode(list(one.input_ids)) for one in prepared.examples]
    assert not any("null" in text or "None" in text for text in texts)


def test_columns_on_the_command_line(write, tmp_path, capsys):
    import tiny

    from eaft_verl.cli import main

    rows = [{"Frage": f"Q{n}", "Antwort": "A", "options": ["x y"], "rang": n} for n in range(3)]
    model = str(tiny.tiny_model(tmp_path / "model"))
    command = ["prepare", write("r.jsonl", rows), str(tmp_path / "t.parquet"), "--model", model]
    assert main([*command, "--column", "prompt=Frage"]) != 0
    assert "found the fields" in capsys.readouterr().err
    assert main([*command, "--column", "prompt=Frage", "--column", "response=Antwort"]) in (0, None)
    assert "columns not used: options (3 rows), rang (3 rows)" in capsys.readouterr().out
    assert [one.messages[0]["content"] for one in load_prepared(tmp_path / "t.parquet").examples] == ["Q0", "Q1", "Q2"]
    assert main([*command, "--column", "prompt"]) != 0
    assert "must be ROLE=NAME" in capsys.readouterr().err


def test_ends_of_turn_are_those_of_the_mixture(tmp_path: Path) -> None:
    """Rows that a cap leaves out are trained on by nobody: their ends are none of the model's."""
    tiny.write_sums(tmp_path / "a.jsonl", 8, seed=1)
    tiny.write_sums(tmp_path / "b.jsonl", 8, seed=2)
    spec = DataSpec(
        source={"a": str(tmp_path / "a.jsonl"), "b": {"source": str(tmp_path / "b.jsonl"), "cap": 3}}, max_length=256
    )
    manifest = prepare(spec, tiny.tiny_tokenizer(), tmp_path / "out.parquet").manifest
    assert manifest["end_of_turn"] == {"<|im_end|>": 11}
    assert manifest["sources"]["b"]["kept"] == 3 and manifest["sources"]["b"]["left_out"] == 5
