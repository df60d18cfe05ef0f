"""Dataclass fields that know what they accept; `check_fields` runs the checks."""

import math
from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any


def check_fields(instance: Any, prefix: str = "") -> None:
    """ValueError for the first field of a dataclass whose value is not allowed."""
    for item in fields(instance):
        check, value = item.metadata.get("check"), vars(instance)[item.name]
        if check and (allowed := check(value)):
            raise ValueError(f"{prefix}{item.name}={value!r} must be {allowed}")


def choice(default: str, allowed: Sequence[str]) -> Any:
    """A parameter that is one of a few words."""

    def check(value: Any) -> str | None:
        written = str(float(value)) if type(value) is int else str(value)  # YAML reads 3.0 and 3 as numbers
        return None if written in allowed else f"one of {', '.join(allowed)}"

    return field(default=default, metadata={"check": check})


def number(
    default: Any, low: float, high: float = math.inf, *, positive: bool = False, words: Sequence[str] = ()
) -> Any:
    """A finite number in [low, high] (`positive`: above low), one of `words`, or None where that is the default."""

    def check(value: Any) -> str | None:
        if (value is None and default is None) or value in words:
            return None
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if finite and low <= value <= high and not (positive and value == low):
            return None
        return f"a number in {'(' if positive else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}" + "".join(
            f" or {word}" for word in words
        )

    return field(default=default, metadata={"check": check})


def candidates(default: int) -> Any:
    """The K of a top-K entropy."""

    def check(value: Any) -> str | None:
        return None if type(value) is int and value >= 2 else "an integer of at least 2 (ln 1 = 0)"

    return field(default=default, metadata={"check": check})


def count(default: int) -> Any:
    """How many: a whole number of at least 1."""

    def check(value: Any) -> str | None:
        return None if type(value) is int and value >= 1 else "a whole number of at least 1"

    return field(default=default, metadata={"check": check})
