"""The graders a recipe may name. A grader takes (response, answer), both text, and returns a score from 0 to 1.

Ours read what a response says after its thinking (`answers.said`); one of your own gets the last MAX_CHARACTERS of the
response as it is. In training and wherever math-verify is called they run in a process of their own (`process`).
"""

import importlib
import importlib.util
import inspect
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from eaft_verl.errors import ConfigError
from eaft_verl.grading.answers import (
    MAX_CHARACTERS,
    ends_in_marked_number,
    final_number,
    last_box,
    marked_answer,
    only_number,
    said,
    stated,
)
from eaft_verl.grading.expressions import expressions_equal, is_expression
from eaft_verl.grading.letters import letter_of, marked_letters

MAX_ANSWER = 10_000


@dataclass(frozen=True)
class Grader:
    """score(response, answer) -> 0..1; fault(answer) -> why the answer cannot be graded against, or ''."""

    score: Callable[[str, str], float]
    fault: Callable[[str], str]


def number(response: str, answer: str) -> float:
    """1.0 if the number the response gives (`answers.final_number`) equals the answer's."""
    found, wanted = final_number(said(response)), only_number(answer)
    return float(found is not None and wanted is not None and found.equals(wanted))


def exact(response: str, answer: str) -> float:
    """1.0 if the response, or what it marks or states as its answer, is the answer.

    Case, white space, end punctuation, bold and LaTeX's \\text{} aside.
    """
    text, wanted = said(response), _normal(_reference(answer))
    marked = marked_answer(text)
    given = [text, stated(text) or ""] if marked is None else [marked]
    return float(wanted != "" and wanted in map(_normal, given))


def choice(response: str, answer: str) -> float:
    """1.0 if the letter the response settles on ('B', '(B)', 'B) because', 'the answer is B', a box) is the answer."""
    found = letter_of(said(response))
    return float(found != "" and found == marked_letters(_reference(answer)))


def math_verify(response: str, answer: str) -> float:
    """1.0 if the numbers are equal or, where one of both is no number, math-verify finds their LaTeX equal."""
    text = said(response)
    found, wanted = final_number(text), only_number(answer)
    if found is not None and wanted is not None:
        return float(found.equals(wanted))
    same = (marked_answer(text) or "").split() == _reference(answer).split() != []
    return float(bool(text.strip()) and (same or expressions_equal(text, answer)))


def ends_in_format(response: str) -> bool:
    """Whether the response ends in a line '#### number', or its last line holds a closed box."""
    last_line = said(response).rstrip().rpartition("\n")[2]
    return ends_in_marked_number(last_line) or last_box(last_line) is not None


def _reference(answer: str) -> str:
    marked = marked_answer(answer)
    return answer if marked is None else marked


def _normal(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s?\{([^{}]{0,1000})\}", r"\1", text)
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("'\"`*$ ").rstrip(".!?;:, ").strip("'\"`*$ ")


def _number_fault(answer: str) -> str:
    return "" if only_number(answer) else "it is not one number, such as 18, 3/4, 1,234.5, 50% or '... #### 18'"


def _exact_fault(answer: str) -> str:
    return "" if _normal(_reference(answer)) else "it is empty"


def _choice_fault(answer: str) -> str:
    letters = marked_letters(_reference(answer))
    return "" if len(letters) == 1 else "it is not a letter, such as B, (B) or 'B) text'"


def _math_fault(answer: str) -> str:
    if only_number(answer) or is_expression(answer):
        return ""
    return "math-verify reads no LaTeX expression in it"


GRADERS: dict[str, Grader] = {
    "number": Grader(number, _number_fault),
    "exact": Grader(exact, _exact_fault),
    "choice": Grader(choice, _choice_fault),
    "math_verify": Grader(math_verify, _math_fault),
}


def build_grader(name: str) -> Grader:
    """The named grader, or the function behind 'package.module:function'; ConfigError lists what there is."""
    if ":" in name:
        function = _imported(name)
        return Grader(lambda response, answer: function(response[-MAX_CHARACTERS:], answer), lambda answer: "")
    if name not in GRADERS:
        raise ConfigError(
            f"reward.grader={name!r} is unknown; choose one of {', '.join(GRADERS)}, or 'package.module:function' for "
            "your own"
        )
    if missing := absent_package(name):
        raise ConfigError(missing)
    return GRADERS[name]


def absent_package(name: str) -> str:
    """What must be installed before the named grader can grade, as a message; '' if nothing."""
    if name == "math_verify" and importlib.util.find_spec("math_verify") is None:
        return "reward.grader=math_verify needs math-verify: pip install 'eaft-verl[math]'"
    return ""


def _imported(name: str) -> Callable[[str, str], float]:
    module, _, attribute = name.partition(":")
    if not module or module.startswith("."):
        raise ConfigError(f"reward.grader={name!r} must be 'package.module:function', with the whole module path")
    try:
        function = vars(importlib.import_module(module))[attribute]
    except (Exception, SystemExit) as error:  # it is somebody else's code
        raise ConfigError(f"reward.grader={name!r} cannot be imported ({error!r}); is it on PYTHONPATH?") from None
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward.grader={name!r} must be a plain function (response, answer) -> 0..1")
    try:
        inspect.signature(function).bind("response", "answer")
    except TypeError as error:
        raise ConfigError(f"reward.grader={name!r} must take (response, answer): {error}") from None
    return function


def check_reward(grader: object, format_bonus: object, seconds: object) -> None:
    """Nothing, if the `reward` block of a recipe can be used; ConfigError names the key and what is allowed."""
    if not isinstance(grader, str) or not grader:
        raise ConfigError(f"reward.grader={grader!r} must be text: one of {', '.join(GRADERS)}, or module:function")
    if not absent_package(grader):  # a run would stop there; `checks.pending` says so
        build_grader(grader)
    for key, value, low, high in (("format_bonus", format_bonus, 0, 1), ("seconds", seconds, 0.1, 600)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"reward.{key}={value!r} must be a number from {low} to {high}")


def checked_score(score: object) -> float:
    """The score as a float; ValueError unless it is a number from 0 to 1."""
    if not isinstance(score, bool | int | float) or math.isnan(score) or not 0 <= score <= 1:
        raise ValueError(f"the grader returned {score!r}; a number from 0 to 1 is expected")
    return float(score)
