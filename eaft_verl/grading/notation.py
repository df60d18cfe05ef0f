"""One spelling for what people, LaTeX and Markdown write in many: minus signs, spaces, dollars, fractions, emphasis."""

import re

THIN = "\u2009"  # every space that may group digits
DOLLAR = "\ue000"  # an escaped dollar: a currency, never the edge of a formula
_TABLE = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63", "-")
    | dict.fromkeys(map(chr, [0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F]), THIN)
    | dict.fromkeys("\u200b\u200e\u200f\u2060\ufeff", "")
    | {"\u3000": " ", "\u3002": ". ", "\u3001": ", ", "\u2044": "/", "\u2215": "/", "\u00ba": "\u00b0"}
    | {"\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": r"\div ", "\u2248": r"\approx "}
    | {"\u00b1": r"\pm ", "\u221a": r"\sqrt ", "\u03c0": r"\pi ", "\u221e": r"\infty "}
    | {"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne "}
    | dict(zip("½⅓⅔¼¾", (" 1/2", " 1/3", " 2/3", " 1/4", " 3/4"), strict=True))
    | dict(zip("⅕⅖⅗⅘⅙⅚", (" 1/5", " 2/5", " 3/5", " 4/5", " 1/6", " 5/6"), strict=True))
    | dict(zip("⅛⅜⅝⅞", (" 1/8", " 3/8", " 5/8", " 7/8"), strict=True))
)
# Digits grouped by dots or spaces, with a comma for the decimals where there are any: 1.234.567, 1.234,50, 2,50 €.
_CONTINENTAL = re.compile(
    r"(?<![\d.,(\[])(?:[1-9]\d{0,2}(?:(?:\.\d{3}){2,40}(?:,\d{1,9})?|(?:\.\d{3}|[ \u2009]\d{3}){1,40},\d{1,2})"
    r"|\d{1,3},\d{1,2}(?=\s?(?:€|EUR\b|Euro\b|kr\b)))(?![\d,]|\.\d)",
    re.ASCII,
)
_SWAPPED = str.maketrans(".,", ",.")
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
_LOWERED = str.maketrans(_RAISED, "0123456789-")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALE_WORDS = "|".join(SCALES)
_REWRITES = [
    (re.compile(pattern), to)
    for pattern, to in [
        (r"\{,\}(?:\\!)?|,\\! ?", ","),
        (r"(?<=[0-9])_(?=[0-9]{3}(?:_[0-9]{3})*(?!\w))", ","),
        (r"(\A\s?|[=:] ?|\b(?:is|are|be|was|equals|to|at|get|gives) )(?:[Nn]egative|[Mm]inus) (?=[$\\.0-9])", r"\1-"),
        (r"\\varnothing(?![A-Za-z])|\u2205", r"\\emptyset "),
        (r"<<[^<>\n]{0,200}>>|</?[a-z]{1,10}>|\\!|\\(?:left|right|displaystyle|textstyle)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,;: ]|~|\{\s\}|\\(?:thinspace|quad|qquad)(?![A-Za-z])", THIN),
        (r"\\([%#&])", r"\1"),
        (r"\\\$", DOLLAR),
        (r"\$\$", "$"),
        (r"\\[dtc]frac(?![A-Za-z])|\\(?:nice|s|x)frac(?![A-Za-z])", r"\\frac"),
        (r"\^\s?\{?\s?\\circ\s?\}?|\\(?:degree|circ)(?![A-Za-z])", "\u00b0"),
        (r"\\(?:text(?:bf|it|sf|tt)|math(?:bf|it|sf|tt)|boldsymbol|bm|emph|underline)\s?\{([^{}]{0,200})\}", r"\1"),
        (r"\\(?:math(?:rm|up)|text(?:rm|normal|up)|mbox|operatorname|hbox)\s?\{", r"\\text{"),
        (r"(\\text\s?\{[^{}]{0,200}\^)\{(-?[0-9])\}", r"\1\2"),
        (r"\\text\s?\{(\s?[-+$]?\s?[0-9][^{}]{0,200})\}", r"\1"),
        (rf"\\text\s?\{{\s?({SCALE_WORDS}|per ?cent)\b", r" \1 \\text{"),
        (r"(?:\^\s?|\\textsuperscript)\{(?:\\text\{)?\s?(st|nd|rd|th)\}{1,2}", r"\\text{\1}"),
        (r"\\(?:bar|dot|overline)\s?\{?([0-9]{1,40})\}?", r"\\overline{\1}"),
        (r"(?<![\w*])\*\*(?=[^\s*])([^*\n]{1,200})(?<=\S)\*\*(?![\w*])", r"\1"),
        (r"(?<![\w_])_{1,2}(?=[^\s_])([^_\n]{1,200})(?<=\S)_{1,2}(?![\w_])", r"\1"),
    ]
]


def behind(pattern: re.Pattern[str], text: str, start: int = 0) -> int:
    """Where a text goes on behind what matches at `start`; `start` itself if nothing does."""
    found = pattern.match(text, start)
    return found.end() if found else start


def plain(text: str) -> str:
    """The text with one spelling for minus signs, spaces, LaTeX's and Markdown's ways to write a number."""
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda raised: "^{" + raised[0].translate(_LOWERED) + "}", text)
    text = _CONTINENTAL.sub(lambda found: found[0].translate(_SWAPPED), text.translate(_TABLE))
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    return text
