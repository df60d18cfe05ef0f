"""Numbers as people read them."""

import math

MINUS, DASH = "\u2212", "\u2013"


def number(value: float | None, decimals: int = 3, *, signed: bool = False, scale: float = 1.0) -> str:
    """'1,234.5', with sign on request; a dash if it is not known. Never '-0.0'."""
    if value is None or not math.isfinite(value):
        return DASH
    rounded = round(value * scale, decimals) + 0.0
    text = f"{rounded:+,.{decimals}f}" if signed and rounded else f"{rounded:,.{decimals}f}"
    return text.replace("-", MINUS)


def plain(value: float | None) -> str:
    """'1' or '0.667': an example's score."""
    return number(value, 3 if value is not None and value % 1 else 0)


def percent(share: float | None, decimals: int = 0) -> str:
    """'75 %', or a dash if it is not known."""
    return DASH if share is None else f"{number(share, decimals, scale=100.0)} %"
