"""What a user asks of a data set, and the error that refuses one row of it."""

import json
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from eaft_verl.errors import ConfigError, DataError

CHOICES = {
    "over_long": ("error", "drop", "truncate"),
    "control_tokens": ("error", "escape", "allow"),
    "turns": ("whole", "split", "last"),
}

LEAKAGE = ("warn", "error", "drop")
# What a column may be named for; `ignore` takes a list. The usual names of each stand in `columns.py`.
COLUMN_ROLES = (
    *("messages", "prompt", "context", "system", "history", "reasoning", "response", "answer", "tools"),
    *("id", "weight", "chat_template_kwargs", "ignore"),
)
REPEATED = ("context", "ignore")  # that several columns may have
_APART = {"messages", "prompt", "context", "system", "history", "reasoning", "response", "ignore"}  # no column has two
Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    source: as DataSpec.source. name: under which its rows are counted; None where it is the only one.
    share: of the rows of the mixture, in (0, 1]; sources without a share are taken whole and make up the rest.
    cap: at most so many rows. weight: of each of its rows in the loss, times the row's own.
    columns: as DataSpec.columns, for this source alone. rows: read only the first so many rows.
    """

    source: str
    name: str | None = None
    share: float | None = None
    cap: int | None = None
    weight: float = 1.0
    columns: Columns | None = None
    rows: int | None = None

    def check(self, key: str) -> None:
        """Raise ConfigError naming the key under `key` that is wrong."""
        if not isinstance(self.source, str) or not self.source.strip():
            raise ConfigError(f"{key}={self.source!r} must name a file, generate:NAME or a hub id org/name")
        if self.share is not None and not (_is_number(self.share) and 0 < self.share <= 1):
            raise ConfigError(
                f"{key}.share={self.share!r} must be above 0 and at most 1: the part of the training rows"
            )
        for name, value in (("cap", self.cap), ("rows", self.rows)):
            if value is not None and not _is_count(value, 1):
                raise ConfigError(f"{key}.{name}={value!r} must be a whole number, at least 1, or null for all rows")
        if not (_is_number(self.weight) and self.weight > 0):
            raise ConfigError(f"{key}.weight={self.weight!r} must be above 0")
        check_columns(self.columns, f"{key}.columns")


@dataclass(frozen=True)
class DataSpec:
    """Where rows come from and what is done with rows that cannot be trained on as they are.

    source: a file, folder or glob of JSON lines, JSON arrays or parquet, `generate:NAME`, an address that fsspec
        opens (s3://, hf://), a hub id `org/name[:config[:split]]`; or a mixture: {name: source or Source's fields}.
    max_length: tokens per example, prompt included.
    over_long: `error` aborts, `drop` rejects the row (with turns=split: the turn), `truncate` keeps its first
        max_length tokens.
    control_tokens: special tokens written out inside a message: `error` aborts, `escape` breaks them up with a
        zero-width space, `allow` lets them become control tokens.
    turns: `whole` trains every assistant turn of a conversation in one example; `split` makes one example per turn;
        `last` trains the last one only, so that earlier ones are few-shot examples.
    rows: read only the first so many rows of each source; None reads all.
    columns: {role: column}, the role one of COLUMN_ROLES; null leaves what usually has the role out.
    chat_template_kwargs: what the chat template is called with besides the row's own (enable_thinking, ...).
    key: where the source stands in a recipe, by which errors call it.

    Raises ConfigError naming the key and what is allowed.
    """

    source: Any
    max_length: int = 16384
    over_long: str = "error"
    control_tokens: str = "error"
    turns: str = "whole"
    rows: int | None = None
    columns: Columns | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    key: InitVar[str] = "data.train"

    def __post_init__(self, key: str) -> None:
        vars(self)["_key"] = key
        for name, allowed in CHOICES.items():
            if (found := getattr(self, name)) not in allowed:
                raise ConfigError(f"data.{name}={found!r} is unknown; choose one of {', '.join(allowed)}")
        if not _is_count(self.max_length, 2):
            raise ConfigError(f"data.max_length={self.max_length!r} must be a whole number of tokens, at least 2")
        if self.rows is not None and not _is_count(self.rows, 1):
            limit = "data.heldout_rows" if key == "data.heldout" else "data.rows"
            raise ConfigError(f"{limit}={self.rows!r} must be a whole number, at least 1, or null for all rows")
        if self.chat_template_kwargs is not None and not isinstance(self.chat_template_kwargs, Mapping):
            raise ConfigError(f"data.chat_template_kwargs={self.chat_template_kwargs!r} must be a mapping")
        check_columns(self.columns, "data.columns")
        _ = self.sources

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The source, or those of the mixture with their names; what `columns` says holds where they say nothing."""
        return sources_of(self.source, vars(self)["_key"], columns=self.columns, rows=self.rows)


def sources_of(value: Any, key: str = "data.train", **common: Any) -> tuple[Source, ...]:
    """The sources that a recipe's `data.train` or `data.heldout` names: text, one mapping with `source`, or several.

    common: fields that hold where a source says nothing. Raises ConfigError for anything else.
    """
    if not isinstance(value, Mapping | list | tuple):
        entries: dict[str | None, Any] = {None: value}
    elif isinstance(value, Mapping):
        entries = {None: value} if "source" in value and not isinstance(value["source"], Mapping) else dict(value)
    else:
        entries = _named(value, key)
    if not entries:
        raise ConfigError(f"{key}={value!r} names no source")
    found = tuple(_source(entry, name, f"{key}.{name}" if name else key, common) for name, entry in entries.items())
    shares = sum(source.share or 0 for source in found)
    if shares > 1 + 1e-9 or (all(source.share for source in found) and shares < 1 - 1e-9):
        raise ConfigError(
            f"{key}: shares add up to {shares:g}; they must make 1, or less where a source without a share is the rest"
        )
    return found


def check_columns(columns: Columns | None, key: str) -> None:
    """Raise ConfigError unless `columns` names roles that exist, and columns by their names."""
    if columns is None:
        return
    if not isinstance(columns, Mapping):
        raise ConfigError(f"{key}={columns!r} must be a mapping such as {{prompt: Question, response: Response}}")
    role_of: dict[str, str] = {}
    for role, column in columns.items():
        if role not in COLUMN_ROLES:
            raise ConfigError(f"{key}.{role} is unknown; a column's role is one of {', '.join(COLUMN_ROLES)}")
        names = column if isinstance(column, list | tuple) and role in REPEATED else [column]
        if not all(isinstance(name, str) and len(name) >= (role != "ignore") for name in names) and column is not None:
            raise ConfigError(f"{key}.{role}={column!r} must be the name of a column")
        for name in names if role in _APART and column is not None else ():
            if (other := role_of.setdefault(name, role)) != role:
                raise ConfigError(f"{key}: column {name!r} is named as {other} and as {role}; it can be one of them")


def _named(entries: Any, key: str) -> dict[str | None, Any]:
    """A list of sources by the stems of their files, as names must differ."""
    named: dict[str | None, Any] = {}
    for number, entry in enumerate(entries, 1):
        source = entry.get("source") if isinstance(entry, Mapping) else entry
        name = entry.get("name") if isinstance(entry, Mapping) else None
        stem = name or (Path(source).name.split(".")[0] if isinstance(source, str) else f"{number}")
        if stem in named:
            raise ConfigError(f"{key}: two sources are called {stem!r}; write them as a mapping of names to sources")
        named[stem] = entry
    return named


def _source(entry: Any, name: str | None, key: str, common: Mapping[str, Any]) -> Source:
    given = dict(entry) if isinstance(entry, Mapping) else {"source": entry}
    allowed = [field.name for field in fields(Source)]
    if unknown := [field for field in given if field not in allowed]:
        raise ConfigError(f"{key}.{unknown[0]} is unknown; a source has {', '.join(allowed)}")
    source = Source(**{**common, "source": None, **given, "name": given.get("name", name)})
    source.check(key)
    return source


class RepeatedKey(ValueError):
    """An object of JSON has a key twice."""


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's object_pairs_hook that loses nothing; RepeatedKey where the later of two would take the other's place."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def why_no_json(error: ValueError | RecursionError) -> str:
    """What is wrong with JSON text that Python's reader refuses, in words for whoever wrote it."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    told = isinstance(error, json.JSONDecodeError | RepeatedKey)
    return str(error) if told else "a number of more than 4,300 digits"


class RowError(DataError):
    """One row cannot be used. `kind` is the key under which the manifest counts it."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e30
