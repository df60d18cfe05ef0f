"""Any of the usual chat formats to one: a list of messages with role and content."""

import json
import re
from collections.abc import MutableMapping
from typing import Any

from eaft_verl.data.calls import join_turns, link_results, parsed, tool_list
from eaft_verl.data.columns import MASK_KEYS, PROMPT_KEYS, RESPONSE_KEYS, Row, absent, ignored, several
from eaft_verl.data.spec import Columns, RowError
from eaft_verl.data.turns import TURN_MASKS, add_reasoning, read_turns, switch, text_of

Message = dict[str, Any]
_WANTED = ("label", "kto_tag", "kto_label")  # of answers that people marked good or bad (KTO)
_TURNS = re.compile(
    r"""\s*\[\s*\{[^{}]*?["'](role|from)["']\s*:\s*["'](system|developer|user|human|assistant|gpt|tool)["']"""
)
ACCEPTED = (
    "messages: [{role, content}], conversations: [{from, value}], instruction + output (+ input, system, history), "
    f"or one of {'|'.join(PROMPT_KEYS)} with one of {'|'.join(RESPONSE_KEYS)}"
)


def to_messages(
    row: dict[str, Any], columns: Columns | None = None, unused: MutableMapping[str, int] | None = None
) -> tuple[list[Message], dict[str, Any]]:
    """(messages, extra fields) of a row whose format is recognised by its keys, or told by `columns`.

    A message is {role, content} and, where the row has them, reasoning_content, tool_calls, tool_call_id, name, and
    train: False for an assistant turn that is not to be trained. Extra fields: `id` (str), `answer` (str; from
    `answer` or `reference`, unless that is the response itself), `tools` (list of function descriptions), `weight`
    (float, of the row in the loss) and `chat_template_kwargs` (dict). `unused` counts the columns that were not used.
    Null, "" and empty lists count as absent, because parquet cannot leave a field out.
    Raises RowError (a DataError) saying what was found and which shapes are accepted.
    """
    columns_of = Row(row, columns)
    if (conversation := columns_of.take("messages")) is not None:
        name = next(iter(columns_of.find("messages")), "messages")
        messages, left = read_turns(conversation, name, _lists_of_masks(columns_of))
    else:
        messages, left = _exchange(columns_of)
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    messages = join_turns(_with_system(messages, columns_of.take("system")))
    link_results(messages)
    extra = _extra(columns_of)
    for name in (*columns_of.unused(messages), *left):
        if unused is not None:
            unused[name] = unused.get(name, 0) + 1
    return messages, extra


def _lists_of_masks(row: Row) -> dict[str, list[Any]]:
    """A row's lists of masks, one value for each turn."""
    masks = {
        key: row.filled[key] for key in TURN_MASKS if isinstance(row.filled.get(key), list) and key not in row.used
    }
    row.used.update(masks)
    return masks


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    if absent(system):
        return messages
    text = text_of(system, "system")
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != text.strip():
            raise RowError("clash", "the row has a system column and a system turn that differ; keep one of them")
        return messages
    return [{"role": "system", "content": text}, *messages]


def _extra(row: Row) -> dict[str, Any]:
    """What a row says beside its conversation."""
    extra: dict[str, Any] = {}
    if (identity := row.take("id")) is not None:
        extra["id"] = str(identity)
    if (answer := row.take("answer")) is not None:
        extra["answer"] = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)
    if tools := tool_list(row.take("tools")):
        extra["tools"] = tools
    if (weight := row.take("weight")) is not None:
        extra["weight"] = _weight(weight)
    _require_wanted(row)
    if (given := row.take("chat_template_kwargs")) is not None:
        kwargs = parsed(given, "chat_template_kwargs")
        if not isinstance(kwargs, dict):
            raise RowError("wrong_type", f"chat_template_kwargs is {type(kwargs).__name__}; an object is expected")
        extra["chat_template_kwargs"] = {key: value for key, value in kwargs.items() if value is not None}
    return extra


def _require_wanted(row: Row) -> None:
    """RowError for a row that one of its columns leaves out of training."""
    for key in MASK_KEYS:
        if (mask := row.take(key)) is not None and not switch(mask, f"{key} of the row"):
            raise RowError("masked", f"the row is not to be trained: {key} is {mask!r}")
    for key in _WANTED:
        wanted = row.filled.get(key)
        if key not in row.used and wanted is not None and (key != "label" or str(wanted).lower() in ("true", "false")):
            row.used.add(key)
            if not switch(wanted, key):
                said = f"{key} is {wanted}: an answer that is not wanted; where it means something else, {ignored(key)}"
                raise RowError("masked", said)


def _weight(value: Any) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise RowError("mask", f"weight of the row is {value!r}; a number of at least 0 is expected")
    if weight == 0:
        raise RowError("masked", "the row is not to be trained: weight is 0")
    return weight


def _exchange(row: Row) -> tuple[list[Message], list[str]]:
    """Prompt and response in columns of their own, with what goes before and into the prompt."""
    asks, answers, contexts = _exchange_columns(row)
    prompt, response = row.value(asks), row.value(answers)
    if _is_text_of_turns(prompt):
        prompt = parsed(prompt, asks)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        return _conversational(prompt, response, asks, answers)
    row.takes_context = True
    pieces = [text_of(prompt, asks), *(text_of(row.value(name), name) for name in contexts)]
    answer: Message = {"role": "assistant", "content": text_of(response, answers)}
    if not absent(reasoning := row.take("reasoning")):
        add_reasoning(answer, {"reasoning": reasoning}, 2)
    asked = {"role": "user", "content": "\n".join(piece for piece in pieces if piece)}
    before, left = _history(row.take("history"))
    return [*before, asked, answer], left


def _is_text_of_turns(value: Any) -> bool:
    """Whether it is the text of a list of turns, as tables without lists keep one, and nothing else."""
    return isinstance(value, str) and bool(_TURNS.match(value)) and value.rstrip().endswith("]")


def _exchange_columns(row: Row) -> tuple[str, str, list[str]]:
    """Names of the prompt's column, the response's, and of those that go into the prompt."""
    prompts, responses, contexts = (row.find(role) for role in ("prompt", "response", "context"))
    answers = [name for name in responses if name.lower() == "answer"]
    if len(responses) == 2 and len(answers) == 1:
        # A worked solution next to its final answer: the solution is what a model should write.
        responses.remove(answers[0])
    if not prompts and contexts:
        prompts, contexts = contexts[:1], contexts[1:]
    if not prompts or not responses:
        found = ", ".join(sorted(row.filled | row.empty)) or "none"
        raise RowError("format", f"found the fields {found}; accepted are {ACCEPTED}")
    for role, names in (("prompt", prompts), ("response", responses)):
        if len(names) > 1:
            raise several(role, names)
    return prompts[0], responses[0], contexts


def _conversational(prompt: Any, response: Any, prompt_key: str, key: str) -> tuple[list[Message], list[str]]:
    """Messages as prompt, and as completion, which alone is trained."""
    asked, left = read_turns(prompt, prompt_key)
    asked = [message | ({"train": False} if message["role"] == "assistant" else {}) for message in asked]
    told = isinstance(response, str) and not _is_text_of_turns(response)
    turns = [{"role": "assistant", "content": response}] if told else response
    answered, more = read_turns(turns, key)
    return asked + answered, left + more


def _history(given: Any) -> tuple[list[Message], list[str]]:
    """Earlier exchanges as [[user, assistant]] or as messages, and the keys of these that were not used."""
    history = parsed(given, "history") if isinstance(given, str) else given or []
    if not isinstance(history, list):
        raise RowError("wrong_type", f"history is {type(history).__name__}; a list of [user, assistant] is expected")
    if history and all(isinstance(turn, dict) for turn in history):
        return read_turns(history, "history")
    messages: list[Message] = []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("wrong_type", f"history entry {number} must be [user, assistant]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": text_of(text, f"history entry {number}")})
    return messages, []
