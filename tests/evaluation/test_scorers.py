"""Answers as models write them, scored by hand."""

import math
from fractions import Fraction

import pytest

from eaft_verl.errors import DataError
from eaft_verl.evaluation import scorers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        ("7.0", 7),
        ("The answer is 7.", 7),
        ("1,234", 1234),
        ("1,234,567.5 dollars", Fraction(2469135, 2)),
        ("1, 2, 3", None),  # a list, an operand: no answer
        ("-3", -3),
        ("x = -3", -3),
        ("x = - 3", -3),
        ("\N{MINUS SIGN}3", -3),
        ("9-2", None),
        ("9 - 3 = 6", 6),
        ("$7", 7),
        ("-$7", -7),
        ("$-7", -7),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("50%", 50),
        ("4+3=<<4+3=7>>7\n#### 7", 7),
        ("1/0", None),
        ("nothing", None),
        ("", None),
        ("#### ", None),
        ("9" * 30, int("9" * 30)),
        ("9" * 5000, None),
    ],
)
def test_final_number(text: str, expected: Fraction | None):
    found = scorers.final_number(text)
    assert (found and found.value) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 7", 7),
        ("so 5\n#### 70,000", 70000),
        ("#### 5\n#### 6", 6),
        ("#### $18", 18),
        ("#### -2", -2),
        ("#### ", None),
        ("####\n7", None),
        ("7", None),
    ],
)
def test_marked_number(text: str, expected: Fraction | None):
    found = scorers.marked_number(text)
    assert (found and found.value) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4+3=<<4+3=7>>7\n#### 7", True),
        ("#### 7", True),
        ("#### -7\n", True),
        ("#### 1,234.5", True),
        ("#### 7 apples", False),
        ("#### 7\n7", False),
        ("#### ", False),
        ("####", False),
        ("7 #### 7", False),
        ("7", False),
        ("", False),
    ],
)
def test_ends_in_marked_number(text: str, expected: bool):
    assert scorers.ends_in_marked_number(text) is expected


def test_long_answers_are_scored_in_linear_time():
    assert scorers.final_number("1," * 50_000) is None
    assert scorers.final_number("-" * 100_000) is None


def test_sums_scores_content_and_format_separately():
    doc = {"answer": "-2"}
    assert scorers.sums(doc, ["6-8=<<6-8=-2>>-2\n#### -2"]) == {"accuracy": 1.0, "format_rate": 1.0}
    assert scorers.sums(doc, ["6-8=<<6-8=-2>>-2\n#### 2"]) == {"accuracy": 0.0, "format_rate": 1.0}
    assert scorers.sums(doc, ["The answer is -2."]) == {"accuracy": 1.0, "format_rate": 0.0}
    assert scorers.sums(doc, [""]) == {"accuracy": 0.0, "format_rate": 0.0}


def test_gsm8k_reads_the_reference_behind_the_mark():
    doc = {"question": "?", "answer": "80,000*1.5=<<80000*1.5=120000>>120,000\n#### 70,000"}
    worked = scorers.gsm8k(doc, ["It is 3.\n#### 70000"])
    assert worked == {"accuracy": 1.0, "last_number_accuracy": 1.0, "format_rate": 1.0}
    plain = scorers.gsm8k(doc, ["It is 70,000.00"])
    assert plain == {"accuracy": 0.0, "last_number_accuracy": 1.0, "format_rate": 0.0}


def test_a_reference_without_number_is_named():
    with pytest.raises(DataError, match="answer 'seven'"):
        scorers.last_number_accuracy({"answer": "seven"}, ["7"])


def test_choice_normalises_over_the_choices():
    result = scorers.choice({"answer": 1}, [(math.log(0.1), False), (math.log(0.3), False)])
    assert result["acc"] == 1.0
    assert result["choice_logprob"] == pytest.approx(math.log(0.75))
    assert scorers.choice({"answer": 0}, [(-1000.0, False), (-2000.0, False)])["choice_logprob"] == pytest.approx(0.0)


@pytest.mark.parametrize(("label", "expected"), [("true", 1.0), ("false", 0.0), (True, 1.0), (False, 0.0)])
def test_cluewsc_choice_a_is_yes(label: object, expected: float):
    assert scorers.cluewsc({"label": label}, [(-1.0, True), (-2.0, False)])["acc"] == expected


@pytest.mark.parametrize("answer", ["073", "73", 73, 73.0, "\\boxed{73}", "73^\\circ"])
def test_aime_answers_with_and_without_their_leading_zeros(answer: object):
    for response, score in [("so $\\boxed{73}$", 1.0), ("so \\boxed{073}", 1.0), ("\\boxed{74}", 0.0)]:
        assert scorers.aime({"answer": answer}, [response]) == {"exact_match": score}
