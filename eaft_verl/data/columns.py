"""Which column of a row means what, and that none that means something is left behind in silence.

Every column that holds something (null, "" and empty lists hold nothing) is one of four things: used, because its name
or `data.columns` gives it a role; refused, because it carries what the model would have to see or what says how to
train; metadata, which is counted by name; or a copy of what the conversation says anyway, counted as well.
"""

import functools
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from eaft_verl.data.spec import Columns, RowError

PROMPT_KEYS = ("prompt", "question", "query", "problem", "instruction")
RESPONSE_KEYS = ("response", "answer", "completion", "output", "solution")
MASK_KEYS = ("train", "trainable", "loss", "loss_mask")
# The usual names of each role, in lower case. Long ones: FreedomIntelligence/Medical-R1-Distill-Data, medical-o1-sft.
USUAL = {
    "messages": ("messages", "conversations"),
    "prompt": PROMPT_KEYS,
    "context": ("context", "input"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "reasoning": ("reasoning", "reasoning_content", "thinking", "complex_cot", "reasoning (reasoning_content)"),
    "response": (*RESPONSE_KEYS, "response (content)"),
    "answer": ("answer", "reference"),
    "tools": ("tools", "functions"),
    "id": ("id",),
    "weight": ("weight", "sample_weight"),
    "chat_template_kwargs": ("chat_template_kwargs",),
    **{key: (key,) for key in MASK_KEYS},
}
_ROLES: dict[str, list[str]] = {}
for _role, _names in USUAL.items():
    for _name in _names:
        _ROLES.setdefault(_name, []).append(_role)
# What a model of text cannot be shown.
_MEDIA = re.compile(
    r"^(image|img|video|audio|picture|photo|screenshot|pixel|frame|wav|mel)s?(_|$)|"
    r"^(media|mm_data|attachments?|pdfs?)$|_(image|video|audio)s?$"
)
# What decides what is trained, by a spelling that is not ours; whatever its value is.
_TRAINING = re.compile(
    r"(^|_)(loss|masks?|masked|train|trained|trainable|training|supervised?|weights?)(_|$)|"
    r"^(prefix|suffix|end_turn|ignored?|skip|(is_)?(excluded?|included?|keep|kept|discard(ed)?|dropped|(in)?valid)|"
    r"importance|(num_|n_)?repeats?|upsample|oversample)$"
)
# What the prompt would have to hold; to be put there, or named in data.columns.
_CARRIERS = re.compile(
    r"^(options?|choices|documents?|docs|passages?|paragraphs?|contexts?|context_.*|background|body|evidence|hints?|"
    r"knowledge|persona|role|character|scenario|facts?|schema|table|code_.*|examples?|few_shots?|demonstrations?|starter_code|inputs|files|"
    r"(dialog(ue)?|conversation|chat|message)(_history)?|turns|instructions?|constraints?|channel|recipient|tools|functions|"
    r"sys|sys_prompt|system_instructions?|preamble|developer|thoughts?|cot|.*_cot|chain_of_thoughts?|rationales?|"
    r"texts?|contents?|utterances?|explanations?|analysis|scratchpad|think|thinking_(content|text|process)|reasoning_(text|trace|details|steps)|"
    r"(tool|function)_(calls?|names?|inputs?|outputs?|results?|responses?|args|arguments|call_ids?)|function|arguments|"
    r"actions?|action_inputs?|observations?)$"
)
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[\s.-]+")
_METADATA = re.compile(
    r"(^|[_ .-])(id|ids|idx|index|uuid|url|urls|uri|link|source|sources|dataset|split|subset|category|categories|type|"
    r"types|subject|topic|domain|task|level|difficulty|lang|language|license|author|model|generator|score|scores|rating|"
    r"ratings|quality|tag|tags|label|labels|date|time|timestamp|created|updated|hash|key|meta|metadata|info|name|title|"
    r"version|count|length|tokens|split|dir|path|answer_idx|chosen|rejected|embedding|embeddings|metrics|stats)$|"
    r"^(original|raw|gold|expected|generated)_"
)
_WORD = re.compile(r"(?!(?i:true|false|yes|no|on|off|null|y|n)$)[^\W\d]\w*([ .-]\w+)*")  # that YAML takes for itself
_IDENTIFIER = re.compile(r"[\x21-\x7e]{1,300}|[\d\s:.,/+TZ-]*")
# A file that this project prepared: what was made of the messages stands beside them.
_PREPARED = ("input_ids", "loss_mask", "attention_mask", "labels", "position_ids")


class Row:
    """A row's columns by role. `used`: columns that somebody has asked for."""

    def __init__(self, row: Mapping[str, Any], columns: Columns | None = None) -> None:
        self.filled = {str(key): value for key, value in row.items() if not absent(value)}
        self.empty = {
            str(key): value for key, value in row.items() if isinstance(value, str) and str(key) not in self.filled
        }
        self.columns = columns or {}
        self.roles = _by_role(self.filled)
        self.takes_context = False  # whether there is a prompt of one text, into which a column can go
        self.used: set[str] = set(_listed(self.columns.get("ignore")))
        self.named = dict.fromkeys(name for names in self.columns.values() for name in _listed(names))
        if "input_ids" in self.filled:
            self.used.update(_PREPARED)
        if missing := [name for name in self.named if name not in row and name not in self.used]:
            found = ", ".join(sorted(map(str, row))) or "none"
            raise RowError("format", f"there is no column {missing[0]!r} (data.columns); the row has {found}")

    def find(self, role: str) -> list[str]:
        """Names of the columns that have the role: the one that data.columns names, else the usual ones."""
        if role in self.columns:
            return [name for name in _listed(self.columns[role]) if name in self.filled or name in self.empty]
        usual = self.roles.get(role, ())
        if not usual and role in ("prompt", "response"):
            usual = _by_role(self.empty).get(role, [])
        return [name for name in usual if name not in self.named and name not in self.used]

    def take(self, role: str) -> Any:
        """The value in this role, or None; RowError if several columns claim it and differ."""
        if not (names := self.find(role)):
            return None
        if len(names) > 1 and any(self.filled.get(name) != self.filled.get(names[0]) for name in names):
            raise several(role, names, "clash")
        self.used.update(names)
        return self.value(names[0])

    def value(self, name: str) -> Any:
        """A column's value; "" where it holds nothing."""
        self.used.add(name)
        return self.filled.get(name, self.empty.get(name))

    def unused(self, messages: list[dict[str, Any]]) -> list[str]:
        """Names of the columns left over, all of them metadata or copies; RowError for one that is neither."""
        left = [name for name in self.filled if name not in self.used]
        for name in left:
            value = self.filled[name]
            if (kind := self._meant(name, value)) and (kind != "text" or not _is_copy(value, messages)):
                raise RowError("column", _meaning(name, value, kind, self.takes_context))
        return left

    def _meant(self, name: str, value: Any) -> str:
        """media, training or text, which cannot be left behind; '' for what the user or its name says is neither."""
        spelt = spellings(name)
        if _is_one(_MEDIA, spelt):
            return "media"
        if any(_claims(spelt, role) for role, column in self.columns.items() if column is None):
            return ""
        if _is_one(_TRAINING, spelt):
            return "training"
        asked = "prompt" in self.columns or "messages" in self.columns  # the user has said what the prompt is
        if asked and not _claims(spelt, "reasoning"):
            return ""
        number = isinstance(value, int | float)
        carries = not number and (_is_one(_CARRIERS, spelt) or _claims(spelt))
        return "text" if carries or not _is_metadata(spelt, value) else ""


def _by_role(names: Iterable[str]) -> dict[str, list[str]]:
    """The columns of each role, by their usual names."""
    roles: dict[str, list[str]] = {}
    for name in names:
        for role in dict.fromkeys(role for spelt in spellings(name) for role in _ROLES.get(spelt, ())):
            roles.setdefault(role, []).append(name)
    return roles


@functools.lru_cache(4096)
def spellings(name: str) -> tuple[str, ...]:
    """A name in lower case, and with its words apart: systemPrompt and `System Prompt` are system_prompt."""
    plain = name.strip()
    return tuple(dict.fromkeys((plain.lower(), _WORDS.sub("_", plain).lower())))


def _is_one(pattern: re.Pattern[str], spelt: tuple[str, ...]) -> bool:
    return any(map(pattern.search, spelt))


def absent(value: Any) -> bool:
    """Null, blank text and empty lists and objects say nothing."""
    return value is None or (isinstance(value, str) and not value.strip()) or (value in ([], {}, ()))


def several(role: str, names: list[str], kind: str = "format") -> RowError:
    """The refusal of a row in which more than one column may have a role."""
    ways = [
        " ".join((option(role, name), *(option("ignore", other) for other in names if other != name))) for name in names
    ]
    first, *others = map(_in_yaml, names)
    setting = f"data.columns={{{role}: {first}, ignore: [{', '.join(others)}]}}"
    return RowError(
        kind,
        f"found {' and '.join(names)}, which may say the same thing; keep one of them, or say which by "
        f"{shlex.quote(setting)} ({' or '.join(ways)})",
    )


def _meaning(name: str, value: Any, kind: str, takes_context: bool) -> str:
    """The refusal of a column that is media, training or text."""
    fits = takes_context and kind == "text" and isinstance(value, str)
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    what = {"media": "which text alone cannot show", "training": "which may say how to train"}
    say = "say it by a column weight (a number) or train (true, false)" if kind == "training" else ""
    say = say or (
        f"say what it is by data.columns ({option('context', name)})" if fits else "put it into a turn as text"
    )
    lost = what.get(kind, "which would be left out of training")
    return f"column {name!r} holds {shown[:60]!r}, {lost}; {say}, or {ignored(name)}"


def ignored(name: str) -> str:
    """How a column is left out, for an error."""
    setting = f"data.columns={{ignore: [{_in_yaml(name)}]}}"
    return f"leave it out by {shlex.quote(setting)} ({option('ignore', name)})"


def option(role: str, name: str) -> str:
    """The option that names a column, as a shell takes it."""
    quoted = name.replace("'", "'\"'\"'")
    return f"--column {role}='{quoted}'"


def _in_yaml(name: str) -> str:
    """The name as a list of YAML takes it."""
    return name if _WORD.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def _claims(spelt: tuple[str, ...], wanted: str | None = None) -> bool:
    """Whether the name usually has a role (the wanted one) in the conversation, in which it is then not used."""
    roles = {role for name in spelt for role in _ROLES.get(name, ())}
    return wanted in roles if wanted else bool(roles - {"id"})


def _is_metadata(spelt: tuple[str, ...], value: Any) -> bool:
    return _is_one(_METADATA, spelt) or all(_is_plain(leaf) for leaf in _leaves(value))


def _is_plain(leaf: Any) -> bool:
    return not isinstance(leaf, str | bytes) or (isinstance(leaf, str) and bool(_IDENTIFIER.fullmatch(leaf)))


def _is_copy(value: Any, messages: list[dict[str, Any]]) -> bool:
    """Whether the text is in the conversation, or the conversation in the text."""
    if not isinstance(value, str):
        return False
    text, texts = _squeezed(value), [_squeezed(message["content"]) for message in messages]
    return any(text in one for one in texts) or (bool(texts) and all(one in text for one in texts))


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return (leaf for item in value.values() for leaf in _leaves(item))
    if isinstance(value, list | tuple):
        return (leaf for item in value for leaf in _leaves(item))
    return (value,)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _listed(names: Any) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)
