"""Nothing that means something is left behind: every column and every key of a turn is used, refused or counted."""

import json
import re

import pytest

from eaft_verl.data.formats import to_messages
from eaft_verl.data.spec import DataSpec, RowError
from eaft_verl.errors import ConfigError
from eaft_verl.experiment.prepare import columns_of

PAIR = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
TWO = [*PAIR, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "I", "context": "C", "response": "A"}, [user("I\nC"), assistant("A")]),  # dolly
        ({"instruction": "I", "context": "", "response": "A"}, [user("I"), assistant("A")]),
        ({"instruction": "I", "input": "C", "response": "A"}, [user("I\nC"), assistant("A")]),
        ({"question": "Q", "context": "C", "answer": "A"}, [user("Q\nC"), assistant("A")]),  # sql-create-context
        (
            {"system_prompt": "S", "question": "Q", "response": "A"},  # OpenOrca
            [{"role": "system", "content": "S"}, *PAIR],
        ),
        ({"query": "Q2", "response": "A2", "history": [["Q", "A"]]}, TWO),
        ({"query": "Q2", "response": "A2", "history": json.dumps([["Q", "A"]])}, TWO),
        ({"query": "Q2", "response": "A2", "history": PAIR}, TWO),
        ({"input": "Q", "output": "A"}, PAIR),
        ({"messages": json.dumps(PAIR)}, PAIR),
        ({"system": "", "messages": PAIR}, PAIR),
        ({"messages": [{"role": "system", "content": " "}, *PAIR]}, PAIR),
        (
            {"system": "S", "messages": [{"role": "system", "content": "S"}, *PAIR]},
            [{"role": "system", "content": "S"}, *PAIR],
        ),
        ({"messages": [{"role": "developer", "content": "S"}, *PAIR]}, [{"role": "system", "content": "S"}, *PAIR]),
        ({"prompt": PAIR[:1], "completion": PAIR[1:]}, PAIR),
        ({"prompt": TWO[:3], "completion": TWO[3:]}, [TWO[0], {**TWO[1], "train": False}, *TWO[2:]]),
    ],
)
def test_context_stands_in_the_conversation(row, messages):
    assert to_messages(row)[0] == messages


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"messages": PAIR, "images": ["a.jpg"]}, "column", "column 'images' holds .*which text alone cannot show"),
        ({"messages": PAIR, "documents": [{"text": "The line opened in 1931."}]}, "column", "column 'documents' holds"),
        ({"question": "Q", "answer": "A", "options": {"A": "x"}}, "column", "column 'options' holds"),
        ({"question": "Q", "answer": "A", "choices": ["0", "1"]}, "column", "'choices' .*put it into a turn as text"),
        ({"question": "Q", "answer": "A", "choices": "0 or 1"}, "column", "--column context='choices'"),
        ({"messages": PAIR, "hint": "Think of the sea."}, "column", "column 'hint'"),
        ({"messages": PAIR, "提示": "请用代数方法解这道题目"}, "column", "column '提示'"),
        ({"messages": PAIR, "context": "Norvik is a town."}, "column", "column 'context'"),
        ({"messages": PAIR, "reasoning": "Because of the sea."}, "column", "column 'reasoning'"),
        ({"messages": PAIR, "history": [["a", "b b"]]}, "column", "column 'history'"),
        ({"messages": PAIR, "my_column": "free text of a kind"}, "column", "ignore: .my_column."),
        ({"messages": [{**PAIR[0], "image": "a.jpg"}, PAIR[1]]}, "column", r"messages\[\] key 'image'"),
        ({"messages": [PAIR[0], {**PAIR[1], "channel": "analysis"}]}, "column", r"messages\[\] key 'channel'"),
        (
            {"system": "S", "messages": [{"role": "system", "content": "T"}, *PAIR]},
            "clash",
            "system column and a system",
        ),
        ({"system": "S", "system_prompt": "T", "messages": PAIR}, "clash", "system and system_prompt"),
        ({"messages": PAIR, "conversations": TWO}, "clash", "messages and conversations"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(row, kind, reason):
    with pytest.raises(RowError, match=reason) as caught:
        to_messages(row)
    assert caught.value.kind == kind
    for way in str(caught.value).split(" or "):  # what is advised works
        if named := re.findall(r"--column \w+='.*?'", way):
            assert to_messages(row, columns_of([one.replace("--column ", "").replace("'", "") for one in named]))


def test_metadata_and_copies_are_counted_by_name():
    unused = {}
    row = {
        **{
            "messages": [{**PAIR[0], "timestamp": 3, "name": "Ann"}, PAIR[1]],
            "source": "the web, mostly",
            "score": 0.5,
        },
        **{
            "url": "https://a.b/c",
            "prompt": "Q",
            "text": "user: Q assistant: A",
            "uuid": "a-b",
            "label": None,
            "tags": [],
        },
    }
    assert to_messages(row, unused=unused)[0] == PAIR
    assert to_messages({"messages": PAIR, "source": "x"}, unused=unused)[0] == PAIR
    names = ("source", "score", "url", "prompt", "text", "uuid", "messages[].timestamp", "messages[].name")
    assert unused == {**dict.fromkeys(names, 1), "source": 2}


HUATUO = {
    "question": "q q",
    "options": {"A": "x x"},
    "answer": "x x",
    "Question": "Q",
    "Complex_CoT": "R",
    "Response": "A",
}


def test_names_are_read_as_words_however_they_are_joined():
    said = {"systemPrompt": "Be brief.", "messages": PAIR, "sampleWeight": 2}
    messages, extra = to_messages(said)
    assert messages == [{"role": "system", "content": "Be brief."}, *PAIR] and extra == {"weight": 2.0}
    for key, value in (
        ("toolCalls", [{"function": {"name": "f", "arguments": "{}"}}]),
        ("tool_call", {"name": "f", "arguments": {}}),
        ("function", {"name": "f"}),
        ("action", "search"),
        ("reasoningContent", "because"),
        ("trainOnTurn", False),
    ):
        with pytest.raises(RowError, match=rf"messages\[\] key '{key}' holds"):
            to_messages({"messages": [PAIR[0], {**PAIR[1], key: value}]})
    for key, value in (("imageUrl", "a.jpg"), ("trainOnInputs", False), ("chat-history", "x"), ("exclude", True)):
        with pytest.raises(RowError, match=f"column '{key}' holds"):
            to_messages({"messages": PAIR, key: value})


def test_a_turn_says_who_speaks_and_what_once():
    asked = (
        {"from": "human", "content": "Q"},
        {"role": "user", "value": "Q"},
        {**PAIR[0], "from": "human", "value": "Q"},
    )
    assert [to_messages({"conversations": [turn, PAIR[1]]})[0] for turn in asked] == [PAIR] * 3
    for turn, said in (
        ({"from": "human", "value": "Q", "content": "R"}, "a value and a content that differ"),
        ({"from": "human", "role": "assistant", "value": "Q"}, "is from 'human' and has role 'assistant'"),
    ):
        with pytest.raises(RowError, match=f"turn 1 .*{said}"):
            to_messages({"conversations": [turn, PAIR[1]]})


def test_an_answer_that_is_marked_bad_is_not_trained():
    row = {"prompt": "Q", "completion": "A"}
    for key in ("label", "kto_tag"):
        with pytest.raises(RowError, match=f"{key} is False") as caught:
            to_messages({**row, key: False})
        assert caught.value.kind == "masked"
        assert to_messages({**row, key: True})[0] == to_messages({**row, key: False}, {"ignore": [key]})[0] == PAIR
    counted: dict[str, int] = {}
    to_messages({**row, "label": "math"}, None, counted)
    assert counted == {"label": 1}


def test_columns_by_their_roles():
    row = {**HUATUO, "Ground-True Answer": "y"}
    with pytest.raises(RowError, match="question and Question.*say which by 'data.columns="):
        to_messages(row)
    named, unused = {"prompt": "Question", "reasoning": "Complex_CoT", "response": "Response"}, {}
    messages, extra = to_messages(row, named, unused)
    assert messages == [user("Q"), assistant("A", reasoning_content="R")] and extra == {"answer": "x x"}
    assert unused == {"question": 1, "options": 1, "Ground-True Answer": 1}
    assert to_messages(row, {**named, "answer": "Ground-True Answer"})[1] == {"answer": "y"}
    assert to_messages(row, {**named, "answer": None})[1] == {}


def test_columns_of_other_roles_and_none():
    row = {"frage": "Q", "antwort": "A", "hinweis": "H h", "gewicht": 2, "context": "C c"}
    named = {"prompt": "frage", "response": "antwort", "weight": "gewicht"}
    messages, extra = to_messages(row, {**named, "context": "hinweis"})
    assert messages == [user("Q\nH h"), assistant("A")] and extra == {"weight": 2.0}
    assert to_messages(row, {**named, "context": None, "ignore": ["hinweis"]})[0] == PAIR
    assert to_messages({"dialog": PAIR, "options": [1]}, {"messages": "dialog"})[0] == PAIR
    with pytest.raises(RowError, match="there is no column 'fragen'.*the row has antwort, context"):
        to_messages(row, {**named, "prompt": "fragen"})
    with pytest.raises(RowError, match="column 'images'"):  # what text cannot show is never passed over
        to_messages({**row, "images": ["a.png"]}, named)


@pytest.mark.parametrize("key", ["weight", "train", "loss", "trainable", "loss_mask"])
@pytest.mark.parametrize("no", [0, False, "false", 0.0])
def test_a_turn_is_masked_in_every_spelling(key, no):
    yes = {0: 1, "false": "true"}.get(no, True)
    turns = [TWO[0], {**TWO[1], key: no}, TWO[2], {**TWO[3], key: yes}]
    expected = [TWO[0], {**TWO[1], "train": False}, *TWO[2:]]
    assert to_messages({"messages": turns})[0] == expected
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[turn.pop("role")], "value": turn.pop("content"), **turn} for turn in map(dict, turns)]
    assert to_messages({"conversations": shared})[0] == expected


@pytest.mark.parametrize("key", ["weight", "train", "loss", "trainable", "loss_mask"])
def test_a_row_is_masked_as_a_whole_or_turn_by_turn(key):
    with pytest.raises(RowError, match="the row is not to be trained") as caught:
        to_messages({"messages": PAIR, key: 0})
    assert caught.value.kind == "masked"
    assert to_messages({"messages": TWO, key: [0, 0, 0, 1]})[0][1]["train"] is False
    with pytest.raises(RowError, match=f"{key} lists 3 values for 4 turns"):
        to_messages({"messages": TWO, key: [0, 0, 1]})


def test_masks_that_cannot_be_kept_are_refused():
    for turns, reason in (
        ([{**PAIR[0], "train": True}, PAIR[1]], "only assistant turns can be"),
        ([PAIR[0], {**PAIR[1], "weight": 0.5}], "weight of turn 2 is 0.5"),
        ([PAIR[0], {**PAIR[1], "weight": 0, "train": True}], "by one of its keys and not by another"),
        ([PAIR[0], {**PAIR[1], "train_detail": [{"begin": 0}]}], "train_detail"),
    ):
        with pytest.raises(RowError, match=reason):
            to_messages({"messages": turns})
    assert to_messages({"messages": PAIR, "weight": 0.5})[1] == {"weight": 0.5}
    with pytest.raises(RowError, match="weight of the row is -1"):
        to_messages({"messages": PAIR, "weight": -1})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_its_usual_names(key):
    expected = [PAIR[0], assistant("A", reasoning_content="R")]
    assert to_messages({"messages": [PAIR[0], {**PAIR[1], key: "R"}]})[0] == expected
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", key: "R"}]
    assert to_messages({"conversations": turns})[0] == expected
    assert to_messages({"prompt": "Q", key: "R", "response": "A"})[0] == expected


def test_reasoning_said_twice():
    both = {"reasoning": "R", "thinking": "R"}
    assert to_messages({"messages": [PAIR[0], {**PAIR[1], **both}]})[0][1]["reasoning_content"] == "R"
    for more in ({"reasoning": "R", "thinking": "S"}, {"content": "<think>S</think>A", "thinking": "R"}):
        with pytest.raises(RowError) as caught:
            to_messages({"messages": [PAIR[0], {**PAIR[1], **more}]})
        assert caught.value.kind == "clash"


CALL = {"type": "function", "function": {"name": "air", "arguments": {"city": "Norvik"}}}
CALL_TEXT = json.dumps(CALL["function"])


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("gpt", "I look."), ("function_call", CALL_TEXT)], assistant("I look.", tool_calls=[CALL])),
        ([("thinking", "R"), ("gpt", "A")], assistant("A", reasoning_content="R")),
        ([("thinking", "R"), ("function_call", CALL_TEXT)], assistant("", reasoning_content="R", tool_calls=[CALL])),
        ([("function_call", CALL_TEXT), ("function_call", CALL_TEXT)], assistant("", tool_calls=[CALL, CALL])),
        (
            [("function_call", f"<think>\nR\n</think>\n\n{CALL_TEXT}")],
            assistant("<think>\nR\n</think>", tool_calls=[CALL]),
        ),
        ([("tool_call", f"[{CALL_TEXT}]")], assistant("", tool_calls=[CALL])),
    ],
)
def test_text_or_thinking_before_a_call_is_one_turn(turns, expected):
    row = {"conversations": [{"from": "human", "value": "Q"}, *({"from": who, "value": text} for who, text in turns)]}
    assert to_messages(row)[0] == [PAIR[0], expected]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"columns": {"promt": "Q"}}, "data.columns.promt is unknown; a column's role is one of messages, prompt"),
        ({"columns": {"prompt": 3}}, "data.columns.prompt=3 must be the name of a column"),
        ({"columns": "Q"}, "data.columns='Q' must be a mapping"),
        ({"source": {"a": {"source": "a", "weigth": 1}}}, "data.train.a.weigth is unknown; a source has source, name"),
        ({"source": {"a": {"source": "a", "share": 1.5}}}, "data.train.a.share=1.5 must be above 0 and at most 1"),
        ({"source": {"a": {"source": "a", "cap": 0}}}, "data.train.a.cap=0 must be a whole number"),
        ({"source": {"a": {"source": "a", "weight": 0}}}, "data.train.a.weight=0 must be above 0"),
        ({"source": {"a": {"source": "a", "share": 0.5}}}, "shares add up to 0.5; they must make 1"),
        ({"source": []}, "names no source"),
        ({"source": ["d/x.jsonl", "e/x.jsonl"]}, "two sources are called 'x'"),
        ({"chat_template_kwargs": 3}, "data.chat_template_kwargs=3 must be a mapping"),
        ({"columns": {"prompt": "a", "response": "a"}}, "data.columns: column 'a' is named as prompt and as response"),
    ],
)
def test_specs_that_are_refused(spec, reason):
    with pytest.raises(ConfigError, match=reason):
        DataSpec(**{"source": "a.jsonl", **spec})


def test_a_role_is_named_once_on_the_command_line():
    several = columns_of(["context=a", "context=b", "ignore=c", "ignore=d", "prompt=p", "system="])
    assert several == {"context": ["a", "b"], "ignore": ["c", "d"], "prompt": "p", "system": None}
    assert columns_of(["context=a", "ignore=c"]) == {"context": "a", "ignore": ["c"]}
    with pytest.raises(ConfigError, match="--column prompt is given twice; one column has it"):
        columns_of(["prompt=p", "prompt=q"])
