"""Messages as a chat template expects them, where it has names of its own for reasoning, tool calls and results."""

import json
from typing import Any

from eaft_verl.data.spec import RowError

Message = dict[str, Any]


def spoken(template: str, messages: list[Message], text_arguments: bool = False) -> list[Message]:
    """The messages in the words of the chat template; unchanged where there is nothing to say otherwise.

    Reasoning goes by the name that the template reads (gpt-oss: `thinking`). text_arguments: arguments of calls are
    JSON text. Masks are for the trainer.

    GLM-4-0414's template knows neither `tool_calls` nor the role `tool` and leaves both out without a word. It takes a
    call as an assistant turn with the function's name as `metadata` and the arguments as content, and a result as the
    role `observation` (README of THUDM/GLM-4). Content before a call is an assistant turn of its own: the model writes
    the role token between the two itself.

    Raises RowError for two calls in one turn, for which that format has no place.
    """
    if any(not message.keys().isdisjoint(("train", "reasoning_content")) for message in messages):
        messages = [_renamed(template, message) for message in messages]
    if "observation" in template and "metadata" in template and "tool_calls" not in template:
        return [turn for number, message in enumerate(messages, 1) for turn in _glm(message, number)]
    return [_with_text(message) for message in messages] if text_arguments else messages


def _renamed(template: str, message: Message) -> Message:
    """Without the mask, and with reasoning under the field that the template reads, if it reads one."""
    names = ("reasoning_content", "thinking", "reasoning")
    read = next((name for name in names if f".{name}" in template or f"'{name}'" in template), names[0])
    return {read if key == names[0] else key: value for key, value in message.items() if key != "train"}


def _with_text(message: Message) -> Message:
    if not (calls := message.get("tool_calls")):
        return message
    return {**message, "tool_calls": [{**call, "function": _text_function(call["function"])} for call in calls]}


def _text_function(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _glm(message: Message, number: int) -> list[Message]:
    if message["role"] == "tool":
        return [{**message, "role": "observation"}]
    if not (calls := message.get("tool_calls")):
        return [message]
    if len(calls) > 1:
        raise RowError(
            "template_drops",
            f"turn {number} (assistant) makes {len(calls)} calls at once; this model's format has place for one a turn",
        )
    function = calls[0]["function"]
    content = json.dumps(function["arguments"], ensure_ascii=False)
    before = [{"role": "assistant", "content": message["content"]}] if message["content"].strip() else []
    return [*before, {"role": "assistant", "metadata": function["name"], "content": content}]
