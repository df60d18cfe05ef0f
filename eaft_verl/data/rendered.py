"""Whether a rendered conversation holds what the row says: every turn's text, every call, argument and result.

A template may leave out what it does not know. White space is not compared, nor the way JSON is spaced or escaped.
"""

import json
import re
from typing import Any

from eaft_verl.data.spec import RowError

Message = dict[str, Any]
_MISSING = -1
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)


def squeeze(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def check_context(messages: list[Message], tools: list[dict[str, Any]] | None, whole: str) -> None:
    """RowError if the rendering lacks something that the model is to answer, or has it in another order.

    What an earlier assistant turn thought may be left out: templates of reasoning models do that.
    """
    if not tools and _stand_in_order(messages, whole):
        return
    squeezed = squeeze(whole)
    if missing := _missing_tool(tools or [], squeezed):
        raise RowError(
            "template_drops",
            f"the chat template does not write out the tools ({missing} is missing); use a model with tool support",
        )
    place = 0
    for number, message in enumerate(messages, 1):
        start = 0 if message["role"] == "system" else place
        end, what = _end_of(message, squeezed, start)
        if end == _MISSING:
            raise RowError(
                "template_drops",
                f"turn {number} ({message['role']}): the chat template drops or changes {what}, so the model would be "
                "trained to answer what it does not see; use a template that writes this role",
            )
        place = place if message["role"] == "system" else end


def _stand_in_order(messages: list[Message], whole: str) -> bool:
    """Whether all texts stand there one after the other, letter by letter, and there is nothing else to look for."""
    place = 0
    for message in messages:
        found = whole.find(message["content"], place)
        if found == _MISSING or "tool_calls" in message:
            return False
        place = found + len(message["content"])
    return True


def mismatch(message: Message, body: str, said: str) -> str:
    """Which part of an assistant turn the text about to be trained lacks or adds to; '' if it is what the turn says.

    said: the content that is to be found, which may continue what the generation prompt has opened.
    """
    squeezed = squeeze(body)
    reasoning, calls = message.get("reasoning_content", ""), message.get("tool_calls", [])
    for field, text in (("content", said), ("reasoning_content", reasoning)):
        if squeeze(text) not in squeezed:
            return _dropped(field)
    if calls and _end_of_calls(calls, squeezed, 0) == _MISSING:
        return _dropped("tool_calls")
    if not (reasoning or calls) and squeezed != squeeze(said):
        return "the chat template adds text to the content that is not in the data; use another template"
    return ""


def holds_calls(messages: list[Message], whole: str) -> bool:
    """Whether every call stands in the rendering, in order, with all of its arguments."""
    squeezed, place = squeeze(whole), 0
    for message in messages:
        if place != _MISSING and message.get("tool_calls"):
            place = _end_of_calls(message["tool_calls"], squeezed, place)
    return place != _MISSING


def _dropped(field: str) -> str:
    left_out = ", or leave its column out by 'data.columns={ignore: [NAME]}' (--column ignore=NAME)"
    return (
        f"the chat template drops or changes its {field}; use a template that writes it, or put it into the content as "
        f"it should be generated{left_out * (field == 'reasoning_content')}"
    )


def _end_of(message: Message, squeezed: str, start: int) -> tuple[int, str]:
    """(where the turn's text and calls end, '') at or after `start`, or (_MISSING, what is missing)."""
    end = _find_text(message["content"], squeezed, start)
    if end == _MISSING and message["role"] == "assistant":
        end = _find_text(_THOUGHT.sub("", message["content"]), squeezed, start)
    if end == _MISSING:
        return _MISSING, "it"
    if calls := message.get("tool_calls"):
        called = _end_of_calls(calls, squeezed, start)
        return (_MISSING, "its tool calls") if called == _MISSING else (max(end, called), "")
    return end, ""


def _find_text(text: str, squeezed: str, start: int) -> int:
    """Where the text ends, plain or escaped as in JSON."""
    plain = squeeze(text)
    if (place := squeezed.find(plain, start)) != _MISSING:
        return place + len(plain)
    for form in _escaped(text):
        if (place := squeezed.find(form, start)) != _MISSING:
            return place + len(form)
    return _MISSING


def _escaped(text: str) -> list[str]:
    return [squeeze(json.dumps(text, ensure_ascii=ascii_only)[1:-1]) for ascii_only in (False, True)]


def _end_of_calls(calls: list[dict[str, Any]], squeezed: str, start: int) -> int:
    """Where the last of the calls ends if all of them stand there in order, each after the one before."""
    place = start
    for call in calls:
        function = call["function"]
        name = squeeze(function["name"])
        named = squeezed.find(name, place)
        while named != _MISSING and (end := _end_of_arguments(function["arguments"], squeezed, named + len(name))) == (
            _MISSING
        ):
            named = squeezed.find(name, named + 1)
        if named == _MISSING:
            return _MISSING
        place = end
    return place


def _end_of_arguments(arguments: dict[str, Any], squeezed: str, start: int) -> int:
    """Where they end: the JSON object, or all keys and values in any order, which is how templates without JSON write.

    Python's own spelling of an object is neither: a template that prints it was given an object and wanted text.
    """
    if not arguments:
        return start
    for ascii_only in (False, True):
        exact = squeeze(json.dumps(arguments, ensure_ascii=ascii_only))
        if (place := squeezed.find(exact, start)) != _MISSING:
            return place + len(exact)
    if squeezed.find(squeeze(repr(arguments)), start) != _MISSING:
        return _MISSING
    ends = [start]
    for leaf in _leaves(arguments):
        forms = (leaf, *_escaped(leaf)) if isinstance(leaf, str) else (json.dumps(leaf), str(leaf))
        found = [place + len(squeeze(form)) for form in forms if (place := squeezed.find(squeeze(form), start)) >= 0]
        if not found:
            return _MISSING
        ends.append(min(found))
    return max(ends)


def _leaves(value: Any) -> list[Any]:
    """Keys and values of nested objects and lists."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (str(key), *_leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _missing_tool(tools: list[dict[str, Any]], squeezed: str) -> str:
    """Name of a tool, or of a parameter of one, that is not written out."""
    for tool in tools:
        function = tool["function"]
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        for name in (function["name"], *(properties if isinstance(properties, dict) else ())):
            if squeeze(str(name)) not in squeezed:
                return f"{name!r} of {function['name']!r}" if name != function["name"] else repr(name)
    return ""
