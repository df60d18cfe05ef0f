"""LaTeX answers compared by math-verify: what is no number. To be run in a process that can be killed."""

import logging
import re
from typing import Any

from eaft_verl.grading.answers import answer_mark, final_number, stated
from eaft_verl.grading.notation import DOLLAR, THIN, plain

_TOLERANCE = 1e-5  # relative: math-verify rounds to 6 decimals, where 1/2004! and 1/2006! are both 0
_BRACKETED = re.compile(r"[(\[][^()\[\]]{0,300}[)\]]|\\\{[^{}]{0,300}\\\}")
_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9])")


def expressions_equal(response: str, answer: str) -> bool:
    """Whether the response's answer (marked, stated, or its last formula) is mathematically equal to the reference."""
    from math_verify import verify

    reference, given = _reference(answer), _answer_of(response)
    asked = reference.partition("=")[0] if "=" in reference else ""
    if "=" not in given and re.search(r"[A-Za-z].*[-+*/^]|[-+*/^].*[A-Za-z]", asked):
        return False  # math-verify takes 5 for x + y = 5
    listed = re.search(r",(?![0-9]{3}(?![0-9]))", _BRACKETED.sub("", reference)) is not None
    wanted, found = _parsed(reference), _parsed(given, listed=listed)
    return bool(verify(wanted, found, timeout_seconds=None)) and not _far_apart(wanted, found)


def is_expression(answer: str) -> bool:
    """Whether math-verify reads a LaTeX expression in a reference answer."""
    return bool(_parsed(_reference(answer)))


def _reference(answer: str) -> str:
    mark = answer_mark(answer)
    return mark.text if mark else answer


def _answer_of(response: str) -> str:
    if mark := answer_mark(response):
        return mark.text
    if (statement := stated(response)) and re.search(r"[$\\]", statement):
        return statement
    number = None if re.search(r"[$\\]", response) else final_number(response)
    return str(number.value) if number else response


def _parsed(text: str, *, listed: bool = False) -> list[Any]:
    """What math-verify reads as LaTeX: [expression, its text] or less. listed: 10,200 are two numbers.

    Its parser of plain text calls eval on it and stays off, and so do its own time limits: the process has one.
    """
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    text = plain(text).replace(THIN, " ").replace(DOLLAR, "\\$").replace("\u00b0", "^\\circ ")
    text = _BRACKETED.sub(lambda found: _COMMA.sub(", ", found[0]), text)  # (3,400) is a pair
    text = _COMMA.sub(", ", text) if listed else text
    return parse(
        text if "$" in text or "\\(" in text or "\\[" in text else f"${text}$",
        [LatexExtractionConfig()],
        parsing_timeout=None,
    )


def _far_apart(wanted: list[Any], found: list[Any]) -> bool:
    """Whether both are numbers that differ by more than rounding, however small they are."""
    from sympy import Expr

    one, other = wanted[0], found[0]
    if not (isinstance(one, Expr) and isinstance(other, Expr) and one.is_number and other.is_number):
        return False
    one, other = one.doit().evalf(30), other.doit().evalf(30)
    return bool(abs(one - other) > _TOLERANCE * max(abs(one), abs(other)))
