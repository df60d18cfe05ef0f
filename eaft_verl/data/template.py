"""A tokenizer's chat template, called with everything that a row says of it."""

import datetime
import functools
import json
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eaft_verl.data.calls import link_results
from eaft_verl.data.columns import ignored
from eaft_verl.data.dialects import spoken
from eaft_verl.data.rendered import holds_calls
from eaft_verl.data.spec import RowError
from eaft_verl.errors import ConfigError

Message = dict[str, Any]
# Templates that print today's date would make every preparation differ: they get Llama 3.1's own default instead.
TODAY = datetime.datetime(2024, 7, 26)
# What `apply_chat_template` is called with here; a row or recipe cannot say it.
_OURS = frozenset(
    (
        *(
            "conversation",
            "messages",
            "tools",
            "tokenize",
            "add_generation_prompt",
            "continue_final_message",
            "padding",
        ),
        *(
            "truncation",
            "max_length",
            "return_tensors",
            "return_dict",
            "tokenizer_kwargs",
            "chat_template",
            "documents",
        ),
        *("return_assistant_tokens_mask", "strftime_now", "raise_exception"),
    )
)
_SPECIALS: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()
_READS_TOOLS = re.compile(r"\btools\b")
_ASKS = ("defined", "undefined", "none", "default", "d")
_READ: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()
_NORMAL_FORMS: weakref.WeakKeyDictionary[Any, Callable[[str], str] | None] = weakref.WeakKeyDictionary()


def check_tokenizer(tokenizer: Any) -> None:
    """Nothing, if the tokenizer can be used; ConfigError if it has no character offsets or no chat template."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} is a slow one, without the character offsets that place the loss "
            "mask; use a model with tokenizer.json"
        )
    if not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template; use a chat model, or save one with it"
        )


def check_kwargs(tokenizer: Any, kwargs: Mapping[str, Any] | None, key: str = "chat_template_kwargs") -> None:
    """RowError for an argument that the chat template does not read, or that is not for a row to set."""
    for name in kwargs or ():
        if name in _OURS:
            raise RowError("template_kwargs", f"{key}.{name} cannot be set: it decides how the template is called")
        read = name if name != "date" else "date|strftime_now"
        if not re.search(rf"\b({read})\b", _source(tokenizer)):
            raise RowError(
                "template_kwargs", f"{key}.{name} has no effect: the chat template does not read it; remove it"
            )


def check_unused(tokenizer: Any, names: Iterable[str]) -> None:
    """RowError for a column that the chat template would read, if it stood among its arguments."""
    for name in sorted(arguments_read(tokenizer).intersection(names)):
        said = f"column {name!r} is what the chat template reads; move it into chat_template_kwargs, or {ignored(name)}"
        raise RowError("template_kwargs", said)


def arguments_read(tokenizer: Any) -> frozenset[str]:
    """Names that the chat template takes from outside: enable_thinking, reasoning_effort, ..."""
    if tokenizer not in _READ:
        from jinja2 import meta, nodes

        environment = _library()[1](tokenizer.get_chat_template()).environment
        parsed = environment.parse(tokenizer.get_chat_template())
        # A name that is set somewhere is the template's own, unless it asks whether it was given.
        own = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"}
        asked = [*parsed.find_all(nodes.Test), *parsed.find_all(nodes.Filter)]
        given = {one.node.name for one in asked if one.name in _ASKS and isinstance(one.node, nodes.Name)}
        read = meta.find_undeclared_variables(parsed) - (own - given)
        _READ[tokenizer] = frozenset(read - _OURS - set(tokenizer.special_tokens_map) - set(environment.globals))
    return _READ[tokenizer]


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts of all tokens that control generation rather than write text, longest first."""
    if tokenizer not in _SPECIALS:
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        found = {token for token in added.union(tokenizer.all_special_tokens) if token.strip()}
        _SPECIALS[tokenizer] = tuple(sorted(found, key=lambda token: (-len(token), token)))
    return _SPECIALS[tokenizer]


def normal_form(tokenizer: Any) -> Callable[[str], str] | None:
    """What the tokenizer makes of a text before it looks for special tokens: NFKC turns full-width forms into one."""
    if tokenizer not in _NORMAL_FORMS:  # to ask it takes longer than to look through a row
        normalizer = tokenizer.backend_tokenizer.normalizer
        normalized = any(token.normalized for token in tokenizer.added_tokens_decoder.values() if token.special)
        _NORMAL_FORMS[tokenizer] = normalizer.normalize_str if normalizer and normalized else None
    return _NORMAL_FORMS[tokenizer]


@dataclass(frozen=True)
class ChatTemplate:
    """The template of `tokenizer` for one row: its tools and arguments, and how it takes the arguments of calls."""

    tokenizer: Any
    tools: list[dict[str, Any]] | None = None
    kwargs: Mapping[str, Any] | None = None
    text_arguments: bool = False

    @property
    def specials(self) -> tuple[str, ...]:
        """Texts of the special tokens, longest first."""
        return special_tokens(self.tokenizer)

    def require_tools(self) -> None:
        """RowError if there are tools and the template reads none: their names may stand in the conversation anyway."""
        if self.tools and not _READS_TOOLS.search(_source(self.tokenizer)):
            raise RowError(
                "template_drops", "the chat template does not write out the tools; use a model with tool support"
            )

    def render(self, messages: list[Message], generate: bool = False) -> str:
        """The conversation as the chat template writes it; `generate` adds the opening of an assistant turn."""
        from jinja2.exceptions import TemplateError

        source = _source(self.tokenizer)
        try:
            said = spoken(source, link_results(messages), self.text_arguments)
            if self.tools is None and not self.kwargs and _is_ordinary(self.tokenizer):
                return _render_alone(self.tokenizer, said, generate)
            return self.tokenizer.apply_chat_template(
                said,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=generate,
                **template_arguments(self.kwargs),
            )
        except (TemplateError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise RowError("template_refuses", f"the chat template refuses this conversation: {error}") from None


def _is_ordinary(tokenizer: Any) -> bool:
    """Whether its apply_chat_template is that of transformers."""
    asked = tokenizer.apply_chat_template
    return hasattr(asked, "__func__") and asked.__func__ is _library()[0]


@functools.cache
def _library() -> tuple[Callable[..., Any], Callable[[str], Any]]:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return PreTrainedTokenizerBase.apply_chat_template, _compile_jinja_template


def _render_alone(tokenizer: Any, messages: list[Message], generate: bool) -> str:
    """apply_chat_template of messages without tools and arguments: the same variables into the same compiled template.

    In half the time, which goes into checks of the call and into jinja's joining of global and given names.
    """
    compiled = _library()[1](tokenizer.get_chat_template())
    names = {**compiled.environment.globals, **tokenizer.special_tokens_map, **template_arguments(None)}
    names |= {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generate}
    return "".join(compiled.root_render_func(compiled.new_context(names, shared=True)))


def template_arguments(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a chat template is called with: a row's or recipe's arguments, and the date that it may print."""
    given = dict(kwargs or {})
    day = datetime.datetime.fromisoformat(str(given["date"])) if "date" in given else TODAY
    return {"strftime_now": day.strftime, **given}


def render(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    generate: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the chat template writes it; `generate` adds the opening of an assistant turn."""
    return template_for(tokenizer, messages, tools, kwargs).render(messages, generate)


def template_for(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """The template with call arguments in the form whose output holds them.

    Arguments are an object to some templates (Qwen, Mistral) and JSON text to others (DeepSeek). An object that comes
    out as JSON, or piece by piece (GLM-4.5, Gemma), is taken; then text; a template that writes neither is refused
    where its output is checked.
    """
    check_kwargs(tokenizer, kwargs)
    plain = ChatTemplate(tokenizer, tools, kwargs)
    if not any(message.get("tool_calls") for message in messages):
        return plain
    for template in (plain, ChatTemplate(tokenizer, tools, kwargs, text_arguments=True)):
        try:
            if holds_calls(messages, template.render(messages)):
                return template
        except RowError:
            continue
    return plain


def _source(tokenizer: Any) -> str:
    """What the template does, by which it is known what it reads; of several by name, all of them."""
    source = tokenizer.chat_template
    return _uncommented(source if isinstance(source, str) else json.dumps(source))


@functools.lru_cache(64)
def _uncommented(source: str) -> str:
    """Without the comments, which name what a template leaves out."""
    return re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)
