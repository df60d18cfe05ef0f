"""Messages to token ids and a loss mask: assistant content and its end-of-turn token are trained, nothing else.

Everything is decided on text that the chat template itself rendered, for one assistant turn i:

    prompt   = render(messages[:i], generation prompt)          what the model is given
    probe    = render(messages[:i] + [assistant "PROBE"])       = prompt + inserted + PROBE + tail
    rendered = render(messages[:i + 1])                         = prompt + inserted + content + tail

so `inserted` (an empty think block, a channel) and `tail` are known exactly, whatever the content looks like.
The end-of-turn token is the first special token of `tail` (both, where two stand side by side as in Command A).

A template that rewrites a turn once it is no longer the last one (Qwen3 drops its reasoning) has no single encoding in
which every turn stands as it was generated: such a conversation is refused with turns="whole" and becomes one example
per turn with turns="split".

Some templates (GLM-4) end an assistant turn with nothing: the next turn's role token (`<|user|>`, `<|observation|>`)
is what the model writes to stop. It is trained as the end of the turn, and put after the last turn, where the template
does not write it. Where no such token follows, nothing is trained after the content and `Encoded.open_turns` counts it.
What stands between the generation prompt and the content is the model's to write (GLM-4: a line break before an answer,
none before a tool call; gpt-oss: the channel), so it is trained. An empty think block is not: the prompt gives it where
thinking is switched off.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from eaft_verl.data.offsets import Tokens, tokenize
from eaft_verl.data.rendered import check_context, mismatch
from eaft_verl.data.spans import Span, loss_mask
from eaft_verl.data.spec import RowError
from eaft_verl.data.template import ChatTemplate, check_tokenizer, render, special_tokens, template_for

Message = dict[str, Any]
__all__ = ["Encoded", "check_tokenizer", "encode", "render", "special_tokens"]
_PROBE, _NEXT = "PROBE", "NEXTPROBE"
_THINK = "<think>"
_PLAIN = {"role", "content", "train"}
# What the template put before and after the content of the last plain turn, and how much of the latter is trained.
_AROUND: WeakKeyDictionary[Any, tuple[str, str, int]] = WeakKeyDictionary()
_EMPTY_THOUGHT = re.compile(r"\s*(<(\w+)>\s*)?</\w*think\w*>\s*")
_NO_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_SPLIT = "set data.turns=split: one example per assistant turn, each in exactly the context it is generated in"


@dataclass(frozen=True)
class Encoded:
    """One training example: input_ids [T] and loss_mask [T] (1 = trained; the first is always 0: nothing predicts it).

    turn: index of the last message in it. trained: indices of the trained ones. truncated: tokens were cut off.
    open_turns: trained turns without an end-of-turn token. ends: the tokens that end the others.
    """

    input_ids: Sequence[int]
    loss_mask: Sequence[int]
    turn: int = 0
    truncated: bool = False
    open_turns: int = 0
    trained: tuple[int, ...] = ()
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """A training example as text, before the tokenizer has seen it; trained, ends, open_turns: as in Encoded."""

    text: str
    spans: list[Span]
    trained: tuple[int, ...]
    ends: tuple[str, ...]
    open_turns: int


def encode(
    tokenizer: Any,
    messages: list[Message],
    max_length: int,
    over_long: str = "error",
    turns: str = "whole",
    tools: list[dict[str, Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[Encoded]:
    """Training examples of a conversation: one with turns="whole" or "last", one per assistant turn with "split".

    A message with `train: False` is context. kwargs: further arguments of the chat template.
    over_long: "truncate" keeps the first max_length tokens; "error" and "drop" raise RowError, the caller decides.
    With "drop" and turns="split" only the turns that are too long are left out; RowError if none is left.
    Raises RowError (a DataError) naming the turn and the reason: the template changes or drops part of a turn, refuses
    the conversation, or no trained token is left. Raises ConfigError for a tokenizer without template or offsets.
    """
    written = write(tokenizer, messages, turns, tools, kwargs)
    tokens = list(tokenize(tokenizer, (one.text for one in written)))
    found = finish(written, tokens, max_length, over_long, turns)
    return [replace(one, input_ids=list(one.input_ids), loss_mask=list(one.loss_mask)) for one in found]


def write(
    tokenizer: Any,
    messages: list[Message],
    turns: str = "whole",
    tools: list[dict[str, Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[Written]:
    """The first half of `encode`: what the chat template makes of the conversation, and where it is trained."""
    check_tokenizer(tokenizer)
    groups = _groups(messages, turns)
    template = template_for(tokenizer, messages, tools, kwargs)
    return [_write(template, messages, group) for group in groups]


def finish(
    written: Sequence[Written], tokens: Sequence[Tokens], max_length: int, over_long: str, turns: str
) -> list[Encoded]:
    """The second half of `encode`: `tokens` of the texts that `write` made, as offsets.tokenize has them."""
    examples, lost = [], None
    for one, found in zip(written, tokens, strict=True):
        try:
            examples.append(_finish(one, found, max_length, over_long))
        except RowError as error:
            if not (error.kind == "over_long" and over_long == "drop" and turns == "split"):
                raise
            lost = error
    if lost and not examples:
        raise lost
    return examples


def _groups(messages: list[Message], turns: str) -> list[list[int]]:
    """Indices of the assistant turns that are trained, by example."""
    assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not assistants:
        raise RowError("missing_assistant", "no assistant turn, so nothing to train on")
    if assistants[0] == 0:
        raise RowError("role_order", "turn 1 is an assistant turn; it answers nothing, so a user turn must come first")
    if turns == "last":
        assistants = assistants[-1:]
    trained = [index for index in assistants if messages[index].get("train", True)]
    if not trained:
        raise RowError("masked", "no assistant turn is to be trained: all of them are masked")
    return [[index] for index in trained] if turns == "split" else [trained]


def _write(template: ChatTemplate, messages: list[Message], trained: list[int]) -> Written:
    last = trained[-1]
    whole = template.render(messages[: last + 1])
    spans = [_locate(template, messages, index, whole, last) for index in trained]
    template.require_tools()
    check_context(messages[: last + 1], template.tools, whole)
    if spans[-1].body == spans[-1].end:
        whole += _next_opening(template, messages[: last + 1], whole)
    spans = [_closed(span, whole, template.specials) for span in spans]
    ends = [_last_special(whole[span.body : span.end], template.specials) for span in spans if span.body < span.end]
    return Written(whole, spans, tuple(trained), tuple(dict.fromkeys(ends)), len(spans) - len(ends))


def _finish(one: Written, tokens: Tokens, max_length: int, over_long: str) -> Encoded:
    ids, mask, last = tokens.ids, loss_mask(one.text, tokens.offsets, one.spans), one.trained[-1]
    too_long = len(ids) > max_length
    if too_long and over_long != "truncate":
        raise RowError("over_long", f"{len(ids)} tokens, data.max_length is {max_length}")
    if too_long:
        ids, mask = ids[:max_length], mask[:max_length]
    if 1 not in mask:
        cut = f" after truncation to {max_length} tokens" if too_long else ""
        raise RowError("no_trained_token", f"no trained token{cut} (turn {last + 1})")
    return Encoded(ids, mask, last, too_long, one.open_turns, one.trained, one.ends)


@functools.lru_cache(64)
def _last_special(closing: str, specials: tuple[str, ...]) -> str:
    """The token that ends a turn: the last one where two stand side by side."""
    return next((token for token in specials if closing.rstrip().endswith(token.rstrip())), closing.strip())


def _next_opening(template: ChatTemplate, messages: list[Message], whole: str) -> str:
    """The special token with which the template opens what comes after the last turn; '' if there is none.

    The turn may be written differently once another follows (GLM-4.5 leaves its reasoning out), so what follows is
    looked for behind the longest end of `whole` that stays.
    """
    role = "tool" if messages[-1].get("tool_calls") else "user"
    try:
        longer = template.render([*messages, {"role": role, "content": _NEXT}])
    except RowError:  # a template without tool turns
        return ""
    before = longer.rpartition(_NEXT)[0]
    size = next((size for size in (len(whole), 64, 32, 16, 8, 4, 2, 1) if whole[-size:] in before), 0)
    following = before[before.rindex(whole[-size:]) + size :] if size else ""
    return next((token for token in template.specials if following.startswith(token)), "")


def _closed(span: Span, whole: str, specials: tuple[str, ...]) -> Span:
    """The span with the next turn's first token as its end, if its own turn has none."""
    if span.body < span.end:
        return span
    closing = next((token for token in specials if whole.startswith(token, span.body)), "")
    return replace(span, end=span.body + len(closing))


def _locate(template: ChatTemplate, messages: list[Message], index: int, whole: str, last: int) -> Span:
    """Where turn `index` is trained within `whole`, the rendering of all turns up to `last`."""
    message, turn = messages[index], f"turn {index + 1} (assistant)"
    prompt = template.render(messages[:index], generate=True)
    rendered = whole if index == last else template.render(messages[: index + 1])
    if known := _as_before(template, message, prompt, rendered):
        _check_kept(whole, rendered[: known.end], turn)
        return known
    kept = {key: value for key, value in message.items() if key in ("role", "reasoning_content")}
    probe = template.render([*messages[:index], {**kept, "content": _PROBE}])
    if not (probe.startswith(prompt) and rendered.startswith(prompt)):
        raise RowError(
            "template",
            f"{turn}: the chat template's generation prompt is not how it opens this turn, so the model would be "
            "trained in a context it never generates in; use a training variant of the template",
        )
    inserted, found, tail = probe[len(prompt) :].rpartition(_PROBE)
    if not found:
        raise RowError("template_drops", f"{turn}: the chat template does not write out assistant content")
    body, end = _end_of_turn(rendered, tail, template.specials)
    start, reason = _start(message, rendered[:body], len(prompt), inserted)
    if reason:
        raise RowError("template_drops", f"{turn}: {reason}")
    _check_kept(whole, rendered[:end], turn)
    if message.keys() <= _PLAIN:
        _AROUND[template.tokenizer] = (inserted, tail, _end_of_turn(tail, tail, template.specials)[1])
    return Span(len(prompt), start, body, end)


def _as_before(template: ChatTemplate, message: Message, prompt: str, rendered: str) -> Span | None:
    """Where a plain turn is trained, if exactly what stood around the last one stands around it: no probe is needed."""
    inserted, tail, closing = _AROUND.get(template.tokenizer, ("", None, 0))
    content = message["content"]
    if tail is None or not message.keys() <= _PLAIN or _THINK in content or (inserted and content.startswith(inserted)):
        return None
    if rendered != f"{prompt}{inserted}{content}{tail}":
        return None
    body = len(rendered) - len(tail)
    start = len(prompt) + (len(inserted) if _EMPTY_THOUGHT.fullmatch(inserted) else 0)
    return Span(len(prompt), start, body, body + closing)


def _check_kept(whole: str, beginning: str, turn: str) -> None:
    """RowError if the turn does not stand in the whole conversation as it is written where it is the last one."""
    if not whole.startswith(beginning):
        raise RowError(
            "template",
            f"{turn}: the chat template writes it differently once it is not the last turn (reasoning left out, or "
            f"another end of turn), so the whole conversation is not what the model generates; {_SPLIT}",
        )


def _start(message: Message, written: str, prompt: int, inserted: str) -> tuple[int, str]:
    """(where the trained part of the turn begins, ''), or what of the turn is not there.

    A channel or header that the template puts before the content is trained, an empty think block is not.
    """
    opened = written[:prompt].rstrip().endswith(_THINK)
    said = message["content"]
    said = said.lstrip().removeprefix(_THINK) if opened else said
    if _NO_THOUGHT.search(written[max(0, prompt - 40) : prompt]):  # switched off, as the content may say once more
        said = said[block.end() :] if (block := _NO_THOUGHT.match(said)) else said
    header = len(inserted) if inserted.strip() and written.startswith(inserted, prompt) else 0
    starts = [prompt + header, prompt] if header and not message.get("reasoning_content") else [prompt]
    reasons = [mismatch(message, written[start:], said) for start in starts]
    if all(reasons):
        return prompt, reasons[0]
    found = starts[reasons.index("")]
    return found if _EMPTY_THOUGHT.fullmatch(inserted) else prompt, ""


def _end_of_turn(rendered: str, tail: str, specials: tuple[str, ...]) -> tuple[int, int]:
    """(end of the body, end of its end-of-turn token) in a rendering that the template closes with `tail`."""
    stripped, closing = tail.lstrip(), ""
    while token := next((token for token in specials if stripped.startswith(closing + token)), ""):
        closing += token
    if rendered.endswith(tail):
        body = len(rendered) - len(tail)
        return body, body + (len(tail) - len(stripped) + len(closing) if closing else 0)
    # Tool calls may be closed by a token of their own (Llama's <|eom_id|>, gpt-oss's <|call|>).
    end = len(rendered.rstrip())
    closing = next((token for token in specials if rendered.endswith(token, 0, end)), "")
    return end - len(closing), end
