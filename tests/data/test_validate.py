"""One bad row of every kind."""

import pytest

from eaft_verl.data.spec import DataSpec, RowError
from eaft_verl.data.validate import check_row
from eaft_verl.errors import ConfigError

CONTROL = ("<|im_end|>", "<s>", "<s>x")


def turns(*pairs):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[role], "content": content} for role, content in pairs]


GOOD = [
    turns(("u", "Q"), ("a", "A")),
    turns(("s", ""), ("u", "Q"), ("a", "A"), ("u", "Q"), ("a", "A")),
    turns(("u", "Q"), ("a", "A"), ("t", "T"), ("t", "T"), ("a", "A")),
    [*turns(("u", "Q")), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}],
]


@pytest.mark.parametrize("messages", GOOD)
def test_good_rows_come_back_unchanged(messages):
    for policy in ("error", "escape", "allow"):
        assert check_row(messages, CONTROL, policy) == (messages, {}, 0)


@pytest.mark.parametrize(
    ("messages", "kind", "reason"),
    [
        ([], "missing_assistant", "no turns"),
        (turns(("u", "Q")), "missing_assistant", "no assistant turn among user"),
        (turns(("u", "Q"), ("a", " \n")), "empty_assistant", r"turn 2 \(assistant\) is empty"),
        (turns(("u", "Q"), ("a", ""), ("u", "Q"), ("a", "A")), "empty_assistant", "turn 2"),
        (turns(("u", "Q"), ("s", "S"), ("a", "A")), "role_order", "turn 2 is a system turn"),
        (turns(("a", "A")), "role_order", "turn 1 is assistant; the first turn"),
        (turns(("s", "S"), ("a", "A")), "role_order", "turn 2 is assistant"),
        (turns(("u", "Q"), ("t", "T"), ("a", "A")), "role_order", "turn 2 is a tool result"),
        (turns(("u", "Q"), ("a", "A"), ("u", "Q")), "role_order", "the last turn is user"),
        (turns(("u", "Q\0"), ("a", "A")), "nul", "turn 1 holds a NUL character at character 2"),
        (turns(("u", "Q"), ("a", "A\ud800")), "invalid_utf8", r"turn 2 holds half a surrogate pair \(U\+D800\)"),
        (turns(("u", "a<|im_end|>"), ("a", "A")), "control_token", r"turn 1 \(user\) .*'<\|im_end\|>' at character 2"),
        (turns(("s", "<s>"), ("u", "Q"), ("a", "A")), "control_token", r"turn 1 \(system\)"),
    ],
)
def test_bad_rows(messages, kind, reason):
    with pytest.raises(RowError, match=reason) as caught:
        check_row(messages, CONTROL, "error")
    assert caught.value.kind == kind


def test_control_token_inside_a_tool_call_is_found():
    call = {"function": {"name": "f", "arguments": {"deep": ["<|im_end|>"]}}}
    with pytest.raises(RowError, match="control token"):
        check_row([*turns(("u", "Q")), {"role": "assistant", "content": "", "tool_calls": [call]}], CONTROL, "error")


def test_escape_breaks_every_control_token():
    messages = turns(("u", "<|im_end|><|im_end|>"), ("a", "<s>x and <|im_en"))
    escaped, _, count = check_row(messages, CONTROL, "escape")
    assert count == 3
    assert escaped == turns(("u", "<\u200b|im_end|><\u200b|im_end|>"), ("a", "<\u200bs>x and <|im_en"))
    assert messages[0]["content"] == "<|im_end|><|im_end|>"


def test_token_of_one_character_cannot_be_escaped():
    with pytest.raises(RowError, match="cannot be escaped"):
        check_row(turns(("u", "a#"), ("a", "A")), ("#",), "escape")


def test_escaped_text_encodes_to_no_control_token(make_tokenizer):
    from eaft_verl.data.encode import special_tokens

    tokenizer = make_tokenizer("chatml")
    controls = special_tokens(tokenizer)
    escaped, _, count = check_row(turns(("u", " ".join(controls)), ("a", "A")), controls, "escape")
    ids = tokenizer(escaped[0]["content"], add_special_tokens=False)["input_ids"]
    assert count == len(controls)
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(list(controls)))
    assert tokenizer.decode(ids).replace("\u200b", "") == " ".join(controls)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"over_long": "cut"}, "data.over_long='cut' is unknown; choose one of error, drop, truncate"),
        ({"control_tokens": None}, "choose one of error, escape, allow"),
        ({"turns": "first"}, "choose one of whole, split, last"),
        ({"max_length": 1}, "data.max_length=1 must be"),
        ({"max_length": True}, "data.max_length=True must be"),
        ({"rows": 0}, "data.rows=0 must be"),
        ({"source": " "}, "data.train=' ' must name"),
    ],
)
def test_spec_refuses(options, reason):
    with pytest.raises(ConfigError, match=reason):
        DataSpec(**{"source": "a.jsonl", **options})


def test_what_stands_beside_the_messages_is_checked_and_escaped_too():
    tools = [{"type": "function", "function": {"name": "f", "description": "a<s>", "parameters": {"<|im_end|>": {}}}}]
    with pytest.raises(RowError, match=r"tools holds the control token '<s>' at character 2"):
        check_row(GOOD[0], CONTROL, "error", tools=tools, chat_template_kwargs=None)
    with pytest.raises(RowError, match="chat_template_kwargs holds the control token"):
        check_row(GOOD[0], CONTROL, "error", chat_template_kwargs={"date": "<s>"})
    _, beside, count = check_row(GOOD[0], CONTROL, "escape", tools=tools, chat_template_kwargs={"n": 1})
    function = beside["tools"][0]["function"]
    assert count == 2 and beside["chat_template_kwargs"] == {"n": 1}
    assert function["description"] == "a<\u200bs>" and list(function["parameters"]) == ["<\u200b|im_end|>"]
    assert check_row(GOOD[0], CONTROL, "allow", tools=tools) == (GOOD[0], {"tools": tools}, 0)


def test_two_halves_of_a_control_token_are_found_where_a_template_could_join_them():
    split = turns(("u", "a<|im_"), ("a", "end|> b"))
    with pytest.raises(RowError, match=r"turn 1 \(user\) holds the control token '<\|im_'"):
        check_row(split, CONTROL, "error")
    (user, answer), _, _ = check_row(split, CONTROL, "escape")
    assert "<|im_end|>" not in user["content"] + answer["content"]
    for harmless in (turns(("u", "a <"), ("a", "> b")), turns(("u", "<|im_"), ("a", "x"))):
        assert check_row(harmless, CONTROL, "error")[0] == harmless


def test_a_text_that_becomes_a_control_token_once_it_is_normalised():
    with pytest.raises(RowError, match="control token"):
        check_row(
            turns(("u", "\uff1cs\uff1e"), ("a", "A")),
            CONTROL,
            "error",
            normal=lambda text: text.replace("\uff1c", "<").replace("\uff1e", ">"),
        )
