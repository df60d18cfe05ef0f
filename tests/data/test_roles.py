"""Roles of tokens and what the mask X-ray flags, against templates whose output is known by hand."""

from typing import Any

import numpy as np
import pytest

from eaft_verl.data.encode import encode
from eaft_verl.data.parquet import Example
from eaft_verl.data.roles import ROLES, Inspection, inspect

USER = {"role": "user", "content": "Four and five?"}


def seen(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> tuple[Example, Inspection]:
    one = encode(tokenizer, messages, options.pop("max_length", 4000), options.pop("over_long", "error"))[0]
    example = Example("x", messages, one.input_ids, one.loss_mask)
    return example, inspect(tokenizer, example)


def trained_text(tokenizer: Any, example: Example, found: Inspection, role: str) -> str:
    """What the trained tokens of a role spell."""
    chosen = (found.roles == ROLES.index(role)) & np.array(example.loss_mask, bool)
    return tokenizer.decode(np.array(example.input_ids)[chosen])


def text(tokenizer: Any, example: Example, found: Inspection, role: str) -> str:
    return tokenizer.decode(np.array(example.input_ids)[found.roles == ROLES.index(role)])


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "glm", "phi3", "plain"])
def test_answer_user_and_template(make_tokenizer: Any, family: str) -> None:
    tokenizer = make_tokenizer(family)
    example, found = seen(tokenizer, [USER, {"role": "assistant", "content": "The answer is nine."}])
    assert text(tokenizer, example, found, "assistant").strip() == "The answer is nine."
    assert text(tokenizer, example, found, "user").strip() == "Four and five?"
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "glm": "<|user|>", "phi3": "<|end|>"}
    assert trained_text(tokenizer, example, found, "template").strip() == ends.get(family, "")
    assert found.flags == (() if family in ends else ("1 of 1 trained turns train no end of turn",))


def test_short_texts_are_not_found_in_each_other(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "s"},
        {"role": "assistant", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "a"},
    ]
    example, found = seen(tokenizer, messages)
    assert trained_text(tokenizer, example, found, "assistant") == "sa"
    assert trained_text(tokenizer, example, found, "template") == "<|im_end|><|im_end|>"


def test_reasoning_is_told_from_the_answer_and_an_empty_block_is_flagged(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("thinking")
    thought = {"role": "assistant", "content": "Nine.", "reasoning_content": "Add them."}
    example, found = seen(tokenizer, [USER, thought])
    assert trained_text(tokenizer, example, found, "reasoning") == "Add them."
    assert trained_text(tokenizer, example, found, "assistant") == "Nine."
    assert trained_text(tokenizer, example, found, "template") == "<think>\n\n</think>\n\n<|im_end|>"
    assert len(found.flags) == 1 and "trained tokens are the template's" in found.flags[0]
    inline = {"role": "assistant", "content": "<think>\nAdd them.\n</think>\n\nNine."}
    example, found = seen(tokenizer, [USER, inline])
    assert trained_text(tokenizer, example, found, "reasoning") == "<think>\nAdd them.\n</think>\n\n"
    assert found.flags == ()
    _, found = seen(tokenizer, [USER, {"role": "assistant", "content": "Nine."}])
    assert found.flags == ("1 empty <think> blocks",)


@pytest.mark.parametrize(("family", "turns"), [("chatml", 1), ("chatml", 2), ("thinking", 1)])
def test_an_empty_block_that_the_data_writes_is_the_datas(make_tokenizer: Any, family: str, turns: int) -> None:
    tokenizer = make_tokenizer(family)
    written = "<think>\n\n</think>\n\n"
    example, found = seen(tokenizer, [USER, {"role": "assistant", "content": f"{written}Nine."}] * turns)
    assert trained_text(tokenizer, example, found, "reasoning") == written * turns
    assert trained_text(tokenizer, example, found, "assistant") == "Nine." * turns
    assert found.flags == (f"{turns} empty <think> blocks",)


def test_a_tool_call_has_its_role_and_a_tools_result_too(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("thinking")
    call = {"function": {"name": "add", "arguments": {"a": 4, "b": 5}}}
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call], "train": True},
    ]
    example, found = seen(tokenizer, messages)
    assert trained_text(tokenizer, example, found, "tool call").startswith('add {"a": 4, "b": 5}')


def test_a_truncated_answer_is_flagged_and_not_as_an_open_turn(make_tokenizer: Any) -> None:
    messages = [USER, {"role": "assistant", "content": "The answer is nine, of course."}]
    example, found = seen(make_tokenizer(), messages, max_length=30, over_long="truncate")
    (whole,) = encode(make_tokenizer(), messages, 4000)
    assert found.flags == (f"the answer is truncated: 30 of {len(whole.input_ids)} tokens",)
    assert len(example.input_ids) == 30 == len(found.roles)


def test_tokens_that_a_model_wrote_are_not_cut_again(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    prompt = tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    answer = [
        tokenizer.convert_tokens_to_ids(letter) for letter in "answer"
    ]  # letter by letter, as training cuts it not
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "answer"}]
    ids, mask = prompt + answer, [0] * len(prompt) + [1] * len(answer)
    found = inspect(tokenizer, Example("x", messages, ids, mask))
    assert found.roles[-len(answer) :].tolist() == [ROLES.index("assistant")] * len(answer)
    assert found.flags == ("1 of 1 trained turns train no end of turn",)
