"""Answers as models write and mark them, read by hand."""

import time
from fractions import Fraction

import pytest

from eaft_verl.grading.answers import final_number, last_box, marked_answer, only_number, said, stated
from eaft_verl.grading.letters import letter_of
from eaft_verl.grading.numbers import Number


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{{{7}}}", "{{7}}"),
        (r"\boxed{}", ""),
        (r"\boxed{7", None),
        (r"\boxed{1} \boxed{7", None),
        (r"\boxed 7", None),
        ("7", None),
    ],
)
def test_last_box(text: str, box: str | None):
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("so\n#### 72", "72"),
        ("#### 1\n#### 2\nthat is it", "2"),
        (r"#### 1" + "\n" + r"\boxed{2}", "2"),
        (r"\boxed{2}" + "\n#### 1", "1"),
        ("####", ""),
        (r"\boxed{7", ""),
        ("7", None),
    ],
)
def test_marked_answer(text: str, marked: str | None):
    assert marked_answer(text) == marked


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4+3=<<4+3=7>>7\n#### 7", 7),
        ("#### 7 apples, not 8", 7),
        ("#### $1,234.50\nDone in 3 steps.", Fraction(2469, 2)),
        ("The answer is 7.", 7),
        ("It is \N{MINUS SIGN}7", -7),
        ("6 / 8 is 3/4", Fraction(3, 4)),
        ("It is 3/4.", Fraction(3, 4)),
        ("It is 3/4.5", Fraction(2, 3)),
        ("1e3", 1000),
        ("2.5e-3", Fraction(1, 400)),
        (r"$\frac{3}{4}$", Fraction(3, 4)),
        (r"\boxed{\dfrac{-3}{4}}", Fraction(-3, 4)),
        (r"\boxed{-\tfrac34}", Fraction(-3, 4)),
        (r"\boxed{1{,}234}", 1234),
        (r"\boxed{1\,234}", 1234),
        (r"\boxed{\$5}", 5),
        (r"\boxed{x = 5}", 5),
        (r"\boxed{7 \text{ apples}}", 7),
        (r"\boxed{60^\circ}", 60),
        (r"\boxed{60^{\circ}}", 60),
        (r"\boxed{\boxed{7}}", 7),
        # an unreadable or ambiguous box is no answer, whatever numbers stand around it
        (r"7, so \boxed{2^{10}}", None),
        (r"\boxed{3 + 4}", None),
        (r"\boxed{3, 4}", None),
        (r"\boxed{2\sqrt{3}}", None),
        (r"7 \boxed{}", None),
        (r"7 \boxed{8", None),
        # hostile
        ("__import__('os').system('x')", None),
        ("1/0", None),
        ("1e999999999", None),
        ("-1e-999999999", None),
        ("9" * 5000, None),
        ("9**9**9", None),
        ("\u0667", None),
        ("", None),
    ],
)
def test_final_number(text: str, value: int | Fraction | None):
    found = final_number(text)
    assert (found and found.value) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        (" $1,234 ", 1234),
        ("18 apples", 18),
        ("worked 3 * 6\n#### 18", 18),
        ("-3/4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        ("3 or 4", None),
        ("10:30", None),
        ("2^10", None),
        ("3 * x", None),
        ("seven", None),
        ("", None),
    ],
)
def test_only_number(text: str, value: int | Fraction | None):
    found = only_number(text)
    assert (found and found.value) == value


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [("50%", "50 %", True), ("50%", "50", True), ("50%", "0.5", True), ("50%", "0.5%", False), ("50", "0.5", False)],
)
def test_percentages(one: str, other: str, equal: bool):
    left, right = only_number(one), only_number(other)
    assert left.equals(right) is right.equals(left) is equal


def test_a_percent_sign_belongs_to_the_last_number_only():
    assert final_number("50% of 8 is 4") == Number(Fraction(4))
    assert final_number(r"\boxed{50\%}") == Number(Fraction(50), percent=True)


READERS = [said, stated, final_number, only_number, marked_answer, last_box, letter_of]
PIECES = [
    *(
        "1e",
        "1,",
        "-",
        r"\boxed{",
        "#### ",
        r"\frac{1",
        "1/",
        "{",
        "9",
        "1.1",
        "(A",
        "answer ",
        "answer\n",
        "answer: ",
        " ",
    ),
    *(
        "\n",
        "A",
        "A ",
        "A, ",
        "is A ",
        "(",
        "$",
        "$1",
        "$ ",
        "**",
        "_",
        "*a",
        r"\text{",
        r"\(",
        r"\\",
        "<think>",
        "</think>",
    ),
    *(
        "<answer>",
        "<<",
        "x = ",
        "1, 1 and ",
        "1 and ",
        "11,",
        "1 000 ",
        "1\u2009000",
        r"\overline{1}",
        "^{",
        "\u00bd",
        "####1\n",
    ),
    *(
        "答案是",
        "选",
        ", B",
        "so ",
        "option A ",
        "A is ",
        "\u00b2",
        "~",
        "1 1/2 ",
        r"1 \frac12",
        "#### x\n",
        "1 (1",
        "1: ",
    ),
]


def seconds(text: str) -> float:
    started = time.process_time()
    for read in READERS:
        read(text)
    return time.process_time() - started


@pytest.mark.parametrize("piece", PIECES)
def test_hostile_text_is_read_in_linear_time(piece: str):
    short, long = ((piece * (size // len(piece) + 1))[:size] for size in (12_500, 100_000))
    # 8 times the text: linear work takes 8 times as long, quadratic 64 times; the constant is the clock's noise.
    assert min(seconds(long) for _ in range(2)) < 24 * min(seconds(short) for _ in range(3)) + 0.2
