"""Checks of one row that need no chat template: turns, roles, and characters that must not reach a tokenizer."""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from eaft_verl.data.spec import RowError

Message = dict[str, Any]
_SURROGATE = re.compile("[\ud800-\udfff]")
_ZERO_WIDTH_SPACE = "\u200b"


def check_row(
    messages: list[Message], control_tokens: Sequence[str] = (), policy: str = "error"
) -> tuple[list[Message], int]:
    """(messages, number of control tokens escaped) of a row that may be encoded; RowError says why it may not.

    control_tokens: texts of the tokenizer's special tokens. policy: `error`, `escape` or `allow` (see DataSpec).
    """
    _check_turns(messages)
    for number, message in enumerate(messages, 1):
        for text in _strings(message):
            _check_characters(text, number)
    if policy == "allow" or not control_tokens:
        return messages, 0
    pattern = _pattern(tuple(control_tokens))
    if policy == "escape":
        return _escape(messages, pattern)
    for number, message in enumerate(messages, 1):
        for text in _strings(message):
            if found := pattern.search(text):
                raise RowError(
                    "control_token",
                    f"turn {number} ({message['role']}) holds the control token {found[0]!r} at character "
                    f"{found.start() + 1}; set data.control_tokens=escape to make it plain text, or allow to keep it",
                )
    return messages, 0


@functools.cache
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the tokens; one inside another (<s> in <s>x) is found by the longest that fits."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _check_turns(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if not roles:
        raise RowError("missing_assistant", "no turns")
    if "assistant" not in roles:
        raise RowError("missing_assistant", f"no assistant turn among {', '.join(roles)}")
    if "system" in roles[1:]:
        raise RowError(
            "role_order", f"turn {roles.index('system', 1) + 1} is a system turn; only the first turn may be"
        )
    start = 1 if roles[0] == "system" else 0
    if roles[start] != "user":
        raise RowError(
            "role_order", f"turn {start + 1} is {roles[start]}; the first turn after the system's must be user"
        )
    for number, (before, role) in enumerate(itertools.pairwise(roles), 2):
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowError("role_order", f"turn {number} is a tool result without an assistant turn before it")
    if roles[-1] != "assistant":
        raise RowError("role_order", f"the last turn is {roles[-1]}; a conversation must end with an assistant turn")
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise RowError("empty_assistant", f"turn {number} (assistant) is empty")


def _check_characters(text: str, number: int) -> None:
    if "\0" in text:
        raise RowError("nul", f"turn {number} holds a NUL character at character {text.index(chr(0)) + 1}")
    if found := _SURROGATE.search(text):
        raise RowError(
            "invalid_utf8",
            f"turn {number} holds half a surrogate pair (U+{ord(found[0]):04X}) at character {found.start() + 1}, "
            "which is no text in UTF-8",
        )


def _escape(messages: list[Message], pattern: re.Pattern[str]) -> tuple[list[Message], int]:
    """Break up every control token with U+200B after its first character.

    The text itself is changed, instead of only how it is encoded here, so that the parquet is safe for every later
    reader: rollouts, evaluation and other trainers render and encode the same messages again.
    """
    count = 0

    def break_up(found: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return found[0][0] + _ZERO_WIDTH_SPACE + found[0][1:]

    escaped = [_map_strings(message, lambda text: pattern.sub(break_up, text)) for message in messages]
    for number, message in enumerate(escaped, 1):
        for text in _strings(message):
            if found := pattern.search(text):
                raise RowError("control_token", f"turn {number}: the control token {found[0]!r} cannot be escaped")
    return escaped, count


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value


def _strings(value: Any) -> list[str]:
    """All texts in a message, the keys of tool call arguments included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return []
