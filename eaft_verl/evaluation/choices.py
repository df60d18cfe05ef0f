"""Benchmarks asked as a chat: the model writes, and what it settles on counts. Works for models that think first.

Functions with a `doc` have lm-evaluation-harness's signatures and take the fields of the data sets' usual copies.
"""

import re
import string
from typing import Any

from eaft_verl.errors import DataError
from eaft_verl.grading.answers import final_number, only_number, said
from eaft_verl.grading.graders import absent_package, choice, number
from eaft_verl.grading.letters import letter_of
from eaft_verl.grading.process import GradingProcess

LETTERS = string.ascii_uppercase
_INSTRUCTION = "Answer with the letter of the right option, as the last line: Answer: X"
_BOXED_LETTER = 'Answer with the option\'s letter from the given choices and put the letter in one "\\boxed{}".'
_OPTION = str | int | float | None
_VERDICTS = ("yes", "no", "maybe")
_CLUEWSC = {"true": "A", "false": "B"}
_CLUEWSC_WORDS = {"是": "A", "是的": "A", "否": "B", "不是": "B"}
_CLUEWSC_WORD = re.compile(rf"\W*({'|'.join(_CLUEWSC_WORDS)})(?!\w)")
_MATH = GradingProcess("math_verify")  # starts with the first answer that is no number


def options_of(doc: dict[str, Any]) -> tuple[str, list[str], int]:
    """(question, options, index of the right one) of a multiple-choice row.

    Accepted: question with options {A: text, ...} or [text, ...] and answer_idx; question with choices and answer
    (MMLU); question with opa..opd and cop counted from 0 (MedMCQA on the hub); sent1 with ending0.. and label (MedQA);
    QUESTION with CONTEXTS and final_decision (PubMedQA). The right one is an index from 0 or a letter.
    Raises DataError naming the fields found in any other row, and for a right option that is none of the options.
    """
    doc = {name: value for name, value in doc.items() if value is not None}
    if "options" in doc and "answer_idx" in doc:
        return _lettered(doc)
    if "choices" in doc:
        return _checked(doc["question"], list_of(doc, "choices", _OPTION), doc["answer"])
    if "opa" in doc:
        return _checked(doc["question"], [doc[f"op{letter}"] for letter in "abcd"], doc["cop"])
    if "ending0" in doc:
        endings = sorted((key for key in doc if key.startswith("ending")), key=lambda key: int(key[len("ending") :]))
        question = " ".join(filter(None, (doc["sent1"], doc.get("sent2"))))
        return _checked(question, [doc[key] for key in endings if doc[key] is not None], doc["label"])
    if "final_decision" in doc:
        verdict, abstract = str(doc["final_decision"]).lower(), "\n".join(list_of(doc, "CONTEXTS", str))
        if verdict not in _VERDICTS:
            raise DataError(f"final_decision is {doc['final_decision']!r}; allowed: {', '.join(_VERDICTS)}")
        return f"{abstract}\n\n{doc['QUESTION']}", list(_VERDICTS), _VERDICTS.index(verdict)
    raise DataError(f"a row with {', '.join(sorted(doc))} is no multiple-choice question known here; see `options_of`")


def _lettered(doc: dict[str, Any]) -> tuple[str, list[str], int]:
    if isinstance(doc["options"], list):
        return _checked(doc["question"], list_of(doc, "options", _OPTION), doc["answer_idx"])
    named = {letter: option for letter, option in sorted(doc["options"].items()) if option is not None}
    if doc["answer_idx"] not in named:
        raise DataError(f"answer_idx is {doc['answer_idx']!r}; allowed: {', '.join(named)}")
    return _checked(doc["question"], list(named.values()), list(named).index(doc["answer_idx"]))


def _checked(question: str, options: list[str], right: object) -> tuple[str, list[str], int]:
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"question {question[:60]!r} has {len(options)} options; 2 to {len(LETTERS)} can be asked")
    if any(option is None or not str(option).strip() for option in options):
        raise DataError(f"question {question[:60]!r} has an empty option; give every option a text")
    return question, options, right_index(right, len(options))


def list_of(doc: dict[str, Any], name: str, kind: Any) -> list[Any]:
    """doc[name], a list of values of this type; else DataError: the letters of a text are none."""
    value = doc[name]
    if not isinstance(value, list | tuple) or not all(isinstance(one, kind) for one in value):
        wanted = kind.__name__ if isinstance(kind, type) else kind
        raise DataError(f"{name!r} is {str(value)[:60]!r} ({type(value).__name__}); expected a list of {wanted}")
    return list(value)


def right_index(right: object, count: int) -> int:
    """The index of the right option of `count`, given as an index from 0 (7 or '7') or as a letter; else DataError."""
    if isinstance(right, str) and len(right.strip()) == 1 and right.strip().upper() in LETTERS:
        index = LETTERS.index(right.strip().upper())
    elif isinstance(right, int | str) and not isinstance(right, bool) and str(right).strip().isdecimal():
        index = int(right)
    else:
        index = -1
    if not 0 <= index < count:
        raise DataError(
            f"the right option is {right!r}; of {count} options it is 0 to {count - 1} or A to {LETTERS[count - 1]}"
        )
    return index


def choice_text(doc: dict[str, Any]) -> str:
    """The question, its options under letters, and what to answer with."""
    question, options, _ = options_of(doc)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question.strip()}\n{listed}\n\n{_INSTRUCTION}"


def medical_text(doc: dict[str, Any]) -> str:
    """MedEvalKit's question for models that reason (question_formats.py, MedQA_USMLE, MedMCQA, PubMedQA there)."""
    question, options, _ = options_of(doc)
    gap = "" if "final_decision" in doc else " "
    listed = "\n".join(f"{letter}.{gap}{option}" for letter, option in zip(LETTERS, options, strict=False))
    context = ""
    if "final_decision" in doc:
        question, context = doc["QUESTION"], "Context: " + "\n".join(doc["CONTEXTS"]) + "\n"
    return f"{context}\nQuestion: {question}\nOptions: \n{listed}\n{_BOXED_LETTER}"


def exam_text(doc: dict[str, Any]) -> str:
    """The question and its options under letters, for the likelihood of the letter, as the harness's medqa_4options."""
    return _exam(doc, "")


def listed_text(doc: dict[str, Any]) -> str:
    """As `exam_text`, with the line that the harness's medmcqa has before the options."""
    return _exam(doc, "Choices:\n")


def _exam(doc: dict[str, Any], heading: str) -> str:
    question, options, _ = options_of(doc)
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
    return f"Question: {question}\n{heading}{listed}Answer:"


def letters_of(doc: dict[str, Any]) -> list[str]:
    """The letters of the options."""
    return list(LETTERS[: len(options_of(doc)[1])])


def right_of(doc: dict[str, Any]) -> int:
    """The index of the right option."""
    return options_of(doc)[2]


def choice_target(doc: dict[str, Any]) -> str:
    """The letter of the right option."""
    return LETTERS[options_of(doc)[2]]


def choice_scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{accuracy, answered}: the letter settled on is right; thinking came to an end, if there was any."""
    return {"accuracy": choice(results[0], choice_target(doc)), "answered": _answered(results[0])}


def _answered(response: str) -> float:
    return float(bool(said(response).strip()))


def cluewsc_text(doc: dict[str, Any]) -> str:
    """OpenCompass's question (FewCLUE_cluewsc_gen_c68933, quotation marks as there)."""
    first, second = doc["target"]["span1_text"], doc["target"]["span2_text"]
    return f"{doc['text']}\n此处，“{second}”是否指代“{first}“？\nA. 是\nB. 否\n请从”A“，”B“中进行选择。\n答："  # noqa: RUF001


def cluewsc_target(doc: dict[str, Any]) -> str:
    """A where both spans mean the same, else B; DataError where the label is neither true nor false."""
    label = str(doc["label"]).lower()
    if label not in _CLUEWSC:
        raise DataError(f"label is {doc['label']!r}; allowed: true, false")
    return _CLUEWSC[label]


def cluewsc_scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{accuracy, answered} as `choice_scores`; an answer without a letter counts by the 是 or 否 it begins with."""
    text = said(results[0])
    word = _CLUEWSC_WORD.match(text)
    letter = letter_of(text) or (word and _CLUEWSC_WORDS[word[1]])
    return {"accuracy": float(letter == cluewsc_target(doc)), "answered": _answered(results[0])}


def boxed_text(doc: dict[str, Any]) -> str:
    """The problem with Qwen2.5-Math's zero-shot instruction, in the user's turn."""
    if not (problem := doc.get("problem") or doc.get("question")):
        raise DataError(f"a row with {', '.join(sorted(doc))} has neither a problem nor a question")
    return f"{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def boxed_scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{accuracy, answered}: what the last box, '####' or else the text gives as its answer equals the reference.

    Numbers are compared here; where either is none, math-verify does it, in its process, where it is installed.
    """
    answer, text = str(doc["answer"]), said(results[0])
    numbers = only_number(answer) is not None and (final_number(text) is not None or absent_package("math_verify"))
    accuracy = number(text, answer) if numbers or not text.strip() else _MATH.grade(text, answer).score
    return {"accuracy": accuracy, "answered": _answered(results[0])}


def boxed_fault(doc: dict[str, Any]) -> str:
    """Why a row's answer cannot be graded by `boxed_scores`, '' if it can."""
    if only_number(str(doc["answer"])):
        return ""
    if absent_package("math_verify"):
        return "it is no number, and for LaTeX math-verify is not installed: pip install 'eaft-verl[math]'"
    return _MATH.answer_fault(str(doc["answer"]))
