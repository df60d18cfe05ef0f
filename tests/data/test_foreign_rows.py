"""Rows as other tools write them. What must be trained, and what must be refused by name, is said by hand."""

import json
import math

import numpy as np
import pytest
from template_families import FAMILIES, tokenizer_of

from eaft_verl.data.accept import Taker
from eaft_verl.data.prepare import prepare
from eaft_verl.data.spec import DataSpec

IM, END = "<|im_start|>", "<|im_end|>"
Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TOOLS = [{"name": "air", "parameters": {"type": "object", "properties": {"where": {"type": "object"}}}}]
WHERE = {"where": {"city": "Köln", "box": [[6.8, 50.8], [7.2, 51.1]], "deep": {"a": {"b": [True, 'x\n"y"']}}}}


def turn(**more):
    return {**A, **more}


def asks(*calls, **more):
    return {"role": "assistant", "content": more.pop("content", None), "tool_calls": list(calls), **more}


def take(row, family="qwen3", **spec):
    """(texts of the trained runs of each example, text of the last example), or the fault."""
    tokenizer = tokenizer_of(family)
    chunk = Taker(DataSpec("rows.jsonl", **spec), tokenizer)([(0, 1, row)])
    if chunk.rows[0].fault:
        return chunk.rows[0].fault
    found = []
    for ids, mask in zip(chunk.batch.column("input_ids"), chunk.batch.column("loss_mask"), strict=True):
        ids_T, mask_T = np.array(ids.as_py()), np.array(mask.as_py())
        edges = np.flatnonzero(np.diff(mask_T, prepend=0, append=0)).reshape(-1, 2)
        found.append([tokenizer.decode(ids_T[left:right]) for left, right in edges])
    return found, tokenizer.decode(ids_T)


def qwen_call(arguments):
    return (
        f'<tool_call>\n{{"name": "air", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>{END}'
    )


TAKEN = {
    "nested arguments as text within text": (
        {
            "messages": [Q, asks({"function": {"name": "air", "arguments": json.dumps(json.dumps(WHERE))}})],
            "tools": TOOLS,
        },
        [[qwen_call(WHERE)]],
    ),
    "LangChain's calls": (
        {"messages": [Q, asks({"name": "air", "args": WHERE, "id": "c1", "type": "tool_call"})], "tools": TOOLS},
        [[qwen_call(WHERE)]],
    ),
    "Anthropic's calls": (
        {"messages": [Q, asks({"type": "tool_use", "id": "c1", "name": "air", "input": WHERE})], "tools": TOOLS},
        [[qwen_call(WHERE)]],
    ),
    "a call without arguments": (
        {"messages": [Q, asks({"function": {"name": "air"}})], "tools": TOOLS},
        [[qwen_call({})]],
    ),
    "numbers that floats cannot hold": (
        {"messages": [Q, asks({"function": {"name": "air", "arguments": {"n": 2**80, "m": -0.1}}})], "tools": TOOLS},
        [[qwen_call({"n": 2**80, "m": -0.1})]],
    ),
    "escapes in JSON text": (
        {
            "messages": json.dumps(
                [{"role": "user", "content": "Ö 😀"}, {"role": "assistant", "content": "日本\u2028x"}]
            )
        },
        [[f"日本\u2028x{END}"]],
    ),
    "typed parts, some empty": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": ""}]},
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "R"}, {"type": "text", "text": "A"}],
                },
            ]
        },
        [[f"<think>\nR\n</think>\n\nA{END}"]],
    ),
    "what an API's dump leaves empty": (
        {
            "messages": [
                {**Q, "name": None, "tool_calls": None, "images": []},
                turn(refusal=None, annotations=[], audio=None, function_call=None, tool_calls=[], reasoning=""),
            ],
            "system": " ",
            "tools": "[]",
            "history": None,
        },
        [[f"A{END}"]],
    ),
    "an empty think block that the row says": (  # after a prompt that lets the model think, the model has to write it
        {"messages": [Q, turn(content="<think>\n\n</think>\n\nA")]},
        [[f"<think>\n\n</think>\n\nA{END}"]],
    ),
    "an empty think block that row and prompt have": (
        {"messages": [Q, turn(content="<think>\n\n</think>\n\nA")], "chat_template_kwargs": {"enable_thinking": False}},
        [[f"A{END}"]],
    ),
    "thinking with white space around": (
        {"messages": [Q, turn(content="<think>\nR\n</think>\n\nA")]},
        [[f"<think>\nR\n</think>\n\nA{END}"]],
    ),
    "the first of two turns masked": (
        {
            "messages": [
                Q,
                turn(content="A1", trainable="False"),
                {**Q, "content": "Q2"},
                turn(content="A2", weight=1.0),
            ]
        },
        [[f"A2{END}"]],
    ),
    "thinking off for one row": (
        {"messages": [Q, A], "chat_template_kwargs": '{"enable_thinking": false}'},
        [[f"A{END}"]],
    ),
    "padding of Arrow everywhere": (
        {
            "messages": [
                {**Q, "tool_calls": None, "name": None, "train": None},
                asks(
                    {"id": None, "type": None, "function": {"name": "air", "arguments": {"a": None, "b": {"c": None}}}}
                ),
            ],
            "tools": [{"type": None, "function": {**TOOLS[0], "strict": None, "description": None}}, None],
        },
        [[qwen_call({"b": {}})]],
    ),
    "a JSON column of tools": (
        {"messages": [Q, asks({"function": {"name": "air", "arguments": "{}"}})], "functions": json.dumps(TOOLS)},
        [[qwen_call({})]],
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_trained(name):
    row, expected = TAKEN[name]
    found, text = take(row)
    assert found == expected and text.startswith(IM)


REFUSED = {
    "a mask by another name": ({"messages": [Q, turn(loss_scale=0)]}, "column", "'loss_scale'"),
    "a masked flag": ({"messages": [Q, turn(masked=True)]}, "column", "'masked'"),
    "train_on_turn": ({"messages": [Q, turn(train_on_turn=False)]}, "column", "'train_on_turn'"),
    "a prefix to go on from": ({"messages": [Q, turn(prefix=True)]}, "column", "'prefix'"),
    "a weight by another name": ({"messages": [Q, A], "loss_weight": 0.1}, "column", "'loss_weight'"),
    "a mask of words": ({"messages": [Q, turn(train="no")]}, "mask", "train of turn 2 is 'no'"),
    "weight as NaN": ({"messages": [Q, A], "weight": math.nan}, "mask", "weight of the row is nan"),
    "reasoning of one word": ({"messages": [Q, A], "rationale": "Because."}, "column", "'rationale'"),
    "OpenRouter's reasoning": (
        {"messages": [Q, turn(reasoning_details=[{"type": "reasoning.text", "text": "R"}])]},
        "column",
        "'reasoning_details'",
    ),
    "a system text of one word": ({"messages": [Q, A], "sys": "Deutsch!"}, "column", "'sys'"),
    "another answer beside the conversation": ({"messages": [Q, A], "response": "B"}, "column", "'response'"),
    "another question beside it": ({"messages": [Q, A], "Question": "Wer?"}, "column", "'Question'"),
    "a call with a result in it": (
        {"messages": [Q, asks({"function": {"name": "air", "arguments": {}}, "result": "12"})]},
        "column",
        "'result', which would be left out",
    ),
    "arguments twice": (
        {"messages": [Q, asks({"name": "air", "arguments": {"a": 1}, "parameters": {"a": 2}})]},
        "clash",
        "arguments and parameters",
    ),
    "arguments that are a list": (
        {"messages": [Q, asks({"function": {"name": "air", "arguments": "[1]"}})]},
        "wrong_type",
        "an object is expected",
    ),
    "NaN in arguments": (
        {"messages": [Q, asks({"function": {"name": "air", "arguments": '{"x": NaN}'}})], "tools": TOOLS},
        "wrong_type",
        "not JSON",
    ),
    "a key twice in arguments": (
        {"messages": [Q, asks({"function": {"name": "air", "arguments": '{"x": 1, "x": 2}'}})], "tools": TOOLS},
        "wrong_type",
        "the key 'x' stands twice",
    ),
    "a key twice in messages as text": (
        {"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "content": "B"}]'},
        "wrong_type",
        "the key 'content' stands twice",
    ),
    "an image among the parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}, A]},
        "wrong_type",
        "part of type 'image'",
    ),
    "parts without a type": ({"messages": [{**Q, "content": [{"text": "Q"}]}, A]}, "wrong_type", "part of type None"),
    "no parts at all": ({"messages": [{**Q, "content": []}, A]}, "wrong_type", "has no content"),
    "an answer of blanks": ({"messages": [Q, turn(content=" \n")]}, "empty_assistant", "turn 2"),
    "an argument that the template does not read": (
        {"messages": [Q, A], "chat_template_kwargs": {"thinking": True}},
        "template_kwargs",
        "has no effect",
    ),
    "an argument of the template in a column of its own": (
        {"messages": [Q, A], "enable_thinking": False},
        "template_kwargs",
        "column 'enable_thinking' is what the chat template reads; move it into chat_template_kwargs, or leave it out",
    ),
    "a control token in an argument's name": (
        {"messages": [Q, asks({"function": {"name": "air", "arguments": {END: 1}}})], "tools": TOOLS},
        "control_token",
        "<|im_end|>",
    ),
    "a tool without a name": ({"messages": [Q, A], "tools": [{"type": "function"}]}, "wrong_type", "has no name"),
    "preferences": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "format", "found the fields chosen, prompt"),
    "a text alone": ({"text": "### Human: Q\n### Assistant: A"}, "format", "found the fields text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(name):
    row, kind, reason = REFUSED[name]
    found = take(row)
    assert isinstance(found[0], str), found
    assert found[0] == kind and reason in found[1]


def test_six_hundred_turns_split_and_whole():
    turns = [turn if at % 2 else {**turn, "role": "user"} for at in range(600) for turn in [{**A, "content": f"t{at}"}]]
    found, _ = take({"messages": turns}, family="chatml")
    assert found == [[f"t{at}{END}" for at in range(1, 600, 2)]]
    found, _ = take({"messages": turns}, family="chatml", turns="split")
    assert found == [[f"t{at}{END}"] for at in range(1, 600, 2)]


@pytest.mark.parametrize("weight", [1e300, 1e-50, 2e30])
def test_a_weight_that_the_file_cannot_keep_is_refused(weight):
    taker = Taker(DataSpec("a.jsonl"), tokenizer_of("chatml"))
    fault = taker([(0, 1, {"messages": [Q, A], "weight": weight})]).rows[0].fault
    assert fault and fault[0] == "mask" and "from 1e-30 to 1e+30 is allowed" in fault[1]


def test_half_a_surrogate_pair_in_a_columns_name_is_a_fault_of_its_row(tmp_path):
    rows = [
        {"messages": [Q, A]},
        {"messages": [Q, {**A, "content": "B"}], "\ud800x": 1},
        {"messages": [Q, A], "\ud800y": "a b"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    made = prepare(DataSpec(str(tmp_path / "a.jsonl")), tokenizer_of("chatml"), tmp_path / "out.parquet")
    assert [entry["row"] for entry in made.manifest["rejected"]] == [2, 3]
    assert made.manifest["counts"]["rejected"] == {"invalid_utf8": 1, "column": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_that_a_template_leaves_out_are_missed_though_the_conversation_names_them(family):
    said = "Please search the web; the query is rain."
    schema = {"type": "object", "properties": {"query": {"type": "string", "description": "What to look for"}}}
    tool = {"name": "search", "description": "Looks it up.", "parameters": schema}
    found = take({"messages": [{**Q, "content": said}, A], "tools": [tool]}, family)
    if family in ("chatml", "gemma3"):  # their public templates know no tools
        assert found[0] == "template_drops" and "does not write out the tools" in found[1]
    else:
        assert "Looks it up." in found[1]


def test_an_argument_that_only_a_comment_of_the_template_names_has_no_effect():
    found = take({"messages": [Q, A], "chat_template_kwargs": {"no": True}}, "chatml")
    assert "no" in tokenizer_of("chatml").chat_template and found[0] == "template_kwargs"
