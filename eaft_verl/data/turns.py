"""One turn of a conversation, as {role, content} or {from, value}, to a message, and what of it means nothing."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from eaft_verl.data.calls import call_turn, calls_in, parsed
from eaft_verl.data.columns import MASK_KEYS, Row, absent
from eaft_verl.data.spec import RowError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
# role: what it is here. A call is an assistant turn written as JSON, a thought the first half of one.
_ROLES = {role: role for role in ROLES} | {
    "developer": "system",
    "function": "tool",
    "tool_response": "tool",
    "tool_call": "call",
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "call",
    "system": "system",
    "observation": "tool",
    "function": "tool",
    "tool": "tool",
    "tool_call": "call",
    "tool_response": "tool",
    "thinking": "thought",
    "thought": "thought",
    "reasoning": "thought",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TURN_MASKS = (*MASK_KEYS, "weight")
_TURN_KEYS = {"role", "content", "from", "value", "tool_calls", "function_call", *REASONING_KEYS, *TURN_MASKS}
_PLAIN = {"role", "content"}
_SAYS = ("text", "value")  # keys of a part of the content, besides one of its type's name
# type of a part: where it belongs, and what it is called
_PARTS = {
    "reasoning": ("reasoning_content", "reasoning part"),
    "thinking": ("reasoning_content", "reasoning part"),
    "text": ("content", "text part"),
    "tool_call": ("tool_calls", "tool call"),
}
_SAID = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # True is 1


def text_of(value: Any, where: str) -> str:
    """The value, if it is text."""
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{where} is {type(value).__name__} ({str(value)[:40]!r}); write it as text")
    return value


def read_turns(given: Any, name: str, masks: Mapping[str, list[Any]] | None = None) -> tuple[list[Message], list[str]]:
    """Messages of a list of turns, or of its JSON, and the keys of turns that were not used.

    masks: what the row says of every turn, by the key under which the turn itself would say it.
    """
    turns = given
    if isinstance(given, str) and given.lstrip().startswith("["):
        turns = parsed(given, name)
    if not isinstance(turns, list):
        raise RowError("wrong_type", f"{name} is {type(turns).__name__}; a list of turns is expected")
    # Objects of different shapes are kept as JSON text by Hugging Face datasets.
    turns = [
        parsed(turn, f"turn {at}") if isinstance(turn, str) and turn[:1] == "{" else turn
        for at, turn in enumerate(turns, 1)
    ]
    for key, values in (masks or {}).items():
        turns = _marked(turns, key, values)
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    left = {key: None for turn, made in zip(turns, messages, strict=True) for key in _left(turn, made, f"{name}[]")}
    return messages, list(left)


def _marked(turns: list[Any], key: str, values: list[Any]) -> list[Any]:
    """The turns, each with its value of the row's list; RowError where a turn's own is another."""
    if len(values) != len(turns):
        raise RowError("mask", f"{key} lists {len(values)} values for {len(turns)} turns; one per turn is expected")
    marked = []
    for number, (turn, value) in enumerate(zip(turns, values, strict=True), 1):
        if isinstance(turn, dict) and not absent(value):
            own = turn.get(key)
            if not absent(own) and switch(own, f"{key} of turn {number}") != switch(value, f"{key} of turn {number}"):
                raise RowError("clash", f"{key} of turn {number} is {own!r}, and {value!r} in the row's list {key}")
            turn = {**turn, key: value}
        marked.append(turn)
    return marked


def _left(turn: dict[str, Any], made: Message, where: str) -> list[str]:
    """Keys of a turn, and of the parts of its content, that are not used: metadata all of them, or RowError."""
    if turn.keys() == _PLAIN and isinstance(turn["content"], str):
        return []
    left = _others(turn, _TURN_KEYS | made.keys(), where)
    for key in ("content", "value"):
        for part in turn[key] if isinstance(turn.get(key), list) else ():
            if part["type"] != "tool_call" or not _is_flat(part):
                left += _others(part, {"type", *_SAYS, part["type"]}, f"{where}.{key}[]")
    return left


def _others(said: dict[str, Any], used: Collection[str], where: str) -> list[str]:
    others = {key: value for key, value in said.items() if key not in used and not absent(value)}
    if not others:
        return []
    try:
        return [f"{where}.{key}" for key in Row(others).unused([])]
    except RowError as error:
        reason = re.split("; (put|say) it ", str(error).replace("column '", f"{where} key '", 1))[0]
        say = "say it by train (true, false)" if "how to train" in reason else "put it into the turn's text"
        raise RowError("column", f"{reason}; {say}, or remove it") from None


def _message(turn: Any, number: int) -> Message:
    """One {role, content} or {from, value} turn."""
    if not isinstance(turn, dict):
        raise RowError(
            "wrong_type", f"turn {number} is {type(turn).__name__}; an object with role and content is expected"
        )
    role = _role(turn, number)
    if turn.keys() == _PLAIN and role in ROLES and isinstance(turn["content"], str):  # most turns
        return {"role": role, "content": turn["content"]}
    key = "value" if turn.get("value") is not None else "content"
    value = turn.get(key)
    if turn.get("content") not in (None, "", value):
        raise RowError("clash", f"turn {number} has a value and a content that differ; keep one of them")
    if role in ("call", "thought"):
        message = _half(role, text_of(value, f"{key} of turn {number}"), turn, number)
        role = "assistant"
    else:
        message = {"role": role, **_said(value, key, turn, number)}
    add_reasoning(message, turn, number)
    if role != "assistant" and (message.get("tool_calls") or message.get("reasoning_content")):
        raise RowError(
            "role", f"turn {number} has role {role!r} with tool calls or reasoning; only assistant turns may"
        )
    if role == "tool":
        message |= {key: text_of(turn[key], key) for key in ("tool_call_id", "name") if not absent(turn.get(key))}
    return message | mask_of(turn, role, number)


def _half(role: str, text: str, turn: dict[str, Any], number: int) -> Message:
    """An assistant turn of a call or a thought alone, with the calls that stand beside it."""
    thought: Message = {"role": "assistant", "content": "", "reasoning_content": text}
    message = call_turn(text, number) if role == "call" else thought
    calls = _calls_said(number, message.get("tool_calls", []), turn)
    return {**message, "tool_calls": calls} if calls else message


def _role(turn: dict[str, Any], number: int) -> str:
    speaker, role = turn.get("from"), turn.get("role")
    if speaker is not None:
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            allowed = ", ".join(_SHAREGPT_ROLES)
            raise RowError("role", f"turn {number} is from {speaker!r}; allowed are {allowed}")
        if role is not None and _ROLES.get(str(role)) != _SHAREGPT_ROLES[speaker]:
            raise RowError("clash", f"turn {number} is from {speaker!r} and has role {role!r}; keep one of them")
        return _SHAREGPT_ROLES[speaker]
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError("role", f"turn {number} has role {role!r}; allowed are {', '.join(ROLES)}")
    return _ROLES[role]


def _said(value: Any, key: str, turn: dict[str, Any], number: int) -> Message:
    """Content, reasoning and calls of a turn; content may be a list of typed parts."""
    parts = _parts(value, key, number)
    calls = _calls_said(number, parts["tool_calls"], turn)
    if parts["content"] is None:
        if not calls and absent(parts["reasoning_content"]):
            speaker = turn.get("from") or turn.get("role")
            raise RowError("wrong_type", f"turn {number} ({speaker}) has no content; text is expected")
        parts["content"] = ""
    optional = {"reasoning_content": parts["reasoning_content"], "tool_calls": calls}
    return {"content": parts["content"], **{name: item for name, item in optional.items() if item}}


def _calls_said(number: int, written: list[dict[str, Any]], turn: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a turn: those `written` in its text, or under either key; twice the same is once."""
    keyed = [calls_in(turn.get(key), f"{key} of turn {number}") for key in ("tool_calls", "function_call")]
    places = [calls for calls in (*keyed, written) if calls]
    functions = [[call["function"] for call in calls] for calls in places]
    if any(one != functions[0] for one in functions):
        where = "its text, tool_calls and function_call"
        raise RowError("clash", f"turn {number} makes different calls in {where}; keep them all in one of these places")
    return places[0] if places else []


def _parts(content: Any, key: str, number: int) -> dict[str, Any]:
    """Content as text; a list of {type, text|value} parts is taken apart by type.

    A message holds reasoning, then text, then calls: parts in another order would be trained in this one.
    """
    found: dict[str, Any] = {"reasoning_content": "", "content": None, "tool_calls": []}
    if content is None:
        return found
    if not isinstance(content, list):
        return {**found, "content": text_of(content, f"{key} of turn {number}")}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _PARTS:
            shape = f"part of type {kind!r}" if isinstance(part, dict) else type(part).__name__
            raise RowError(
                "wrong_type", f"content of turn {number} holds a {shape}; allowed are text, reasoning, tool_call"
            )
        field, what = _PARTS[kind]
        value, where = _part_value(part, kind, number), f"{what} of turn {number}"
        said = calls_in(value, where) if kind == "tool_call" else text_of(value, where)
        later = list(found)[list(found).index(field) + 1 :]
        if not absent(said) and any(not absent(found[name]) for name in later):
            raise RowError(
                "role_order",
                f"turn {number} has a {what} behind a later kind of part; the order of a turn is reasoning, text, "
                "calls: make it several turns, or one text",
            )
        found[field] = said if found[field] is None else found[field] + said
    return found


def _is_flat(part: dict[str, Any]) -> bool:
    """Whether the part itself is the call: {type: tool_call, name, args}, as LangChain has it."""
    return all(absent(part.get(name)) for name in (*_SAYS, "tool_call"))


def _part_value(part: dict[str, Any], kind: str, number: int) -> Any:
    """What a part says, under whichever of its names."""
    if kind == "tool_call" and _is_flat(part):
        return {key: value for key, value in part.items() if key not in ("type", kind, *_SAYS)}
    names = list(dict.fromkeys((*_SAYS, kind)))
    given = [part[name] for name in names if part.get(name) is not None]
    said = [value for value in given if not absent(value)] or given
    if any(value != said[0] for value in said):
        raise RowError("clash", f"a part of turn {number} says two things ({', '.join(names)}); keep one")
    return said[0] if said else None


def add_reasoning(message: Message, turn: dict[str, Any], number: int) -> None:
    """The reasoning that stands beside the content, under whichever of its names; twice the same is once."""
    given = [text_of(turn[key], f"{key} of turn {number}") for key in REASONING_KEYS if not absent(turn.get(key))]
    if message.get("reasoning_content"):
        given.append(message["reasoning_content"])
    if len(set(given)) > 1:
        raise RowError("clash", f"turn {number} has several reasonings that differ ({', '.join(REASONING_KEYS)})")
    if given and "</think>" in message["content"]:
        raise RowError("clash", f"turn {number} has reasoning in a field and again as <think> in its content; keep one")
    if given:
        message["reasoning_content"] = given[0]


def mask_of(turn: dict[str, Any], role: str, number: int) -> Message:
    """{train: False} for an assistant turn that one of the usual keys leaves out."""
    said = {switch(turn[key], f"{key} of turn {number}") for key in TURN_MASKS if not absent(turn.get(key))}
    if len(said) > 1:
        raise RowError("clash", f"turn {number} is to be trained by one of its keys and not by another")
    if True in said and role != "assistant":
        raise RowError("mask", f"turn {number} ({role}) is marked to be trained; only assistant turns can be")
    return {"train": False} if False in said and role == "assistant" else {}


def switch(value: Any, where: str) -> bool:
    """Whether a mask, in any of its spellings, says that something is trained."""
    key = value.lower() if isinstance(value, str) else value
    if not isinstance(key, str | int | float) or key not in _SAID:
        raise RowError("mask", f"{where} is {value!r}; a turn is trained (true, 1) or not (false, 0)")
    return _SAID[key]
