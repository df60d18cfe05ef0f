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


def share(value: float) -> str:
    """'2.6 %', '0.57 %', '0.003 %', '15 %': a share with as many digits as small ones need; '0 %' is none at all, and
    '100 %' all, but for a rounding."""
    percents = 100 * value
    size = abs(percents)
    gap = 100 - size
    if 0 < size < 1e-6:
        return f"{percents:.0e} %".replace("-", MINUS)
    decimals = max(2, math.ceil(-math.log10(size))) if 0 < size < 1 else 1
    if 1e-6 < gap < 0.05:
        decimals = math.ceil(-math.log10(gap))
    return f"{number(percents, decimals).removesuffix('.0')} %"


def short(value: float) -> str:
    """Three significant digits; from a thousand on whole numbers."""
    return (f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}").replace("-", MINUS)
