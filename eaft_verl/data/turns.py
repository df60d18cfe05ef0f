"""One turn of a conversation, as {role, content} or {from, value}, to a message, and what of it means nothing."""

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
_SAID = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # True is 1


def text_of(value: Any, where: str) -> str:
    """The value, if it is text."""
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{where} is {type(value).__name__} ({str(value)[:40]!r}); write it as text")
    return value


def read_turns(given: Any, name: str) -> tuple[list[Message], list[str]]:
    """Messages of a list of turns, or of its JSON, and the keys of turns that were not used."""
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
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    left = {
        f"{name}[].{key}": None for turn, made in zip(turns, messages, strict=True) for key in _left(turn, made, name)
    }
    return messages, list(left)


def _left(turn: dict[str, Any], made: Message, name: str) -> list[str]:
    """Keys of a turn that are not used: metadata all of them, or RowError."""
    if turn.keys() == _PLAIN:
        return []
    used = _TURN_KEYS | made.keys()
    others = {key: value for key, value in turn.items() if key not in used and not absent(value)}
    if not others:
        return []
    try:
        return Row(others).unused([])
    except RowError as error:
        said = str(error).replace("column '", f"{name}[] key '", 1).split("; put it")[0]
        raise RowError("column", f"{said}; put it into the turn's text, or remove it") from None


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
        text = text_of(value, f"{key} of turn {number}")
        thought = {"role": "assistant", "content": "", "reasoning_content": text}
        message = call_turn(text, number) if role == "call" else thought
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
    calls = [*parts["tool_calls"], *calls_in(turn.get("tool_calls"), f"tool_calls of turn {number}")]
    calls += calls_in(turn.get("function_call"), f"function_call of turn {number}")
    if parts["content"] is None:
        if not calls and absent(parts["reasoning_content"]):
            speaker = turn.get("from") or turn.get("role")
            raise RowError("wrong_type", f"turn {number} ({speaker}) has no content; text is expected")
        parts["content"] = ""
    optional = {"reasoning_content": parts["reasoning_content"], "tool_calls": calls}
    return {"content": parts["content"], **{name: item for name, item in optional.items() if item}}


def _parts(content: Any, key: str, number: int) -> dict[str, Any]:
    """Content as text; a list of {type, text|value} parts is taken apart by type."""
    found: dict[str, Any] = {"content": None, "reasoning_content": "", "tool_calls": []}
    if content is None:
        return found
    if not isinstance(content, list):
        return {**found, "content": text_of(content, f"{key} of turn {number}")}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        value = (
            next((part[name] for name in ("text", "value", kind) if part.get(name) is not None), None) if kind else None
        )
        if kind == "text":
            found["content"] = (found["content"] or "") + text_of(value, f"text part of turn {number}")
        elif kind in ("reasoning", "thinking"):
            found["reasoning_content"] += text_of(value, f"reasoning part of turn {number}")
        elif kind == "tool_call":
            found["tool_calls"] += calls_in(value, f"tool call of turn {number}")
        else:
            shape = f"part of type {kind!r}" if isinstance(part, dict) else type(part).__name__
            raise RowError(
                "wrong_type", f"content of turn {number} holds a {shape}; allowed are text, reasoning, tool_call"
            )
    return found


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
