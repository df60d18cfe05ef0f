"""What each token of a prepared example is: whose words, reasoning, a tool call, or the chat template's own.

The conversation is rendered again and its texts are looked for in order, each assistant turn behind the prompt that it
answers; what is nobody's text is the template's. Works without a model.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_verl.data.offsets import tokenize
from eaft_verl.data.parquet import Example
from eaft_verl.data.spec import RowError
from eaft_verl.data.template import ChatTemplate, special_tokens, template_for

ROLES = ("template", "system", "user", "assistant", "reasoning", "tool call", "tool")
TEMPLATE, ASSISTANT, REASONING, CALL = map(ROLES.index, ("template", "assistant", "reasoning", "tool call"))
_END_OF_THOUGHT, _THOUGHT = "</think>", "<think>"
_EMPTY_THOUGHT = re.compile(r"<(\w*think\w*)>\s*</\1>")


@dataclass(frozen=True)
class Inspection:
    """roles [T]: index into ROLES of each token. flags: what a person should look at, in words."""

    roles: NDArray[np.int8]
    flags: tuple[str, ...]


def inspect(tokenizer: Any, example: Example) -> Inspection:
    """The roles of an example's tokens, and what is odd about what is trained."""
    ids, mask = np.asarray(example.input_ids), np.asarray(example.loss_mask, bool)
    rendered = _rendered(tokenizer, example, ids)
    if rendered is None:  # tokens that a model wrote need not be the ones its text would be cut into
        roles, text, whole = _of_written(tokenizer, ids, mask), tokenizer.decode(ids[mask]), len(ids)
    else:
        template, text, ends, whole = rendered
        roles = _labels(template, example.messages, text)[np.maximum(ends, 1) - 1]
        roles[(roles == CALL) & np.isin(ids, list(tokenizer.added_tokens_decoder))] = TEMPLATE
    return Inspection(roles, tuple(_flags(tokenizer, ids, mask, roles, text, whole)))


def _rendered(
    tokenizer: Any, example: Example, ids: NDArray[Any]
) -> tuple[ChatTemplate, str, NDArray[np.int64], int] | None:
    """(template, text, end of each token in it [T], tokens of the whole text); None if it is not cut into these ids."""
    if not example.messages:
        return None
    try:
        template = template_for(tokenizer, example.messages, example.tools, example.chat_template_kwargs)
        text = template.render(example.messages)
    except RowError:
        return None
    (tokens,) = tokenize(tokenizer, [text])
    shared = min(len(ids), len(tokens.ids))
    added = len(ids) - shared  # the next turn's role token, which ends a turn of GLM-4's
    if added > 1 or not np.array_equal(ids[:shared], tokens.ids[:shared]):
        return None
    ends = np.append(tokens.offsets[:shared, 1], [len(text) + 1] * added).astype(np.int64)
    return template, text, ends, max(len(tokens.ids), len(ids))


def _labels(template: ChatTemplate, messages: Sequence[dict[str, Any]], text: str) -> NDArray[np.int8]:
    """Role of each character, and of one behind the last."""
    labels = np.full(len(text) + 1, TEMPLATE, np.int8)
    place = 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            with contextlib.suppress(RowError):  # a template may refuse a conversation that stops there
                prompt = template.render(list(messages[:index]), generate=True)
                place = len(prompt) if text.startswith(prompt) else place
        for role, said in _texts(message, text[place:]):
            found = next((form for form in (said, said.strip()) if form and form in text[place:]), "")
            if found:  # templates may strip what they are given
                start = text.index(found, place)
                place = start + len(found)
                labels[start:place] = role
        if calls := message.get("tool_calls"):
            start = text.find(calls[0]["function"]["name"], place)
            if start >= 0:
                place = _next_special(template, text, start)
                labels[start:place] = CALL
    return labels


def _texts(message: dict[str, Any], rendered: str) -> Iterator[tuple[int, str]]:
    """(role, text) of the parts of a turn, in the order in which they are written; `rendered`: it and what follows.

    Tags around reasoning, and an empty block, are the data's where its own text has them and the turn begins with them.
    """
    content = message["content"]
    if message["role"] != "assistant":
        yield ROLES.index(message["role"]), content
        return
    yield REASONING, message.get("reasoning_content", "").strip()
    thought, found, answer = content.rpartition(_END_OF_THOUGHT)
    block = content.removesuffix(answer.lstrip()).lstrip()
    own = found and rendered.lstrip().startswith(block.strip())
    yield REASONING, block if own else thought.rpartition(_THOUGHT)[2].strip() if found else ""
    yield ASSISTANT, answer.lstrip() if found else content


def _next_special(template: ChatTemplate, text: str, start: int) -> int:
    found = [place for token in template.specials if (place := text.find(token, start)) >= 0]
    return min(found, default=len(text))


def _of_written(tokenizer: Any, ids: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Roles of an answer that a model wrote token by token: reasoning up to the token that ends it, if there is one."""
    roles = np.where(mask, ASSISTANT, TEMPLATE).astype(np.int8)
    ends = np.flatnonzero(mask & (ids == tokenizer.convert_tokens_to_ids(_END_OF_THOUGHT)))
    if len(ends):
        roles[: ends[-1]][mask[: ends[-1]]] = REASONING
    roles[np.isin(ids, _special_ids(tokenizer))] = TEMPLATE
    return roles


def _special_ids(tokenizer: Any) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in special_tokens(tokenizer)]


def _flags(
    tokenizer: Any, ids: NDArray[Any], mask: NDArray[np.bool_], roles: NDArray[np.int8], text: str, whole: int
) -> Iterator[str]:
    special = np.isin(ids, _special_ids(tokenizer))
    last = np.flatnonzero(mask & ~np.append(mask[1:], False))  # of each run of trained tokens
    inserted = mask & (roles == TEMPLATE)
    inserted[last[special[last]]] = False  # an end of turn is trained on purpose
    inserted &= ~(special & np.isin(np.arange(len(ids)) + 1, last))  # two side by side, as Command A has them
    if inserted.any():
        written = [tokenizer.decode([token]) for token in dict.fromkeys(ids[inserted].tolist())]
        yield f"{inserted.sum()} trained tokens are the template's: {', '.join(map(repr, written))}"
    cut = whole > len(ids)
    if cut:
        yield f"the answer is truncated: {len(ids)} of {whole} tokens"
    if (open_turns := int((~special[last]).sum()) - cut) > 0:
        yield f"{open_turns} of {len(last)} trained turns train no end of turn"
    if found := _EMPTY_THOUGHT.findall(text):
        yield f"{len(found)} empty <{found[0]}> blocks"
