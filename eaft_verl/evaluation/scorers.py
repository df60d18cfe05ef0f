"""Scores of one answer: pure functions of text, compared exactly as rational numbers.

Each `process_results` function has lm-evaluation-harness's signature: (doc, results) -> {metric: score}. Answers are
read by `grading.answers`, as rewards are.
"""

import math
from typing import Any

from eaft_verl.errors import DataError
from eaft_verl.evaluation.choices import cluewsc_target, right_index, right_of
from eaft_verl.grading.answers import ends_in_marked_number, final_number, marked_number, only_number, said
from eaft_verl.grading.numbers import Number


def _reference(doc: dict[str, Any]) -> Number:
    """The number that `answer` is, or that follows '####' in a worked solution."""
    if value := only_number(str(doc["answer"])):
        return value
    shown = str(doc["answer"])[:60]
    raise DataError(f"answer {shown!r} of question {str(doc)[:80]!r} is no number; expected '7' or '... #### 7'")


def _equal(found: Number | None, doc: dict[str, Any]) -> float:
    wanted = _reference(doc)
    return float(found is not None and found.equals(wanted))


def last_number_accuracy(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{accuracy}: 1 if the number the answer gives, marked, stated or its last, equals the reference."""
    return {"accuracy": _equal(final_number(said(results[0])), doc)}


def sums(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{accuracy, format_rate}: number right; answer line in the taught format."""
    return {**last_number_accuracy(doc, results), "format_rate": float(ends_in_marked_number(said(results[0])))}


def gsm8k(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{accuracy, last_number_accuracy, format_rate}: accuracy counts only a number after '####'."""
    return {
        "accuracy": _equal(marked_number(said(results[0])), doc),
        "last_number_accuracy": last_number_accuracy(doc, results)["accuracy"],
        "format_rate": float(ends_in_marked_number(said(results[0]))),
    }


def aime(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{exact_match}: the harness's, which compares texts, on the reference as AIME prints it, 073, and on 73."""
    from lm_eval.tasks.aime.utils import process_results

    whole = str(_reference(doc).value)
    forms = ({"answer": whole}, {"answer": whole.zfill(3)})
    return {"exact_match": float(any(process_results(form, results)["exact_match"] for form in forms))}


def choice(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """{acc, choice_logprob} of a multiple-choice question whose right choice is doc['answer'], an index or a letter.

    choice_logprob = log p(right) - log sum over choices p(choice), nats: it moves before the accuracy of a small model,
    which is at chance, does.
    """
    scores = [score for score, _ in results]
    right = right_index(doc["answer"], len(scores))
    best = max(scores)
    total = best + math.log(sum(math.exp(score - best) for score in scores))
    return {"acc": float(scores.index(best) == right), "choice_logprob": scores[right] - total}


def cluewsc(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """{acc, choice_logprob}: choice A says that both spans mean the same, choice B that they do not."""
    return choice({"answer": cluewsc_target(doc)}, results)


def options(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """{acc, choice_logprob} of a row of any of the shapes of `choices.options_of`."""
    return choice({"answer": right_of(doc)}, results)


def truthfulqa(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """{mc2, mc1}: the share of probability on true answers, of the answers behind MC1's; MC1's likeliest one is true.

    mc2 = sum over true a of p(a) / sum over all a of p(a) (Lin et al. 2022, arXiv 2109.07958).
    """
    scores = [score for score, _ in results]
    count = len(doc["mc1_targets"]["choices"])
    first, second = scores[:count], scores[count:]
    best = max(second)
    mass = [math.exp(score - best) for score in second]
    true = math.fsum(p for p, label in zip(mass, doc["mc2_targets"]["labels"], strict=True) if label == 1)
    right = doc["mc1_targets"]["labels"].index(1)
    return {"mc2": true / math.fsum(mass), "mc1": float(first.index(max(first)) == right)}
