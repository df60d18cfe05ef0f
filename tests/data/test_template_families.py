"""What is trained in eight template families. The expected texts are typed by hand, trained tokens in [[ ]]:

what the model is given stands outside, everything that it has to write itself inside, its stop token included.
"""

import json

import pytest
from template_families import FAMILIES, tokenizer_of

from eaft_verl.data.encode import encode
from eaft_verl.data.formats import to_messages
from eaft_verl.data.show import bracketed
from eaft_verl.data.spec import RowError

PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": {"properties": PROPERTIES}}}
    for name in ("air", "fare")
]


def call(number, name, **arguments):
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text=None, **more):
    return {"role": "assistant", "content": text, **more}


def result(number, text):
    return {"role": "tool", "content": text, "tool_call_id": f"call0000{number}"}


ONE_CALL = call(1, "air", city="Köln", days=2)
TWO_CALLS = [call(1, "air", city="Köln"), call(2, "fare", days=3)]
ROWS = {
    "two": {"messages": [{"role": "system", "content": "S"}, user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]},
    "call": {
        "messages": [user("Q"), assistant(tool_calls=[ONE_CALL]), result(1, '{"aqi": 12}'), assistant("Good.")],
        "tools": TOOLS,
    },
    "parallel": {
        "messages": [
            *(user("Q"), assistant(tool_calls=TWO_CALLS), result(1, '{"aqi": 12}'), result(2, '{"price": 3}')),
            assistant("Good."),
        ],
        "tools": TOOLS,
    },
    "thought": {"messages": [user("Q"), assistant("A", reasoning="R")]},
    "thoughts": {"messages": [user("Q1"), assistant("A1", thinking="R1"), user("Q2"), assistant("A2", thinking="R2")]},
    "thought_call": {
        "messages": [
            *(user("Q"), assistant(tool_calls=[ONE_CALL], reasoning="R1"), result(1, '{"aqi": 12}')),
            assistant("Good.", reasoning="R2"),
        ],
        "tools": TOOLS,
    },
}
ONE = '{"name": "air", "arguments": {"city": "Köln", "days": 2}'
AIR, FARE = '{"name": "air", "arguments": {"city": "Köln"}', '{"name": "fare", "arguments": {"days": 3}'
EMPTY = "<think>\n\n</think>\n\n"
IM = "<|im_start|>"
HEAD, EOT = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
DS_END = "<\uff5cend▁of▁sentence\uff5c>"
DS_ASK, DS_ANSWER = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c></think>"
GLM_ONE = (
    "<tool_call>air\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
)
GLM_TWO = (
    "<tool_call>air\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n</tool_call>\n"
    "<tool_call>fare\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
GLM_RESULT = '<|observation|>\n<tool_response>\n{"aqi": 12}\n</tool_response>'
OSS_CALL = ' to=functions.air<|channel|>commentary json<|message|>{"city": "Köln", "days": 2}<|call|>'
OSS_RESULT = '<|start|>functions.air to=assistant<|channel|>commentary<|message|>"{\\"aqi\\": 12}"<|end|>'
OSS_FINAL, OSS_THOUGHT = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"


def deepseek(*names):
    """Calls: (name, arguments as JSON)."""
    one = "<\uff5ctool▁call▁begin\uff5c>{}<\uff5ctool▁sep\uff5c>{}<\uff5ctool▁call▁end\uff5c>"
    calls = "".join(one.format(name, arguments) for name, arguments in names)
    return f"<\uff5ctool▁calls▁begin\uff5c>{calls}<\uff5ctool▁calls▁end\uff5c>{DS_END}"


def chat(user_open, close, answer_open):
    """Two exchanges in a template whose turns look alike."""
    asked, answered = user_open + "{}" + close[0] + answer_open, "[[{}" + close[1] + "]]" + close[2]
    return "".join((asked + answered).format(f"Q{number}", f"A{number}") for number in (1, 2))


# (family, row): rendering from the first user turn on with turns="whole", or why it is refused
WHOLE = {
    ("chatml", "two"): chat(f"{IM}user\n", ("<|im_end|>\n", "<|im_end|>", "\n"), f"{IM}assistant\n"),
    ("chatml", "call"): "drops or changes its tool_calls",
    ("chatml", "thought"): "drops or changes its reasoning_content",
    ("qwen3", "two"): "set data.turns=split",
    ("qwen3", "thought"): f"{IM}user\nQ<|im_end|>\n{IM}assistant\n[[<think>\nR\n</think>\n\nA<|im_end|>]]\n",
    ("qwen3", "thought_call"): (
        f"{IM}user\nQ<|im_end|>\n{IM}assistant\n[[<think>\nR1\n</think>\n\n<tool_call>\n{ONE}}}\n</tool_call><|im_end|>]]\n"
        f'{IM}user\n<tool_response>\n{{"aqi": 12}}\n</tool_response><|im_end|>\n'
        f"{IM}assistant\n[[<think>\nR2\n</think>\n\nGood.<|im_end|>]]\n"
    ),
    ("llama3_1", "two"): chat(HEAD.format("user"), (EOT, EOT, ""), HEAD.format("assistant")),
    ("llama3_1", "call"): (
        f'Q{EOT}{HEAD.format("assistant")}[[{{"name": "air", "parameters": {{"city": "Köln", "days": 2}}}}{EOT}]]'
        f'{HEAD.format("ipython")}"{{\\"aqi\\": 12}}"{EOT}{HEAD.format("assistant")}[[Good.{EOT}]]'
    ),
    ("llama3_1", "parallel"): "only supports single tool-calls at once",
    ("llama3_1", "thought"): "drops or changes its reasoning_content",
    ("gemma3", "two"): "<start_of_turn>user\nS\n\n"
    + chat("<start_of_turn>user\n", ("<end_of_turn>\n", "<end_of_turn>", "\n"), "<start_of_turn>model\n").partition(
        "<start_of_turn>user\n"
    )[2],
    ("gemma3", "call"): "roles must alternate",
    ("mistral_small", "two"): chat("[INST]", ("[/INST]", "</s>", ""), ""),
    ("mistral_small", "call"): (
        f'[INST]Q[/INST][[[TOOL_CALLS] [{ONE}, "id": "call00001"}}]</s>]]'
        '[TOOL_RESULTS] {"content": {"aqi": 12}, "call_id": "call00001"}[/TOOL_RESULTS][[Good.</s>]]'
    ),
    ("mistral_small", "parallel"): (
        f'[INST]Q[/INST][[[TOOL_CALLS] [{AIR}, "id": "call00001"}}, {FARE}, "id": "call00002"}}]</s>]]'
        '[TOOL_RESULTS] {"content": {"aqi": 12}, "call_id": "call00001"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS] {"content": {"price": 3}, "call_id": "call00002"}[/TOOL_RESULTS][[Good.</s>]]'
    ),
    ("mistral_small", "thought_call"): "drops or changes its reasoning_content",
    ("deepseek_v3", "two"): chat(DS_ASK, ("", DS_END, ""), DS_ANSWER),
    ("deepseek_v3", "call"): (
        f"{DS_ASK}Q{DS_ANSWER}[[{deepseek(('air', json.dumps({'city': 'Köln', 'days': 2}, ensure_ascii=False)))}]]"
        f'<\uff5ctool▁output▁begin\uff5c>{{"aqi": 12}}<\uff5ctool▁output▁end\uff5c>[[Good.{DS_END}]]'
    ),
    ("deepseek_v3", "parallel"): (
        f"{DS_ASK}Q{DS_ANSWER}" + "[[" + deepseek(("air", '{"city": "Köln"}'), ("fare", '{"days": 3}')) + "]]"
        f'<\uff5ctool▁output▁begin\uff5c>{{"aqi": 12}}<\uff5ctool▁output▁end\uff5c>'
        f'<\uff5ctool▁output▁begin\uff5c>{{"price": 3}}<\uff5ctool▁output▁end\uff5c>[[Good.{DS_END}]]'
    ),
    ("deepseek_v3", "thought"): "drops or changes its reasoning_content",
    ("glm4_5", "two"): chat("<|user|>\n", ("", "<|user|>", ""), "<|assistant|>\n<think></think>\n").replace(
        "<|user|>]]<|user|>", "<|user|>]]"
    ),
    ("glm4_5", "call"): (
        f"<|user|>\nQ<|assistant|>\n<think></think>\n[[{GLM_ONE}<|observation|>]]"
        f"{GLM_RESULT.removeprefix('<|observation|>')}<|assistant|>\n<think></think>\n[[Good.<|user|>]]"
    ),
    ("glm4_5", "parallel"): (
        f"<|user|>\nQ<|assistant|>\n<think></think>\n[[{GLM_TWO}<|observation|>]]"
        f'{GLM_RESULT.removeprefix("<|observation|>")}\n<tool_response>\n{{"price": 3}}\n</tool_response>'
        "<|assistant|>\n<think></think>\n[[Good.<|user|>]]"
    ),
    ("glm4_5", "thought"): "<|user|>\nQ<|assistant|>[[\n<think>R</think>\nA<|user|>]]",
    ("glm4_5", "thoughts"): "set data.turns=split",
    ("gpt_oss", "two"): "set data.turns=split",
    ("gpt_oss", "call"): (
        f"<|start|>user<|message|>Q<|end|><|start|>assistant[[{OSS_CALL}]]{OSS_RESULT}"
        f"<|start|>assistant[[{OSS_FINAL}Good.<|return|>]]"
    ),
    ("gpt_oss", "parallel"): "drops or changes its tool_calls",
    ("gpt_oss", "thought_call"): (
        f"<|start|>user<|message|>Q<|end|><|start|>assistant[[{OSS_THOUGHT}R1<|end|><|start|>assistant{OSS_CALL}]]"
        f"{OSS_RESULT}<|start|>assistant[[{OSS_THOUGHT}R2<|end|><|start|>assistant{OSS_FINAL}Good.<|return|>]]"
    ),
}
# (family, row): what each example ends with when turns are split
SPLIT = {
    ("qwen3", "two"): [
        f"{IM}user\nQ1<|im_end|>\n{IM}assistant\n{EMPTY}[[A1<|im_end|>]]\n",
        f"{IM}user\nQ1<|im_end|>\n{IM}assistant\nA1<|im_end|>\n{IM}user\nQ2<|im_end|>\n{IM}assistant\n{EMPTY}[[A2<|im_end|>]]\n",
    ],
    ("qwen3", "parallel"): [
        f"{IM}assistant\n{EMPTY}[[<tool_call>\n{AIR}}}\n</tool_call>\n<tool_call>\n{FARE}}}\n</tool_call><|im_end|>]]\n",
        f'<tool_response>\n{{"price": 3}}\n</tool_response><|im_end|>\n{IM}assistant\n{EMPTY}[[Good.<|im_end|>]]\n',
    ],
    ("gemma3", "two"): ["Q1<end_of_turn>\n<start_of_turn>model\n[[A1<end_of_turn>]]\n", "model\n[[A2<end_of_turn>]]\n"],
    ("mistral_small", "two"): ["[INST]Q1[/INST][[A1</s>]]", "[INST]Q1[/INST]A1</s>[INST]Q2[/INST][[A2</s>]]"],
    ("deepseek_v3", "two"): [f"S{DS_ASK}Q1{DS_ANSWER}[[A1{DS_END}]]", f"{DS_ASK}Q2{DS_ANSWER}[[A2{DS_END}]]"],
    ("glm4_5", "thoughts"): [
        "<|user|>\nQ1<|assistant|>[[\n<think>R1</think>\nA1<|user|>]]",
        "<|user|>\nQ1<|assistant|>\n<think></think>\nA1<|user|>\nQ2<|assistant|>[[\n<think>R2</think>\nA2<|user|>]]",
    ],
    ("gpt_oss", "thoughts"): [
        f"Q1<|end|><|start|>assistant[[{OSS_THOUGHT}R1<|end|><|start|>assistant{OSS_FINAL}A1<|return|>]]",
        f"assistant{OSS_FINAL}A1<|end|><|start|>user<|message|>Q2<|end|><|start|>assistant"
        f"[[{OSS_THOUGHT}R2<|end|><|start|>assistant{OSS_FINAL}A2<|return|>]]",
    ],
}


def examples_of(family, name, turns):
    messages, extra = to_messages(ROWS[name])
    examples = encode(tokenizer_of(family), messages, 9000, turns=turns, tools=extra.get("tools"))
    assert all(one.open_turns == 0 for one in examples)
    return examples


def shown(family, example):
    text = bracketed(tokenizer_of(family), example.input_ids, example.loss_mask).replace("⏎\n", "\n")
    # One tokenization of the whole text, no prefix doubled, no border in a token.
    if "[[[" not in text:
        plain = text.replace("[[", "").replace("]]", "")
        assert example.input_ids == tokenizer_of(family)(plain, add_special_tokens=False)["input_ids"]
    return text


@pytest.mark.parametrize(("family", "name"), WHOLE, ids=lambda value: value)
def test_whole_conversations(family, name):
    expected = WHOLE[family, name]
    if "[[" not in expected:
        with pytest.raises(RowError, match=expected):
            examples_of(family, name, "whole")
        return
    (example,) = examples_of(family, name, "whole")
    text = shown(family, example)
    assert text.endswith(expected)
    assert text.count("[[") == expected.count("[[")  # nothing is trained before it


@pytest.mark.parametrize(("family", "name"), SPLIT, ids=lambda value: value)
def test_split_conversations(family, name):
    texts = [shown(family, one) for one in examples_of(family, name, "split")]
    assert len(texts) == len(SPLIT[family, name])
    for text, expected in zip(texts, SPLIT[family, name], strict=True):
        assert text.endswith(expected) and text.count("]]") == expected.count("]]")


def test_the_table_covers_the_families():
    assert {family for family, _ in WHOLE} == set(FAMILIES) and len(FAMILIES) >= 8


def test_tokens_that_end_turns_are_known():
    ends = {family: {end for one in examples_of(family, "two", "split") for end in one.ends} for family in FAMILIES}
    assert ends == {
        **{"chatml": {"<|im_end|>"}, "qwen3": {"<|im_end|>"}, "llama3_1": {"<|eot_id|>"}, "gemma3": {"<end_of_turn>"}},
        **{"mistral_small": {"</s>"}, "deepseek_v3": {DS_END}, "glm4_5": {"<|user|>"}, "gpt_oss": {"<|return|>"}},
    }


def test_thinking_switched_off_gives_the_empty_block_in_the_prompt():
    (example,) = encode(tokenizer_of("qwen3"), [user("Q"), assistant("A")], 900, kwargs={"enable_thinking": False})
    assert shown("qwen3", example).endswith(f"{IM}assistant\n{EMPTY}[[A<|im_end|>]]\n")
    with pytest.raises(RowError, match="generation prompt is not how it opens"):  # a thought after an empty one
        encode(tokenizer_of("qwen3"), to_messages(ROWS["thought"])[0], 900, kwargs={"enable_thinking": False})


@pytest.mark.parametrize(
    ("family", "kwargs", "found"),
    [
        ("llama3_1", {"date_string": "1 May 2025"}, "Today Date: 1 May 2025"),
        ("llama3_1", {}, "Today Date: 26 Jul 2024"),
        ("gpt_oss", {"date": "2025-05-01"}, "Current date: 2025-05-01"),
        ("gpt_oss", {"reasoning_effort": "high"}, "Reasoning: high"),
    ],
)
def test_what_the_template_is_called_with(family, kwargs, found):
    (example,) = encode(tokenizer_of(family), [user("Q"), assistant("A")], 900, kwargs=kwargs)
    assert found in tokenizer_of(family).decode(example.input_ids)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [({"enable_thinking": False}, "does not read it"), ({"tokenize": True}, "cannot be set")],
)
def test_arguments_without_effect_are_refused(kwargs, reason):
    with pytest.raises(RowError, match=reason):
        encode(tokenizer_of("llama3_1"), [user("Q"), assistant("A")], 900, kwargs=kwargs)


@pytest.mark.parametrize("family", ["qwen3", "glm4_5", "deepseek_v3", "mistral_small", "llama3_1", "gpt_oss"])
def test_arguments_as_text_and_as_object_give_the_same_ids(family):
    given = {"city": "Köln", "days": 2}
    both = []
    for arguments in (given, json.dumps(given, ensure_ascii=False)):
        one = {"id": "call00001", "function": {"name": "air", "arguments": arguments}}
        messages, extra = to_messages({"messages": [user("Q"), assistant(tool_calls=[one])], "tools": TOOLS})
        both.append(encode(tokenizer_of(family), messages, 9000, tools=extra["tools"])[0])
    assert both[0] == both[1]
    assert "Köln" in tokenizer_of(family).decode(
        [t for t, on in zip(both[0].input_ids, both[0].loss_mask, strict=True) if on]
    )
