"""Every accepted row shape, and what is said about the others."""

import pytest

from eaft_verl.data.formats import to_messages
from eaft_verl.errors import DataError

PAIR = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("row", "extra"),
    [
        ({"messages": PAIR}, {}),
        ({"messages": PAIR, "id": 7, "answer": 4, "prompt": "Q", "source": "web"}, {"id": "7", "answer": "4"}),
        ({"messages": PAIR, "reference": "R"}, {"answer": "R"}),
        ({"messages": [{**turn, "reasoning_content": None, "tool_calls": None} for turn in PAIR]}, {}),
        ({"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in PAIR]}, {}),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, {}),
        ({"conversations": PAIR}, {}),
        ({"instruction": "Q", "input": "", "output": "A"}, {}),
        ({"instruction": "Q", "input": None, "output": "A", "history": None, "id": "r1"}, {"id": "r1"}),
        ({"prompt": "Q", "response": "A"}, {}),
        ({"question": "Q", "answer": "A"}, {}),
        ({"query": "Q", "completion": "A"}, {}),
        ({"Question": "Q", "Response": "A"}, {}),
        ({"prompt": "Q", "output": "A"}, {}),
        ({"instruction": "Q", "response": "A"}, {}),
        ({"problem": "Q", "solution": "A", "answer": "42"}, {"answer": "42"}),
    ],
)
def test_one_exchange_in_every_shape(row, extra):
    assert to_messages(row) == (PAIR, extra)


def test_alpaca_with_system_history_and_input():
    row = {"system": "S", "history": [["Q0", "A0"]], "instruction": "Q", "input": "data", "output": "A"}
    messages, _ = to_messages(row)
    assert [(turn["role"], turn["content"]) for turn in messages] == [
        ("system", "S"),
        ("user", "Q0"),
        ("assistant", "A0"),
        ("user", "Q\ndata"),
        ("assistant", "A"),
    ]


def test_tools_and_calls_take_the_form_templates_expect():
    row = {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "two"},
        ],
        "tools": '[{"name": "add", "parameters": {}}]',
    }
    messages, extra = to_messages(row)
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages[2] == {"role": "tool", "content": "2"}
    assert extra["tools"] == [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_content_parts_are_taken_apart():
    parts = [
        {"type": "reasoning", "value": "R"},
        {"type": "text", "value": "A"},
        {"type": "tool_call", "value": '{"name": "add", "arguments": "{\\"x\\": 1}"}'},
    ]
    messages, _ = to_messages({"messages": [PAIR[0], {"role": "assistant", "content": parts}]})
    assert messages[1] == {"role": "assistant", "content": "A", "reasoning_content": "R", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"text": "x", "label": 1}, "format", "found the fields label, text; accepted are messages:"),
        ({}, "format", "found the fields none"),
        (
            {"prompt": "Q", "question": "Q", "answer": "A"},
            "format",
            "prompt and question, which may say the same thing",
        ),
        ({"prompt": "Q", "output": "A", "solution": "B"}, "format", "output and solution"),
        ({"question": "Q", "answer": "A", "Question": "R", "Response": "B"}, "format", "question and Question"),
        ({"prompt": 3, "response": "A"}, "wrong_type", "is int"),
        ({"messages": "hi"}, "wrong_type", "messages is str; a list of turns"),
        ({"messages": ["hi"]}, "wrong_type", "turn 1 is str"),
        ({"messages": [{"role": "user", "content": 5}]}, "wrong_type", "content of turn 1 is int"),
        ({"messages": [{"role": "user"}]}, "wrong_type", "turn 1 .user. has no content"),
        ({"messages": [{"role": "human", "content": "Q"}]}, "role", "role 'human'; allowed are system, user"),
        ({"messages": [{"role": ["user"], "content": "Q"}]}, "role", "turn 1 has role"),
        ({"messages": [{**PAIR[0], "tool_calls": [CALL]}]}, "role", "only assistant turns may"),
        ({"messages": [PAIR[0], {"role": "assistant", "tool_calls": [{}]}]}, "wrong_type", "has no function name"),
        ({"messages": [PAIR[0], {"role": "assistant", "tool_calls": 3}]}, "wrong_type", "tool_calls of turn 2 is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "wrong_type", "part of type 'image'"),
        ({"conversations": [{"from": "bot", "value": "A"}]}, "role", "from 'bot'"),
        ({"conversations": [{"from": "human", "value": None}]}, "wrong_type", "turn 1 .human. has no content"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "wrong_type", "not valid JSON"),
        ({"instruction": "Q", "output": ["A"]}, "wrong_type", "output is list"),
        ({"instruction": "Q", "output": "A", "history": ["x"]}, "wrong_type", "history entry 1"),
        ({"messages": PAIR, "tools": '{"a": 1}'}, "wrong_type", "tools must be a list"),
    ],
)
def test_refused_rows(row, kind, reason):
    with pytest.raises(DataError, match=reason) as caught:
        to_messages(row)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("row", "reasoning"),
    [
        ({"Question": "Q", "Complex_CoT": "R", "Response": "A"}, "R"),
        ({"question": "Q", "reasoning (reasoning_content)": "R", "response (content)": "A"}, "R"),
        ({"prompt": "Q", "response": "A", "reasoning_content": None}, None),
    ],
)
def test_reasoning_beside_the_response_is_kept(row, reasoning):
    messages, _ = to_messages(row)
    expected = {"role": "assistant", "content": "A", **({"reasoning_content": reasoning} if reasoning else {})}
    assert messages == [{"role": "user", "content": "Q"}, expected]
