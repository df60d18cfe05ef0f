"""The loss mask, token by token. Expected texts are written by hand from each template."""

import random

import pytest

from eaft_verl.data.encode import encode
from eaft_verl.data.show import bracketed
from eaft_verl.data.spec import RowError
from eaft_verl.errors import ConfigError, DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **extra):
    return {"role": "assistant", "content": text, **extra}


SYSTEM = {"role": "system", "content": "S"}
ONE = [user("Q1"), assistant("A1")]
TWO = [user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def shown(tokenizer, example):
    """Text with each trained run in [[ ]]."""
    return bracketed(tokenizer, example.input_ids, example.loss_mask).replace("⏎\n", "\n")


def whole(tokenizer, messages, **options):
    (example,) = encode(tokenizer, messages, 1000, **options)
    return shown(tokenizer, example)


GOLDEN = {
    "chatml": (
        [SYSTEM, *TWO],
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n[[A1<|im_end|>]]\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n[[A2<|im_end|>]]\n",
    ),
    "chatml-tool": (
        [user("Q1"), assistant("A1"), {"role": "tool", "content": "T"}, assistant("A2")],
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n[[A1<|im_end|>]]\n<|im_start|>tool\nT<|im_end|>\n"
        "<|im_start|>assistant\n[[A2<|im_end|>]]\n",
    ),
    "thinking": (
        [SYSTEM, *ONE],
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n[[A1<|im_end|>]]\n",
    ),
    "llama3": (
        [SYSTEM, *TWO],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[A1<|eot_id|>]]<|start_header_id|>user"
        "<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[A2<|eot_id|>]]",
    ),
    "glm": (
        [SYSTEM, *TWO],
        "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>\n[[A1<|user|>]]\nQ2<|assistant|>\n[[A2<|user|>]]",
    ),
    "phi3": (
        TWO,
        "<|user|>Q1<|end|><|assistant|>\n[[A1<|end|>]]<|user|>\nQ2<|end|><|assistant|>\n[[A2<|end|>]]<|endoftext|>",
    ),
    "mistral": (TWO, "[INST] Q1 [/INST][[ A1</s>]][INST] Q2 [/INST][[ A2</s>]]"),
}


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "phi3"])
def test_trained_text_of_each_template(make_tokenizer, name, trim_offsets):
    messages, expected = GOLDEN[name]
    assert whole(make_tokenizer(name.split("-")[0], trim_offsets), messages) == expected


def test_phi3_end_of_turn_token_holds_the_line_break_after_it(make_tokenizer):
    # decode() writes <|end|> without the line break it swallowed, hence the other text.
    assert whole(make_tokenizer("phi3"), TWO) == GOLDEN["phi3"][1].replace("<|user|>Q1", "<|user|>\nQ1")


def test_ids_are_those_of_the_whole_rendering(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    (example,) = encode(tokenizer, [SYSTEM, *TWO], 1000)
    text = tokenizer.apply_chat_template([SYSTEM, *TWO], tokenize=False)
    assert example.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(example.loss_mask) == len(example.input_ids)


def test_first_response_token_and_end_of_turn_by_position(make_tokenizer):
    """One token per character here, so the positions can be counted."""
    tokenizer = make_tokenizer("llama3")
    (example,) = encode(tokenizer, [user("q"), assistant("xyz")], 1000)
    names = tokenizer.convert_ids_to_tokens(example.input_ids)
    start = names.index("x")
    assert names[start:] == ["x", "y", "z", "<|eot_id|>"]
    assert example.loss_mask == [0] * start + [1, 1, 1, 1]


def test_first_token_is_never_trained():
    from eaft_verl.data.spans import Span, loss_mask

    assert loss_mask("xyz", [(0, 1), (1, 2), (2, 3)], [Span(prompt=0, start=0, body=3, end=3)]).tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", ["chatml", "llama3", "thinking", "glm", "mistral"])
def test_trained_tokens_decode_to_content_and_end_of_turn(make_tokenizer, name):
    tokenizer = make_tokenizer(name)
    end = {
        "chatml": "<|im_end|>",
        "thinking": "<|im_end|>",
        "llama3": "<|eot_id|>",
        "glm": "<|user|>",
        "mistral": "</s>",
    }[name]
    draw = random.Random(7)
    alphabet = ["a", "The answer", " ", "\n", "é", "€", "😀", "think", "<think", "PROBE", "<", "|", "user\n", "9"]
    for _ in range(60):
        content = "".join(draw.choice(alphabet) for _ in range(draw.randint(1, 9))).strip() or "x"
        (example,) = encode(tokenizer, [user("PROBE " + content), assistant(content)], 1000)
        trained = [token for token, on in zip(example.input_ids, example.loss_mask, strict=True) if on]
        assert tokenizer.decode(trained, clean_up_tokenization_spaces=False).removeprefix(
            " " if name == "mistral" else ""
        ) == (content + end)


def test_space_merged_into_the_first_token_is_trained_with_it(make_tokenizer):
    assert (
        whole(make_tokenizer("mistral"), [user("Q"), assistant("The answer")]) == "[INST] Q [/INST][[ The answer</s>]]"
    )


def test_token_across_the_border_is_not_trained():
    """Content that begins with the white space the prompt ends with merges with it; that token is half prompt."""
    from eaft_verl.data.spans import Span, loss_mask

    text = "user\n\nyes<end>\n"
    span = Span(prompt=5, start=5, body=9, end=14)  # content "\nyes", end of turn "<end>"
    assert loss_mask(text, [(0, 4), (4, 6), (6, 9), (9, 14), (14, 15)], [span]).tolist() == [0, 0, 1, 1, 0]
    assert loss_mask(text, [(0, 4), (4, 5), (5, 9), (9, 15)], [span]).tolist() == [
        0,
        0,
        1,
        1,
    ]  # the end may take white space along


def test_split_gives_one_example_per_assistant_turn(make_tokenizer):
    tokenizer = make_tokenizer("thinking")
    first, second = encode(tokenizer, TWO, 1000, turns="split")
    assert (first.turn, second.turn) == (1, 3)
    assert shown(tokenizer, first).endswith("assistant\n<think>\n\n</think>\n\n[[A1<|im_end|>]]\n")
    assert shown(tokenizer, second) == (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[[A2<|im_end|>]]\n"
    )


def test_template_that_rewrites_earlier_turns_is_refused_as_a_whole(make_tokenizer):
    with pytest.raises(DataError, match=r"turn 2 \(assistant\).*reasoning left out.*data.turns=split"):
        encode(make_tokenizer("thinking"), TWO, 1000)


def test_reasoning_is_trained_where_it_is_written(make_tokenizer):
    tokenizer = make_tokenizer("thinking")
    expected = "assistant\n[[<think>\nR\n</think>\n\nA<|im_end|>]]\n"
    for answer in (
        assistant("A", reasoning_content="R"),
        assistant("<think>\nR\n</think>\n\nA"),
        assistant("<think>R</think>A"),  # the template spaces it out
    ):
        assert whole(tokenizer, [user("Q"), answer]).endswith(expected)
    empty = assistant("<think>\n\n</think>\n\nA")  # the data says it, so it is content
    assert whole(tokenizer, [user("Q"), empty]).endswith("assistant\n[[<think>\n\n</think>\n\nA<|im_end|>]]\n")


def test_tool_call_is_trained_and_its_result_is_not(make_tokenizer):
    messages = [user("Q"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "2"}, assistant("two")]
    first, second = encode(make_tokenizer("thinking"), messages, 1000, turns="split")
    assert shown(make_tokenizer("thinking"), first).endswith(
        '</think>\n\n[[<tool_call>add {"x": 1}</tool_call><|im_end|>]]\n'
    )
    assert shown(make_tokenizer("thinking"), second).endswith(
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[[two<|im_end|>]]\n"
    )


@pytest.mark.parametrize(
    ("template", "messages", "tools", "reason"),
    [
        ("chatml", [user("Q"), assistant("A", reasoning_content="R")], None, "drops or changes its reasoning_content"),
        ("chatml", [user("Q"), assistant("", tool_calls=[CALL])], None, "drops or changes its tool_calls"),
        ("chatml", ONE, [CALL], "does not write out the tools"),
        ("answerless", ONE, None, "does not write out assistant content"),
        ("deaf", [SYSTEM, *ONE], None, r"turn 1 \(system\): the chat template drops or changes it"),
        ("deepseek", ONE, None, "generation prompt is not how it opens"),
        ("mistral", [SYSTEM, *ONE], None, "refuses this conversation: no system turn"),
        ("chatml", [user("Q")], None, "no assistant turn"),
        ("chatml", [assistant("A")], None, "turn 1 is an assistant turn"),
    ],
)
def test_refused_with_the_reason(make_tokenizer, template, messages, tools, reason):
    for turns in ("whole", "split"):
        with pytest.raises(RowError, match=reason):
            encode(make_tokenizer(template), messages, 1000, turns=turns, tools=tools)


def test_turns_without_end_of_turn_are_counted(make_tokenizer):
    (example,) = encode(make_tokenizer("plain"), TWO, 1000)
    assert shown(make_tokenizer("plain"), example) == "user: Q1\nassistant: [[A1]]\nuser: Q2\nassistant: [[A2]]\n"
    assert example.open_turns == 2
    assert encode(make_tokenizer("glm"), TWO, 1000)[0].open_turns == 0
    assert encode(make_tokenizer("chatml"), TWO, 1000)[0].open_turns == 0


def test_truncation(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    (full,) = encode(tokenizer, [user("Q"), assistant("abcdef")], 1000)
    first = full.loss_mask.index(1)
    (cut,) = encode(tokenizer, [user("Q"), assistant("abcdef")], first + 2, over_long="truncate")
    assert (cut.input_ids, cut.loss_mask) == (full.input_ids[: first + 2], [0] * first + [1, 1])
    assert cut.truncated and not full.truncated
    with pytest.raises(RowError, match="no trained token after truncation"):
        encode(tokenizer, [user("Q"), assistant("abcdef")], first, over_long="truncate")
    for policy in ("error", "drop"):
        with pytest.raises(RowError, match=f"{len(full.input_ids)} tokens, data.max_length is {first}"):
            encode(tokenizer, [user("Q"), assistant("abcdef")], first, over_long=policy)


def test_unusable_tokenizers(make_tokenizer):
    from transformers import ByT5Tokenizer

    with pytest.raises(ConfigError, match="is a slow one"):
        encode(ByT5Tokenizer(), ONE, 100)
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template, kept = None, tokenizer.chat_template
    try:
        with pytest.raises(ConfigError, match="has no chat template"):
            encode(tokenizer, ONE, 100)
    finally:
        tokenizer.chat_template = kept


def test_last_trains_the_last_turn_only(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    (last,) = encode(tokenizer, [SYSTEM, *TWO], 1000, turns="last")
    assert shown(tokenizer, last).count("[[") == 1 and "[[A2<|im_end|>]]" in shown(tokenizer, last)
    assert last.turn == 4


def test_rows_of_many_turns_and_of_many_tokens_take_seconds(make_tokenizer):
    import time

    started = time.process_time()
    turns = [turn for number in range(300) for turn in (user(f"Q{number}"), assistant(f"A{number}"))]
    (many,) = encode(make_tokenizer("chatml"), turns, 10**6)
    assert len(many.trained) == 300 and sum(many.loss_mask) > 900
    (long,) = encode(make_tokenizer("chatml"), [user("word " * 350_000), assistant("A")], 10**8)
    assert len(long.input_ids) > 1_700_000 and sum(long.loss_mask) == 2
    assert time.process_time() - started < 60
