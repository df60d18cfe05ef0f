"""A row that says one thing in two places, or in a place of its own: both are used, or it is refused by name."""

import json

import pytest

from eaft_verl.data.formats import to_messages
from eaft_verl.data.spec import RowError

Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"type": "function", "function": {"name": "air", "arguments": {"city": "Norvik"}}}
NAMED = {**CALL, "id": "c1"}
OTHER = {"function": {"name": "sea", "arguments": {}}}


def parts(*given):
    return {"messages": [Q, {"role": "assistant", "content": list(given)}]}


def asks(**keys):
    return {"messages": [Q, {"role": "assistant", "content": None, **keys}]}


def shared(**turn):
    return {"conversations": [{"from": "human", "value": "Q"}, turn]}


def text(said):
    return {"type": "text", "text": said}


FLAT = {"type": "tool_call", "id": "c1", "name": "air", "args": {"city": "Norvik"}}  # LangChain's
SAYING = {"role": "assistant", "content": "Hm", "tool_calls": [NAMED]}


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (parts(text("Hm"), FLAT), SAYING),
        (parts(text("Hm"), {**FLAT, "text": None, "tool_call": None}), SAYING),  # as a table pads it
        (parts({"type": "thinking", "text": "", "thinking": "R"}, text("A")), {**A, "reasoning_content": "R"}),
        (asks(tool_calls=[{"id": "c1", "function": {"name": "air"}, "arguments": '{"city": "Norvik"}'}]), NAMED),
        (asks(tool_calls=[NAMED], function_call=CALL["function"]), NAMED),
        (shared(**{"from": "function_call", "value": json.dumps(CALL["function"]), "tool_calls": [NAMED]}), NAMED),
        (
            {"prompt": json.dumps([Q, A, Q]), "completion": json.dumps([A])},
            [Q, {**A, "train": False}, Q, A],
        ),
        ({"prompt": json.dumps([Q]), "completion": "A"}, A),
        ({"prompt": "Q", "completion": "A", "history": json.dumps([Q, A])}, [Q, A, Q, A]),
        ({"messages": [Q, {**A, "train": False}, Q, A], "train": [None, 0, 0, 1]}, [Q, {**A, "train": False}, Q, A]),
    ],
)
def test_what_is_said_in_a_place_of_its_own_is_used(row, answer):
    if answer is NAMED:
        answer = {"role": "assistant", "content": "", "tool_calls": [NAMED]}
    assert to_messages(row)[0] == (answer if isinstance(answer, list) else [Q, answer])


def test_calls_beside_a_thought_are_made_in_its_turn():
    row = shared(**{"from": "thought", "value": "R", "tool_calls": [NAMED]})
    assert to_messages(row)[0][1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "R",
        "tool_calls": [NAMED],
    }


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (parts({**text("A"), "value": "B"}), "clash", "a part of turn 2 says two things"),
        (parts({**text("A"), "image_url": "a.png"}), "column", r"messages\[\].content\[\] key 'image_url'"),
        (parts({**text("A"), "train": False}), "column", r"content\[\] key 'train' .*say it by train"),
        (parts({**text("A"), "hint": "Of the sea."}), "column", r"content\[\] key 'hint'.*the turn's text"),
        (parts(text("A"), {"type": "thinking", "thinking": "R"}), "role_order", "a reasoning part behind"),
        (parts(FLAT, text("A")), "role_order", "turn 2 has a text part behind a later kind"),
        (asks(tool_calls=[NAMED], function_call=OTHER["function"]), "clash", "turn 2 makes different calls"),
        (
            shared(**{"from": "function_call", "value": json.dumps(OTHER), "tool_calls": [CALL]}),
            "clash",
            "turn 2 makes",
        ),
        (asks(tool_calls=[{**CALL, "name": "sea"}]), "clash", "a name in its function and another"),
        (asks(tool_calls=[{**CALL, "args": {"x": 1}}]), "clash", "has arguments and args"),
        ({"prompt": str([Q]), "completion": "A"}, "wrong_type", "prompt is not valid JSON"),
        ({"messages": [Q, A], "train": [True, True]}, "mask", "turn 1 .user. is marked to be trained"),
        ({"messages": [Q, {**A, "train": False}], "train": [0, 1]}, "clash", "train of turn 2 is False, and 1 in"),
        ({"messages": [Q, A], "train": [0, 1], "loss": [0, 0]}, "clash", "turn 2 is to be trained by one"),
        ({"prompt": "Q", "completion": "A", "kto_tag": "false"}, "masked", "kto_tag is false"),
        ({"prompt": "Q", "completion": "A", "label": "False"}, "masked", "label is False"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "thought", "value": "R"},
                    {"from": "gpt", "value": "<think>S</think>A"},
                ]
            },
            "clash",
            "a turn of reasoning stands before one with <think>",
        ),
        (
            {
                "messages": [Q, A],
                "tools": [{"name": "f", "parameters": {"type": "object"}, "input_schema": {"type": "object"}}],
            },
            "clash",
            "tool 'f' has parameters and input_schema",
        ),
    ],
)
def test_what_is_said_twice_and_differs_or_has_no_place_is_refused(row, kind, reason):
    with pytest.raises(RowError, match=reason) as caught:
        to_messages(row)
    assert caught.value.kind == kind


@pytest.mark.parametrize("key", ["input_schema", "inputSchema"])
def test_a_schema_goes_by_the_name_that_templates_read(key):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    for tool in ({"name": "air", key: schema}, {"type": "function", "function": {"name": "air", key: schema}}):
        expected = {"type": "function", "function": {"name": "air", "parameters": schema}}
        assert to_messages({"messages": [Q, A], "tools": [tool]})[1]["tools"] == [expected]


def test_text_that_only_begins_as_turns_do_is_text():
    for prompt in (f"{json.dumps([Q])}\nSum this up.", '[{"from": "user@a.b", "to": "c"}]', '[{"role": "king"}]'):
        assert to_messages({"prompt": prompt, "response": "A"})[0] == [{**Q, "content": prompt}, A]


def test_keys_of_parts_and_of_history_are_counted():
    unused: dict[str, int] = {}
    to_messages(parts({**text("A"), "cache_control": {"type": "ephemeral"}}), unused=unused)
    to_messages({"prompt": "Q", "response": "A", "history": [{**Q, "date": 3}, A]}, unused=unused)
    assert unused == {"messages[].content[].cache_control": 1, "history[].date": 1}
