"""Scores of one answer: pure functions of text, compared exactly as rational numbers.

Each `process_results` function has lm-evaluation-harness's signature: (doc, results) -> {metric: score}.
"""

import math
import re
from fractions import Fraction
from typing import Any

from eaft_verl.errors import DataError

# An integer with or without thousands separators, a decimal, or a leading point; then perhaps a denominator.
_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+(?![0-9.]))?"
# A minus after a digit, a letter or a closing bracket subtracts; it is not part of the number: 9-2 ends in 2.
_NUMBER = re.compile(rf"(?P<minus>(?<![\w)])-\s?)?(?:\$(?P<inner>-)?)?(?P<value>{_UNSIGNED})")
_ANSWER_MARK = "####"
_ANSWER_LINE = re.compile(rf"####\s*-?(?:\$-?)?{_UNSIGNED}")
_MAX_DIGITS = 1000  # Python refuses to parse integers beyond 4300 digits, and no benchmark has such answers


def _exact(match: re.Match[str]) -> Fraction | None:
    text = match["value"].replace(",", "")
    if len(text) > _MAX_DIGITS:
        return None
    numerator, _, denominator = text.partition("/")
    if denominator and int(denominator) == 0:
        return None
    value = Fraction(numerator) / Fraction(denominator or 1)
    return -value if match["minus"] or match["inner"] else value


def _ascii_minus(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")


def last_number(text: str) -> Fraction | None:
    """The last number written in a text, exactly: '$1,234.50' -> 2469/2, '3/4' -> 3/4; None if there is none.

    Signs count only where they cannot be a subtraction ('9 - 3 = 6' -> 6, 'x = -6' -> -6, '9-2' -> 2). Numbers of more
    than 1,000 digits and fractions over zero are no numbers.
    """
    matches = list(_NUMBER.finditer(_ascii_minus(text)))
    return _exact(matches[-1]) if matches else None


def marked_number(text: str) -> Fraction | None:
    """The first number in what follows the last '####', or None: where GSM8K puts its answers."""
    _, mark, tail = text.rpartition(_ANSWER_MARK)
    match = _NUMBER.search(_ascii_minus(tail).split("\n")[0]) if mark else None
    return _exact(match) if match else None


def ends_in_marked_number(text: str) -> bool:
    """Whether the last line is '#### number' and nothing follows it: the format taught, and a stop after it."""
    last_line = text.rstrip().rpartition("\n")[2]
    return _ANSWER_LINE.fullmatch(_ascii_minus(last_line).strip()) is not None


def _reference(doc: dict[str, Any]) -> Fraction:
    """The number in `answer`: all of it, or what follows '####' in a worked solution."""
    answer = str(doc["answer"])
    value = marked_number(answer) if _ANSWER_MARK in answer else last_number(answer)
    if value is None:
        raise DataError(
            f"answer {answer[:60]!r} of question {str(doc)[:80]!r} holds no number; expected '7' or '... #### 7'"
        )
    return value


def last_number_accuracy(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{accuracy}: 1 if the last number of the answer equals the reference."""
    return {"accuracy": float(last_number(results[0]) == _reference(doc))}


def sums(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{accuracy, format_rate}: last number right; answer line in the taught format."""
    return {**last_number_accuracy(doc, results), "format_rate": float(ends_in_marked_number(results[0]))}


def gsm8k(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{accuracy, last_number_accuracy, format_rate}: accuracy counts only a number after '####'."""
    return {
        "accuracy": float(marked_number(results[0]) == _reference(doc)),
        "last_number_accuracy": last_number_accuracy(doc, results)["accuracy"],
        "format_rate": float(ends_in_marked_number(results[0])),
    }


def choice(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """{acc, choice_logprob} of a multiple-choice question whose right choice has the index doc['answer'].

    choice_logprob = log p(right) - log sum over choices p(choice), nats: it moves before the accuracy of a small model,
    which is at chance, does.
    """
    scores = [score for score, _ in results]
    right = int(doc["answer"])
    best = max(scores)
    total = best + math.log(sum(math.exp(score - best) for score in scores))
    return {"acc": float(scores.index(best) == right), "choice_logprob": scores[right] - total}


def cluewsc(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """{acc, choice_logprob}: choice A says that both spans mean the same, choice B that they do not."""
    return choice({"answer": 0 if str(doc["label"]).lower() == "true" else 1}, results)
