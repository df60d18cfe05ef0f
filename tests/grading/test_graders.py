"""Right and wrong answers for every grader, and which reference answers and recipes are refused."""

import time

import pytest

from eaft_verl.errors import ConfigError
from eaft_verl.grading.graders import GRADERS, build_grader, check_reward, checked_score, ends_in_format

PAYLOADS = [
    "__import__('os').system('touch {path}')",
    r"\boxed{{[exec('open(\"{path}\",\"w\")')]}}",
    "().__class__.__base__.__subclasses__()",
    "1/0",
    "1e999999999",
    "9**9**9**9",
    "\\boxed{{" * 1000,
    "\0\ud800",
]


@pytest.mark.parametrize(
    ("grader", "response", "answer", "score"),
    [
        ("number", "6 * 7 = 42", "42", 1),
        ("number", "#### 42\nHope this helps 100%!", "42.0", 1),
        ("number", "It is 1,000,000.", "1e6", 1),
        ("number", "It is 24", "42", 0),
        ("number", "", "42", 0),
        ("number", "no idea", "no number", 0),
        ("number", "first 42, then 43", "42", 0),
        ("exact", "  Paris. ", "paris", 1),
        ("exact", "The capital is Paris", "Paris", 0),
        ("exact", "The capital is\n#### Paris", "Paris", 1),
        ("exact", r"\boxed{\text{Paris}}", r"\text{Paris}", 1),
        ("exact", "\uff30aris", "Paris", 1),
        ("exact", "", "", 0),
        ("choice", "B", "B", 1),
        ("choice", "(b)", "B) Paris", 1),
        ("choice", "B. Paris, because", "b", 1),
        ("choice", "The answer is C, not B", "C", 1),
        ("choice", "Answer: **D**", "D", 1),
        ("choice", r"\boxed{C}", "C", 1),
        ("choice", "Because of this:\nC)", "C", 1),
        ("choice", '"B"', "B", 1),
        ("choice", "“B”", "B", 1),
        ("choice", "答：B", "B", 1),  # noqa: RUF001
        ("choice", '"A man" walks', "A", 0),
        ("choice", "A man walks", "A", 0),
        ("choice", "A and B", "B", 0),
        ("choice", "", "A", 0),
    ],
)
def test_scores(grader: str, response: str, answer: str, score: float):
    assert GRADERS[grader].score(response, answer) == score


@pytest.mark.parametrize("grader", ["number", "exact", "choice"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_of_the_model_is_never_run(grader: str, payload: str, tmp_path):
    path = tmp_path / "run"
    assert GRADERS[grader].score(payload.replace("{path}", str(path)).replace("{{", "{"), "7") == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("grader", "good", "bad"), [("number", "18", "eighteen"), ("exact", "x", " . "), ("choice", "(C)", "Paris")]
)
def test_reference_answers(grader: str, good: str, bad: str):
    assert GRADERS[grader].fault(good) == ""
    assert GRADERS[grader].fault(bad).startswith("it is ")


@pytest.mark.parametrize(
    ("response", "expected"),
    [("x\n#### 7", True), (r"so \boxed{7}.", True), (r"\boxed{7}" + "\nDone.", False), ("7", False), ("", False)],
)
def test_format(response: str, expected: bool):
    assert ends_in_format(response) is expected


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"grader": "numbr"}, "choose one of number, exact, choice, math_verify, or 'package.module:function'"),
        ({"grader": 3}, "reward.grader=3 must be text"),
        ({"grader": ""}, "must be text"),
        ({"grader": "no_such_module:f"}, "cannot be imported"),
        ({"grader": "math:no_such"}, "cannot be imported"),
        ({"grader": ":f"}, "with the whole module path"),
        ({"grader": "math:pi"}, "must be a plain function"),
        ({"grader": "os:getcwd"}, "must take .response, answer."),
        ({"format_bonus": -1}, "reward.format_bonus=-1 must be a number from 0 to 1"),
        ({"format_bonus": True}, "reward.format_bonus=True"),
        ({"seconds": 0}, "reward.seconds=0 must be a number from 0.1"),
    ],
)
def test_what_a_recipe_may_not_say(block: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_reward(**{"grader": "number", "format_bonus": 0.0, "seconds": 10.0, **block})


def test_a_grader_of_ones_own_is_found():
    assert build_grader("posixpath:join").score("a", "b") == "a/b"
    check_reward("operator:eq", 0.5, 2)


@pytest.mark.parametrize("score", ["1", None, float("nan"), 1.5, -0.1, [1]])
def test_a_score_is_a_number_from_0_to_1(score: object):
    with pytest.raises(ValueError, match="a number from 0 to 1 is expected"):
        checked_score(score)


def test_math_verify_reads_latex(tmp_path):
    pytest.importorskip("math_verify", reason="extra 'math' is not installed")
    grader = GRADERS["math_verify"]
    assert grader.score(r"so \boxed{\frac{1+x}{2}}", r"\frac{x+1}{2}") == 1
    assert grader.score(r"so \boxed{\frac{1-x}{2}}", r"\frac{x+1}{2}") == 0
    assert grader.score("It is 7", "7") == 1
    assert grader.fault("x + 1") == ""
    for payload in PAYLOADS[:3]:
        text = payload.replace("{path}", str(tmp_path / "run")).replace("{{", "{").replace("}}", "}")
        assert grader.score(text, r"\frac{x+1}{2}") == 0 and grader.score(f"${text}$", r"\frac{x+1}{2}") == 0
    assert not (tmp_path / "run").exists()


UNITS = [
    " ",
    "\n",
    "answer",
    "answer is ",
    "answer: ",
    "A, ",
    "(A ",
    "**",
    "\\boxed{",
    "####",
    "<think>",
    "1,",
    "1 or ",
    "1e9",
]
UNITS += ["\\frac{1}", "答案是", "so ( ", "option ", "x = ", "$1 ", "\\text{A} ", "¹", "- ", "wait "]


@pytest.mark.parametrize("grader", ["number", "exact", "choice"])
def test_no_answer_makes_a_grader_search_back_and_forth(grader: str) -> None:
    """20,000 characters: what takes quadratic time would take a minute; these take a tenth of a second."""
    for before in ("", "answer"):
        for unit in UNITS:
            started = time.process_time()
            GRADERS[grader].score(before + unit * (20_000 // len(unit)) + "!", "5")
            assert time.process_time() - started < 3, (before, unit)
