"""Numbers in prose: the one a phrase begins with, and the last one, unless it is part of an expression or a list."""

import re

from eaft_verl.grading.notation import behind, plain
from eaft_verl.grading.numbers import (
    LABEL,
    NAME,
    NO_UNITS,
    NUMBER,
    SHORT_UNITS,
    Number,
    grouped,
    rounded,
    value_of,
    whole_number,
)

_TAIL = 10_000  # characters at the end of prose in which its number is looked for
_NEAR = 60  # characters beside a number that decide whether it is part of an expression
_FORMULA = re.compile(
    r"(?<![\\$\w])\$(?=[^\s$])([^$\n]{1,300})(?<=\S)\$(?![0-9$])|\\\(([^\n]{1,300}?)\\\)|\\\[([^$]{1,300}?)\\\]"
)
_NEUTRAL = {"approx", "therefore", "Rightarrow", "implies", "rightarrow", "to", "simeq", "sim", "text", "because"}
_COMMAND_LEFT = re.compile(r"\\([A-Za-z]+) ?[{(]? ?\Z")
_FUNCTION_LEFT = re.compile(
    r"\b(?:ln|log|sqrt|sin|cos|tan|exp|root of|logarithm of|factorial of) ?\(?\Z", re.IGNORECASE
)
_OPERATOR_LEFT = re.compile(
    r"[\^_] ?\{?\Z|(?:^|[^>=-])>=? ?\Z|(?:^|[^<])<=? ?\Z|!= ?\Z|[\w)}\]%] ?[*+/] ?\Z|[\w)}\]%]\*\*\Z|[0-9][.,:/']?\Z"
    r"|[0-9)}$] (?:plus|minus|times|over|(?:divided|multiplied) by) \Z"
)
_NAMED = re.compile(
    r"(?:[A-Za-z]{2}-|[A-Za-z])\Z|\b(?:step|question|example|figure|table|case|part|equation|problem|method|line|page|"
    r"section|chapter|exercise) ?#?\Z",
    re.IGNORECASE,
)
_ITEM = re.compile(r"(?:^|\n)[ \t#*]*\Z")
_DISMISSED_LEFT = re.compile(r"\b(?:not|n't|instead of|rather than|out of) (?:the )?(?:[A-Za-z] ?= ?)?(?:\$|\\\()?-?\Z")
_DISMISSED_RIGHT = re.compile(
    r"(?:\$|\\\))? (?:(?:is|was|would be) (?:wrong|incorrect|not)\b|(?:decimal|significant) (?:place|digit|figure))"
)
_ROUNDED = re.compile(r"([^\s=,;]{1,40}) ?\\(?:approx|simeq) ?\Z")
_RANGE = re.compile(r"\b(?:is|are|was|were|takes?|took|lasts?|needs?|about|around|every|for) [0-9.,]{1,20} to \Z")
_REMARK = re.compile(r"[0-9][^\s()]*(?: [A-Za-z]+){0,2} \([^()]*\Z")
_CONTINUES = re.compile(
    r" ?[\^_]|\(|[.,:/'][0-9]| ?[*/+] ?[\w\\(]| ?- ?(?:[0-9(\\]|[a-zA-Z]\b)| ?(?:!=|[<>])| (?:[xyzn]|mod)\b"
    r"| ?(?:st|nd|rd|th)? (?:root|power)s?\b"
)
_COMMAND_RIGHT = re.compile(r" ?\\([A-Za-z]+)")
_MORE = re.compile(r" ?(?:,|;|&|and\b|or\b) ?(?:\$|\\\()? ?-?\$?(?:[0-9]|\\frac|\\pm|[A-Za-z] ?=)")
_JOINED = re.compile(
    r"[0-9)%}$] ?[,;]? ?(?:\b(?:and|or)|&|或|和) ?(?:\$|\\\()?-?\Z"
    r"|\b[A-Za-z] ?= ?[^\s,;]{1,30} ?(?:[,;]|,? ?(?:and|or)) ?[A-Za-z] ?= ?-?\Z"
)
_LARGER = re.compile(
    r"[0-9] ?(?:days?|hours?|hrs?|h|minutes?|mins?|min|feet|foot|ft|pounds?|lbs?|years?|dollars?|euros?"
    r"|km|m|meters?|metres?|kg),?(?: and)? \Z"
)
_SMALLER = re.compile(
    r" ?(?:hours?|hrs?|minutes?|mins?|min|seconds?|secs?|s|inch(?:es)?|in|ounces?|oz|months?|days?|cents?|m|cm|mm|g"
    r"|grams?)\b"
)
_LISTED = re.compile(r"[0-9)%}$] ?[,;] ?(?:\$|\\\()?-?\Z")
_INSIDE = re.compile(r"[(\[{][^()\[\]{}]*, ?-?\Z")
_CLOSES = re.compile(r" ?(?:[)\]}]|\\\})")
_SIGN = re.compile(r"[+-] ?")
_ENDS = re.compile(r"(?:\$|\\\))? ?(?:[.!?)\]}\n]|\\\}|\Z)")
_UNIT_POWER = re.compile(r"[0-9] ?[A-Za-z/]{0,12}?(?:\b([A-Za-z]{1,4})|\\text\{[^{}]{1,30}\}) ?\^ ?\{?-?\Z")


def begins_with_number(text: str) -> bool:
    """Whether a number, of whatever expression, is the first thing in a text; an enumeration ('2. Check') is none."""
    text = plain(text).lstrip(" *`")
    return re.match(r"[0-9]{1,3}[.)][ \t]+\S", text) is None and NUMBER.match(text.lstrip("+- ")) is not None


def leading_number(text: str) -> Number | None:
    """The number that a phrase begins with, where words and no expression follow: '7 apples, not 8', '72, in total'."""
    text = grouped(plain(text))
    start = behind(LABEL, text)
    if formula := _FORMULA.match(text, start):
        return None if _MORE.match(text, formula.end()) else whole_number(formula.group(formula.lastindex or 1))
    start = behind(NAME, text, start)
    match = NUMBER.match(text, behind(_SIGN, text, start))
    if not match or _continues(text[match.end() : match.end() + _NEAR]) or _MORE.match(text, match.end()):
        return None
    return value_of(match, negative=text.startswith("-", start))


def last_number(text: str) -> Number | None:
    """The last number in prose: '2 * 12 + 5 = 29' -> 29; None where it is part of an expression or a list.

    A formula between dollar signs is read as a whole. Numerals in names ('CO2'), labels ('Step 2'), the numbers of a
    list's items, remarks in parentheses behind a number ('$72 (48 + 24)') and what is dismissed ('6, not 5') are passed
    over.
    """
    text = grouped(plain(text[-_TAIL:]))
    formulas, first_line = list(_FORMULA.finditer(text)), text.find("\n") % (len(text) + 1)
    for match in list(NUMBER.finditer(text))[::-1]:
        inside = _formula_around(match.start("value"), formulas)
        start, end = (inside or match).span()
        left, right = text[max(0, start - _NEAR) : start], text[end : end + _NEAR]
        if _is_dismissed(left, right):
            continue
        if inside:
            return None if _ends_list(left, right) else whole_number(inside.group(inside.lastindex or 1))
        if _is_passed_over(left, right, first_line=start <= first_line):
            continue
        sign = _sign(left)
        pair = "," in match["value"] and re.search(r"[(\[]-?\Z", left) and _CLOSES.match(right)  # (3,400)
        if sign is None or pair or _continues(right) or _ends_list(left, right):
            return None
        found, before = value_of(match, negative=sign < 0), _ROUNDED.search(left)
        return rounded(found, match, before[1]) if before else found
    return None


def _is_dismissed(left: str, right: str) -> bool:
    return bool(_DISMISSED_LEFT.search(left) or _DISMISSED_RIGHT.match(right))


def _formula_around(place: int, formulas: list[re.Match[str]]) -> re.Match[str] | None:
    """The formula that holds a place; those behind it are dropped, as places are asked for from the last one on."""
    while formulas and formulas[-1].start() > place:
        formulas.pop()
    return formulas[-1] if formulas and formulas[-1].end() > place else None


def _is_passed_over(left: str, right: str, *, first_line: bool) -> bool:
    """Whether a numeral is no number of the text: in a name, a label, a list's item or a remark in parentheses."""
    if _REMARK.search(left) and re.match(r"[^()]*\)", right):
        return True
    if _COMMAND_LEFT.search(left) or _FUNCTION_LEFT.search(left):
        return False
    if power := _UNIT_POWER.search(left):
        return power[1] is None or power[1].lower() in SHORT_UNITS
    item = not first_line and _ITEM.search(left) and re.match(r"[.)][ \t]+\S", right)
    source = re.search(r"[\w.)] ?\[\Z", left) and right.startswith("]")
    return bool(_NAMED.search(left) or item or source)


def _sign(left: str) -> int | None:
    """1 or -1 by what stands left of a number; None if that makes the number part of an expression."""
    sign = 1
    if minus := re.search(r"-( ?)\Z", left):
        left = left[: minus.start()]
        before = left.rstrip()
        tight, word = left == before, re.split(r"\W", before)[-1]
        if word[-1:].isdigit() or before[-1:] in tuple(")]}%") or (len(word) == 1 and (tight or minus[1])):
            return None  # 9 - 2, x - 2; a dash between a word and a number is no sign
        sign = 1 if word and (tight or minus[1]) else -1
    if (command := _COMMAND_LEFT.search(left)) and command[1] not in _NEUTRAL:
        return None
    return None if _FUNCTION_LEFT.search(left) or _OPERATOR_LEFT.search(left) else sign


def _continues(right: str) -> bool:
    """Whether what stands right of a number makes it part of an expression: 3x, 5^2, 10:30, 4 + y, 3(x + 1)."""
    if glued := re.match(r"[A-Za-z]+", right):
        word = glued[0].lower()
        return word in NO_UNITS or (len(word) < 3 and word not in SHORT_UNITS)
    command = _COMMAND_RIGHT.match(right)
    return bool(_CONTINUES.match(right) or (command and command[1] not in _NEUTRAL))


def _ends_list(left: str, right: str) -> bool:
    """Whether a number is one of several: '3 or 4', 'x = 5, x = 3', '(2, 5)', '1, 2, 3.'"""
    listed = _ENDS.match(right) and _LISTED.search(left)
    compound = _SMALLER.match(right) and _LARGER.search(left)  # 5 hours 30 minutes
    return bool(
        _JOINED.search(left)
        or _RANGE.search(left)
        or listed
        or compound
        or (_CLOSES.match(right) and _INSIDE.search(left))
    )
