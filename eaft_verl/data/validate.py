"""Checks of one row that need no chat template: turns, roles, and characters that must not reach a tokenizer."""

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eaft_verl.data.spec import RowError

Message = dict[str, Any]
_SURROGATE = re.compile("[\ud800-\udfff]")
_ZERO_WIDTH_SPACE = "\u200b"


def check_row(
    messages: list[Message],
    control_tokens: Sequence[str] = (),
    policy: str = "error",
    *,
    normal: Callable[[str], str] | None = None,
    **beside: Any,
) -> tuple[list[Message], dict[str, Any], int]:
    """(messages, beside, number of control tokens escaped) of a row that may be encoded; RowError says why it may not.

    control_tokens: texts of the tokenizer's special tokens. policy: `error`, `escape` or `allow` (see DataSpec).
    normal: what the tokenizer makes of a text before it looks for them. beside: what else of the row the chat template
    writes (tools, its arguments), by the name that a message calls it.
    """
    _check_turns(messages)
    parts = {f"turn {number} ({message['role']})": message for number, message in enumerate(messages, 1)} | beside
    texts = {where: _strings(part) for where, part in parts.items()}
    _require_characters(texts)
    if policy == "allow" or not control_tokens:
        return messages, beside, 0
    halves = _halves(tuple(control_tokens), [text for some in texts.values() for text in some])
    pattern = _pattern((*control_tokens, *halves))
    count = 0
    if policy == "escape":
        escaped = {where: _escape(part, pattern) for where, part in parts.items()}
        count = sum(number for _, number in escaped.values())
        parts = {where: part for where, (part, _) in escaped.items()}
        texts = {where: _strings(part) for where, part in parts.items()}
    _require_no_token(texts, pattern, normal, policy)
    kept = list(parts.values())
    return kept[: len(messages)], dict(zip(beside, kept[len(messages) :], strict=True)), count


def _require_characters(texts: dict[str, list[str]]) -> None:
    for where, some in texts.items():
        for text in some:
            if "\0" in text or not text.isascii():  # few
                _check_characters(text, where.partition(" (")[0])


def _require_no_token(
    texts: dict[str, list[str]], pattern: re.Pattern[str], normal: Callable[[str], str] | None, policy: str
) -> None:
    for where, some in texts.items():
        for text in some:
            if found := pattern.search(text) or (normal and pattern.search(normal(text))):
                raise RowError("control_token", _refusal(where, found, policy))


def _refusal(where: str, found: re.Match[str], policy: str) -> str:
    if policy == "escape":
        return f"{where}: the control token {found[0]!r} cannot be escaped"
    return (
        f"{where} holds the control token {found[0]!r} at character {found.start() + 1}; "
        "set data.control_tokens=escape to make it plain text, or allow to keep it"
    )


@functools.cache
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the tokens; one inside another (<s> in <s>x) is found by the longest that fits."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


@functools.cache
def _borders(tokens: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
    """Two characters with which beginnings of tokens end, and ends begin."""
    begins, ends, _ = _parts(tokens)
    return frozenset(part[-2:] for part in begins), frozenset(part[:2] for part in ends)


@functools.cache
def _parts(tokens: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str], range]:
    """Beginnings of tokens, of two characters and more, and ends, and the lengths of both."""
    begins = frozenset(token[:cut] for token in tokens for cut in range(2, len(token)))
    ends = frozenset(token[cut:] for token in tokens for cut in range(1, len(token) - 1))
    return begins, ends, range(2, max(map(len, tokens)))


def _halves(tokens: tuple[str, ...], texts: list[str]) -> tuple[str, ...]:
    """Of control tokens whose beginning ends one text of the row and whose end begins another, the longer halves: a
    template that writes the two side by side would complete them."""
    begins, ends, lengths = _parts(tokens)
    last, first = _borders(tokens)
    tails = {text[-size:] for text in texts if text[-2:] in last for size in lengths} & begins
    heads = {text[:size] for text in texts if text[:2] in first for size in lengths} & ends
    if not tails and not heads:
        return ()
    likely = [(left, right) for left, right in _cuts(tokens) if left in tails or right in heads]
    return tuple(sorted({max(pair, key=len) for pair in likely if _side_by_side(*pair, texts)}))


@functools.cache
def _cuts(tokens: tuple[str, ...]) -> list[tuple[str, str]]:
    """Every token cut in two, everywhere."""
    return [(token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token))]


def _side_by_side(left: str, right: str, texts: list[str]) -> bool:
    """Whether some text ends in the one and some begins with the other."""
    return any(text.endswith(left) for text in texts) and any(text.startswith(right) for text in texts)


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


def check_fields(fields: Mapping[str, Any]) -> None:
    """RowError if a text beside the messages, however deep in its field, cannot be written as UTF-8 or to a file."""
    for name, value in fields.items():
        for text in _strings(value):
            _check_characters(text, name)


def _check_characters(text: str, where: str) -> None:
    if "\0" in text:
        raise RowError("nul", f"{where} holds a NUL character at character {text.index(chr(0)) + 1}")
    if found := _SURROGATE.search(text):
        raise RowError(
            "invalid_utf8",
            f"{where} holds half a surrogate pair (U+{ord(found[0]):04X}) at character {found.start() + 1}, "
            "which is no text in UTF-8",
        )


def _escape(value: Any, pattern: re.Pattern[str]) -> tuple[Any, int]:
    """Every control token broken up with U+200B after its first character, and how many there were.

    The text itself is changed, instead of only how it is encoded here, so that the parquet is safe for every later
    reader: rollouts, evaluation and other trainers render and encode the same messages again.
    """
    count = 0

    def break_up(found: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return found[0][0] + _ZERO_WIDTH_SPACE + found[0][1:]

    return _map_strings(value, lambda text: pattern.sub(break_up, text)), count


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
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
