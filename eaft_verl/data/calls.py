"""Tools and tool calls as chat templates take them, however a row writes them; and which result answers which call."""

import json
import re
from typing import Any

from eaft_verl.data.spec import RowError, unrepeated, why_no_json

Message = dict[str, Any]
_ARGUMENTS = ("arguments", "parameters", "args", "input")  # OpenAI, Llama, LangChain, Anthropic
_SCHEMAS = ("parameters", "input_schema", "inputSchema")  # of a tool's arguments: OpenAI, Anthropic, MCP
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def parsed(value: Any, where: str) -> Any:
    """JSON text as what it says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=unrepeated)
    except (ValueError, RecursionError) as error:
        raise RowError("wrong_type", f"{where} is not valid JSON ({why_no_json(error)})") from None


def _listed(value: Any) -> Any:
    """What `tools` holds, its JSON read; nothing, blank text and "null" are an empty list."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    given = parsed(value, "tools")
    return [] if given is None else given


def tool_list(value: Any) -> list[dict[str, Any]]:
    """Descriptions as [{type, function: {name, ...}}], from a list of objects or of their JSON texts, or its JSON."""
    given = _listed(value)
    if not isinstance(given, list):
        raise RowError("wrong_type", "tools must be a list of function descriptions, each with a name")
    tools = []
    for number, item in enumerate(given, 1):
        tool = without_nulls(parsed(item, f"tool {number}")) if item else None
        if tool is None:
            continue
        if not isinstance(tool, dict):
            raise RowError(
                "wrong_type", f"tools must be a list of function descriptions; tool {number} is {tool!r:.60}"
            )
        function = tool.get("function", {key: value for key, value in tool.items() if key != "type"})
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise RowError("wrong_type", f"tools must be a list of function descriptions; tool {number} has no name")
        function = _with_parameters(function)
        tools.append(
            {**tool, "type": "function", "function": function}
            if "function" in tool
            else {"type": "function", "function": function}
        )
    return tools


def _with_parameters(function: dict[str, Any]) -> dict[str, Any]:
    """A description whose schema goes by the name that chat templates read; Anthropic and MCP have others."""
    named = [name for name in _SCHEMAS if name in function]
    if len(named) > 1:
        raise RowError("clash", f"tool {function['name']!r} has {' and '.join(named)}; keep one of them")
    return {"parameters" if key in _SCHEMAS else key: item for key, item in function.items()}


def without_nulls(value: Any) -> Any:
    """The value without keys that hold null: Arrow gives every object of a column the keys of all the others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call as {type, function: {name, arguments: dict}}, and its id where it has one."""
    call = parsed(call, where)
    function = _function_of(call, where) if isinstance(call, dict) else {}
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError("wrong_type", f"{where} has no function name: {str(call)[:60]!r}")
    given = _arguments(function, where)
    # Null in an object is Arrow's padding; null in JSON text is what somebody wrote.
    arguments = (
        (parsed(given, f"arguments of {where}") if given.strip() else {})
        if isinstance(given, str)
        else (without_nulls({} if given is None else given))
    )
    if isinstance(arguments, str):  # JSON text within JSON text
        arguments = parsed(arguments, f"arguments of {where}")
    if not isinstance(arguments, dict):
        raise RowError("wrong_type", f"arguments of {where} are {type(arguments).__name__}; an object is expected")
    named = {"id": function["id"]} if isinstance(function.get("id"), str) and function["id"] else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _function_of(call: dict[str, Any], where: str) -> dict[str, Any]:
    """Name, arguments and id of a call, which may stand in its `function` or beside it; RowError if they differ."""
    inner = call.get("function")
    if not isinstance(inner, dict):
        return call
    outer = {key: item for key, item in call.items() if key != "function" and item is not None}
    for key, item in inner.items():
        if key != "type" and item is not None and outer.get(key, item) != item:
            raise RowError("clash", f"{where} has a {key} in its function and another beside it; keep one of them")
    return outer | {key: item for key, item in inner.items() if item is not None}


def _arguments(function: dict[str, Any], where: str) -> Any:
    """What stands under one of the usual names; RowError for two of them, and for a key that would be left out."""
    named = [name for name in _ARGUMENTS if function.get(name) is not None]
    if len(named) > 1:
        raise RowError("clash", f"{where} has {' and '.join(named)}; keep one of them")
    known = {"function", "name", "type", "id", "index", *_ARGUMENTS}
    for key, item in function.items():
        if key not in known and item not in (None, "", [], {}):
            raise RowError("column", f"{where} holds {key!r}, which would be left out of training; remove it")
    return function[named[0]] if named else None


def calls_in(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of calls, or one, or the JSON of either."""
    if value is None or value in ("", []):
        return []
    given = parsed(value, where)
    if not isinstance(given, list | dict):
        raise RowError("wrong_type", f"{where} is {type(given).__name__}; a list is expected")
    return [tool_call(call, where) for call in (given if isinstance(given, list) else [given])]


def call_turn(text: str, number: int) -> Message:
    """An assistant turn of calls written as text, with the thinking that may stand before them."""
    thought = _THOUGHT.match(text)
    rest = text[thought.end() :] if thought else text
    calls = calls_in(rest.strip(), f"function_call of turn {number}")
    return {"role": "assistant", "content": thought[0].strip() if thought else "", "tool_calls": calls}


def join_turns(messages: list[Message]) -> list[Message]:
    """Assistant turns in a row that are one turn: thinking or text and then a call, or calls one after the other."""
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        if before and before["role"] == message["role"] == "assistant" and _continues(before, message):
            if before.get("train") != message.get("train"):
                raise RowError("clash", "text and the call after it are one turn; only one of them is to be trained")
            calls = [*before.get("tool_calls", []), *message.get("tool_calls", [])]
            joined[-1] = {**message, **{key: value for key, value in before.items() if value}}
            joined[-1] |= {"tool_calls": calls} if calls else {}
            if joined[-1].get("reasoning_content") and "</think>" in joined[-1]["content"]:
                raise RowError("clash", "a turn of reasoning stands before one with <think> in its content; keep one")
        else:
            joined.append(message)
    return joined


def _continues(before: Message, after: Message) -> bool:
    if not before["content"].strip() and not before.get("tool_calls"):  # thinking alone
        return bool(before.get("reasoning_content")) and not after.get("reasoning_content")
    says = after["content"].strip() or after.get("reasoning_content")
    return bool(after.get("tool_calls")) and not says


def link_results(messages: list[Message]) -> list[Message]:
    """Each tool result with the id and name of the call it answers; RowError if it answers none."""
    if all(message["role"] != "tool" for message in messages):
        return messages
    linked: list[Message] = []
    calls: list[dict[str, Any]] = []
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            calls = list(message.get("tool_calls", []))
        elif message["role"] == "tool":
            previous = messages[number - 2]["role"] if number > 1 else None
            if calls or previous == "tool":
                message = _answer(message, calls, number)
        linked.append(message)
    return linked


def _answer(message: Message, calls: list[dict[str, Any]], number: int) -> Message:
    """The result with what its call says; the call is taken off the list."""
    call = _call_of(message, calls)
    name, called = message.get("name"), call and call["function"]["name"]
    if call is None and (identity := message.get("tool_call_id")):
        raise RowError("tool_result", f"turn {number} answers call {identity!r}, which is not open before it")
    if call is None:
        return message
    if name and name != called:
        raise RowError("tool_result", f"turn {number} is a result of {name!r}, but the call before it is of {called!r}")
    calls.remove(call)
    return {**message, "name": called, **({"tool_call_id": call["id"]} if "id" in call else {})}


def _call_of(message: Message, calls: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The open call of the result's id, of its name, or the first; None where ids say that it is none of them."""
    identity = message.get("tool_call_id")
    known = [call for call in calls if identity and call.get("id") == identity]
    if identity and not known and any("id" in call for call in calls):
        return None
    named = [call for call in calls if call["function"]["name"] == message.get("name")]
    return next(iter(known or named or calls), None)
