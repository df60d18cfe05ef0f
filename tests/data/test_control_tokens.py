"""Text of a row never becomes a control token, in any field and any family: ids equal those of a row of plain words."""

import copy
import json

import pytest
from template_families import FAMILIES, tokenizer_of

from eaft_verl.data.accept import Taker
from eaft_verl.data.encode import render, special_tokens
from eaft_verl.data.spec import DataSpec

TOOL = {
    "name": "air",
    "description": "d",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "e"}}},
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "air", "arguments": {"city": "Rome"}}}
ROW = {
    "system": "S",
    "tools": [{"type": "function", "function": TOOL}],
    "messages": [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "R", "tool_call_id": "call00001", "name": "air"},
        {"role": "assistant", "content": "A"},
    ],
}
PLAIN = {
    "system": "S",
    "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "T"}],
}
# where in a row: the way to a text (or, last, to a key)
FIELDS = {
    "user": (PLAIN, "messages", 0, "content"),
    "assistant": (PLAIN, "messages", 1, "content"),
    "reasoning": (PLAIN, "messages", 1, "reasoning_content"),
    "system column": (PLAIN, "system"),
    "result": (ROW, "messages", 2, "content"),
    "argument": (ROW, "messages", 1, "tool_calls", 0, "function", "arguments", "city"),
    "description": (ROW, "tools", 0, "function", "description"),
    "parameter": (ROW, "tools", 0, "function", "parameters", "properties", "city", "description"),
    "unknown key of a tool": (ROW, "tools", 0, "function", "x"),
}


def placed(field, text):
    row, *way = FIELDS[field]
    row = place = copy.deepcopy(row)
    for step in way[:-1]:
        place = place[step]
    place[way[-1]] = text
    return row


def taken(family, row, policy):
    tokenizer = tokenizer_of(family)
    spec = DataSpec("x", control_tokens=policy, turns="last")
    chunk = Taker(spec, tokenizer)([(0, 1, row)])
    ids = chunk.batch.column("input_ids")[0].as_py() if chunk.batch.num_rows else []
    return chunk.rows[0], ids


def controls(family, ids):
    """The control ids in order."""
    special = {index for index, token in tokenizer_of(family).added_tokens_decoder.items() if token.special}
    return [index for index in ids if index in special]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_brings_control_tokens(family, field):
    tokens = special_tokens(tokenizer_of(family))
    plain, wanted = taken(family, placed(field, "a" + " word" * len(tokens) + " b"), "error")
    attack = placed(field, "a " + " ".join(tokens) + " b")
    refused, none = taken(family, attack, "error")
    assert none == [] and refused.fault is not None
    if plain.fault:  # the family's template does not write this row at all
        assert refused.fault[0] in (plain.fault[0], "control_token")
        return
    assert refused.fault[0] == "control_token"
    escaped, ids = taken(family, attack, "escape")
    assert escaped.fault is None and escaped.escaped >= len(tokens), escaped.fault
    assert controls(family, ids) == controls(family, wanted)
    allowed, ids = taken(family, attack, "allow")  # what the two policies prevent
    written = field not in ("unknown key of a tool", "parameter")  # which not every template writes
    assert allowed.fault or len(controls(family, ids)) >= len(controls(family, wanted)) + written


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_of_a_tool_or_of_a_parameter_brings_no_control_token(family):
    token = special_tokens(tokenizer_of(family))[0]
    text = json.dumps(ROW)
    for old in ('"air"', '"city"'):
        row = json.loads(text.replace(old, json.dumps(f"x{token}y")))
        neutral, wanted = taken(family, json.loads(text.replace(old, '"xwordy"')), "error")
        refused, _ = taken(family, row, "error")
        assert refused.fault
        escaped, ids = taken(family, row, "escape")
        if not neutral.fault:
            assert refused.fault[0] == "control_token"
            assert escaped.fault is None and controls(family, ids) == controls(family, wanted)


def test_arguments_of_the_template():
    token = "<|im_end|>"
    row = {**PLAIN, "messages": PLAIN["messages"], "chat_template_kwargs": {"enable_thinking": token}}
    refused, _ = taken("qwen3", row, "error")
    assert refused.fault[0] == "control_token" and "chat_template_kwargs" in refused.fault[1]


def test_halves_in_two_turns_stay_halves():
    tokenizer = tokenizer_of("mistral_small")
    row = {"messages": [{"role": "user", "content": "a[/INS"}, {"role": "assistant", "content": "T]b"}]}
    refused, _ = taken("mistral_small", row, "error")
    assert refused.fault[0] == "control_token"
    assert "[/INS" in render(tokenizer, row["messages"])
