"""Tool calls, their ids and results: what arrives, whatever file and form they come in, and which rows are rejected."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from template_families import tokenizer_of

from eaft_verl.data.encode import encode
from eaft_verl.data.formats import to_messages
from eaft_verl.data.rendered import check_context, holds_calls
from eaft_verl.data.sources import read_rows
from eaft_verl.data.spec import RowError
from eaft_verl.data.template import ChatTemplate

USER, GOOD = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "Good."}


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


def call(name, identity=None, **arguments):
    named = {"id": identity} if identity else {}
    return {**named, "type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(*calls, content=""):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(text, **more):
    return {"role": "tool", "content": text, **more}


def test_ids_and_results_are_kept_and_linked():
    turns = [USER, assistant(call("air", "c1"), call("fare", "c2")), result("3", tool_call_id="c2"), result("12"), GOOD]
    messages, _ = to_messages({"messages": turns})
    assert messages == turns
    seen = []

    class Tokenizer:
        chat_template = ""

        def apply_chat_template(self, given, **_):
            seen.extend(given)
            return ""

    ChatTemplate(Tokenizer()).render(messages)
    assert [(one.get("tool_call_id"), one.get("name")) for one in seen[2:4]] == [("c2", "fare"), ("c1", "air")]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([assistant(call("air", "c1")), result("1", tool_call_id="c9")], "turn 3 answers call 'c9'"),
        ([assistant(call("air")), result("1", name="fare")], "result of 'fare', but the call before it is of 'air'"),
        (
            [assistant(call("air", "c1")), result("1", tool_call_id="c1"), result("2", tool_call_id="c1")],
            "turn 4 answers",
        ),
    ],
)
def test_results_of_no_call_are_rejected(turns, reason):
    with pytest.raises(RowError, match=reason) as caught:
        to_messages({"messages": [USER, *turns, GOOD]})
    assert caught.value.kind == "tool_result"


def test_the_older_function_call_and_other_spellings():
    text = json.dumps({"name": "air", "arguments": {"city": "Norvik"}})
    expected = [USER, assistant(call("air", city="Norvik")), result("12", name="air"), GOOD]
    older = {"role": "assistant", "content": None, "function_call": json.loads(text)}
    assert (
        to_messages({"messages": [USER, older, {**result("12", name="air"), "role": "function"}, GOOD]})[0] == expected
    )
    swift = [
        USER,
        {"role": "tool_call", "content": text},
        {"role": "tool_response", "content": "12", "name": "air"},
        GOOD,
    ]
    assert to_messages({"messages": swift})[0] == expected


@pytest.mark.parametrize("arguments", [{"city": "a", "zone": None}, '{"city": "a"}', '"{\\"city\\": \\"a\\"}"'])
def test_arguments_are_an_object_without_padding(arguments):
    turns = [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "air", "arguments": arguments}}]}]
    assert to_messages({"messages": turns})[0][1]["tool_calls"] == [call("air", city="a")]


def test_null_in_json_text_is_what_somebody_wrote():
    turns = [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "air", "arguments": '{"city": null}'}}]}]
    assert to_messages({"messages": turns})[0][1]["tool_calls"] == [call("air", city=None)]


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (" ", None),
        ("", None),
        ([json.dumps(tool("air"))], [tool("air")]),
        ([{"name": "air"}], [{"type": "function", "function": {"name": "air"}}]),
        (
            [{**tool("air", city={"type": "string", "enum": None}), "strict": None}],
            [tool("air", city={"type": "string"})],
        ),
    ],
)
def test_tool_lists(tools, expected):
    assert to_messages({"messages": [USER, GOOD], "tools": tools})[1].get("tools") == expected


@pytest.mark.parametrize(
    "tools",
    [[3], ["x"], "{", {"a": 1}, [{"function": {"name": None, "description": "x"}}], [{"function": "air"}], [[1]]],
)
def test_malformed_tool_lists_reject_the_row(tools):
    with pytest.raises(RowError) as caught:
        to_messages({"messages": [USER, GOOD], "tools": tools})
    assert caught.value.kind == "wrong_type"


ROWS = [
    {
        "tools": [tool("air", city={"type": "string"}), tool("fare", zone={"type": "integer"})],
        "messages": [
            USER,
            assistant(call("air", "call00001", city="Norvik")),
            result("12", tool_call_id="call00001"),
            GOOD,
        ],
    },
    {
        "tools": [tool("air", city={"type": "string"}), tool("fare", zone={"type": "integer"})],
        "messages": [USER, assistant(call("fare", "call00002", zone=2)), result("12", tool_call_id="call00002"), GOOD],
    },
]


@pytest.mark.parametrize("family", ["mistral_small", "deepseek_v3", "glm4_5"])
def test_parquet_datasets_and_jsonl_give_the_same_ids(tmp_path, family):
    from datasets import load_dataset

    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    loaded = load_dataset("json", data_files=str(tmp_path / "r.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    loaded.to_parquet(str(tmp_path / "d.parquet"))
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in loaded.to_list()))
    found = []
    for name in ("r.jsonl", "r.parquet", "d.parquet", "e.jsonl"):
        pairs = [to_messages(row) for row in read_rows(str(tmp_path / name))]
        found.append([encode(tokenizer_of(family), turns, 9000, tools=extra["tools"]) for turns, extra in pairs])
    assert found[0] == found[1] == found[2] == found[3]
    assert "zone" not in tokenizer_of(family).decode(found[0][0][0].input_ids).partition("Q")[2]


def test_maps_and_dates_of_arrow_are_objects_and_text(tmp_path):
    import datetime

    arguments = pa.map_(pa.string(), pa.string())
    function = pa.struct([("name", pa.string()), ("arguments", arguments), ("when", pa.timestamp("us"))])
    table = pa.table(
        {"f": pa.array([{"name": "a", "arguments": {"city": "b"}, "when": datetime.datetime(2025, 1, 2)}], function)}
    )
    pq.write_table(table, tmp_path / "m.parquet")
    assert read_rows(str(tmp_path / "m.parquet")) == [
        {"f": {"name": "a", "arguments": {"city": "b"}, "when": "2025-01-02T00:00:00"}}
    ]


CALLS = [
    USER,
    assistant(call("air", x=1, place="Köln"), call("air", x=2, place="Köln"), content="So."),
    result("R one"),
    GOOD,
]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ('Q So. air {"x": 1, "place": "Köln"} air {"x": 2, "place": "Köln"} R one Good.', True),
        ('Q So. air {"x": 1, "place": "K\\u00f6ln"} air {"x": 2, "place": "K\\u00f6ln"} R one Good.', True),
        ("Q So. air(x=1, place=Köln) air(place=Köln, x=2) R one Good.", True),
        ('Q So. air {"x": 1, "place": "Köln"} R one Good.', False),  # one call of two
        ('Q So. air {"x": 2, "place": "Köln"} air {"x": 1, "place": "Köln"} R one Good.', False),  # the other order
        ('Q So. air {"x": 1} air {"x": 2, "place": "Köln"} R one Good.', False),
        ("Q So. air {'x': 1, 'place': 'Köln'} air {'x': 2, 'place': 'Köln'} R one Good.", False),  # Python, not JSON
        ('Q So. air {"x": 1, "place": "Köln"} air {"x": 2, "place": "Köln"} Good.', False),  # without the result
        ('Q air {"x": 1, "place": "Köln"} air {"x": 2, "place": "Köln"} R one Good.', False),  # without the text
        ('Q So. air {"x": 1, "place": "Köln"} air {"x": 2, "place": "Köln"} Good. R one', False),
    ],
)
def test_a_rendering_holds_every_call_argument_result_and_text_in_order(text, held):
    if held:
        check_context(CALLS, None, text)
        assert holds_calls(CALLS, text)
    else:
        with pytest.raises(RowError, match="drops or changes"):
            check_context(CALLS, None, text)


def test_a_result_that_is_dropped_is_found_by_what_comes_after():
    turns = [USER, assistant(call("air")), result("12"), {"role": "assistant", "content": "It is 12 now."}]
    with pytest.raises(RowError, match="turn 4"):
        check_context(turns, None, "Q air {} It is 12 now.")


def test_every_tool_and_parameter_is_written_out():
    tools = [tool("air", city={"type": "string"}), tool("fare", zone={"type": "integer"})]
    for text, missing in (("air city Q Good.", "'fare' is missing"), ("air city fare Q Good.", "'zone' of 'fare'")):
        with pytest.raises(RowError, match=missing):
            check_context([USER, GOOD], tools, text)


CASES = Path(__file__).parents[3] / "shared" / "cases" / "data"


@pytest.mark.skipif(not CASES.is_dir(), reason="no shared cases here")
@pytest.mark.parametrize("name", ["tools.parquet", "tools_datasets.parquet"])
def test_the_reported_files(name):
    assert [to_messages(row) for row in read_rows(str(CASES / "case04" / name))] == [
        to_messages(row) for row in read_rows(str(CASES / "case04" / "tools.jsonl"))
    ]
