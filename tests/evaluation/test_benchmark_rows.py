"""Benchmark rows that could not be asked or graded are refused when they are read, with the row named."""

import json
from pathlib import Path
from typing import Any

import pytest

from eaft_verl.errors import DataError
from eaft_verl.evaluation import choices
from eaft_verl.evaluation.rows import benchmark_rows
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.evaluation.tasks import OwnTask
from eaft_verl.grading.answers import opened_thinking

MED = {"question": "Q?", "opa": "a", "opb": "b", "opc": "c", "opd": "d"}
MMLU = {"subject": "law", "question": "Q?", "choices": ["a", "b", "c", "d"]}
SUM = {"question": "Q?"}
PUBMED = {"QUESTION": "Does it?", "CONTEXTS": ["One."]}
SCHEMA = {"text": "T", "target": {"span1_text": "a", "span2_text": "b"}}
ENDED = {"ctx_a": "A", "ctx_b": "b", "activity_label": "L", "label": 0}
BLANK = {"sentence": "A _ b.", "option1": "x", "option2": "y", "answer": 1}
TRUE = {"choices": ["a", "b"], "labels": [1, 1]}
ASKED = {"key": 1, "prompt": "P", "instruction_id_list": ["punctuation:no_comma"]}


def read(task: str, tmp_path: Path, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = EvaluateSettings(target=[{"task": task, "data": str(path)}]).entries("target")[0]
    assert isinstance(entry.own, OwnTask)
    return benchmark_rows(entry, entry.own)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            "gsm8k",
            [{**SUM, "answer": "1"}, {**SUM, "answer": "seven"}],
            "row 2: answer 'seven' cannot be graded: it is",
        ),
        ("gsm8k", [{**SUM, "answer": "3 or 4"}], "row 1: answer '3 or 4'"),
        ("gsm8k", [{**SUM, "answer": True}], "row 1: 'answer' is True .bool.; expected text or a number"),
        ("gsm8k", [{**SUM, "answer": [7]}], "'answer' is .7. .list."),
        ("gsm8k", [{**SUM, "answer": "7"}, {**SUM, "answer": 7}], "values of 'answer' are not of one type"),
        ("gsm8k", [{**SUM, "answer": "7", "x": 10**30}], "values of 'x' are not of one type .* too large"),
        ("gsm8k", [{"question": ["Q?"], "answer": "7"}], "row 1: 'question' is .*list.; expected text"),
        ("gsm8k", [{"question": " ", "answer": "7"}], "row 1: 'question' is ' ' .str.; expected text, and not empty"),
        ("aime25_boxed", [{"problem": "P", "answer": True}], "'answer' is True"),
        ("aime24", [{"problem": "P", "answer": 7.5}], "answer '7.5' cannot be graded: it is no whole number"),
        ("gcd", [{**SUM, "answer": "3x"}], "row 1: answer '3x'"),
        ("aime24", [{"problem": "P", "answer": "\\sqrt{2}"}], "row 1: answer"),
        ("gsm8k", [{**SUM, "answer": "1", "id": "a"}] * 2, "rows with the same id 'a'"),
        ("gsm8k", [{**SUM, "answer": "1", "id": 1}, {**SUM, "answer": "2"}], "rows with the same id '1'"),
        ("gsm8k", [{**SUM, "answer": "1"}, SUM], "row 2 has no 'answer', as task 'gsm8k' needs; found question"),
        ("gsm8k", [], "holds no rows"),
        ("aime25", [{"answer": "1"}], "row 1 has no 'problem' or 'question', as task 'aime25' needs; found answer"),
        ("aime25_boxed", [{"answer": "1"}], "row 1 has no 'problem' or 'question'"),
        ("medmcqa_chat", [{**MED, "cop": 0}, {**MED, "cop": 4}], "cop is 0, 4: it must be 0 to 3 or 1 to 4"),
        ("medmcqa_chat", [{**MED, "cop": 1}, {**MED, "cop": 3}], "rows must show which of both"),
        (
            "medmcqa_chat",
            [{**MED, "cop": 0}, {**MED, "cop": -1}],
            "row 2: the right option is -1; of 4 options it is 0",
        ),
        ("medmcqa_chat", [{**MED, "cop": 0, "opd": ""}], "row 1: question 'Q.' has an empty option"),
        ("mmlu_chat", [{**MMLU, "answer": "E"}], "row 1: the right option is 'E'; of 4 options it is 0 to 3 or A to D"),
        ("mmlu_chat", [{**MMLU, "answer": 4}], "the right option is 4"),
        ("mmlu_chat", [{**MMLU, "answer": True}], "the right option is True"),
        ("mmlu_chat", [{**MMLU, "answer": "Paris"}], "the right option is 'Paris'"),
        ("mmlu_chat", [{**MMLU, "choices": list(map(str, range(27))), "answer": 0}], "has 27 options; 2 to 26 can"),
        ("mmlu_chat", [{**MMLU, "choices": ["a"], "answer": 0}], "has 1 options"),
        ("mmlu_chat", [{**MMLU, "choices": "abcd", "answer": 0}], "'choices' is 'abcd' .str.; expected a list of str"),
        ("mmlu", [{**MMLU, "choices": {"text": list("abcd")}, "answer": 0}], "'choices' is .* .dict."),
        ("mmlu", [{**MMLU, "subject": 3, "answer": 0}], "'subject' is '3' .int.; expected text"),
        ("medqa_chat", [{**SUM, "options": [{"A": "a"}, {"B": "b"}], "answer_idx": "B"}], "'options' is .* of str"),
        ("medmcqa_chat", [{**MED, "cop": [4]}], r"cop is \[4\]: it must be 0 to 3"),
        ("pubmedqa", [{**PUBMED, "CONTEXTS": "One.", "final_decision": "yes"}], "'CONTEXTS' is 'One.' .str."),
        ("hellaswag", [{**ENDED, "endings": "wxyz"}], "'endings' is 'wxyz'"),
        ("winogrande", [{**BLANK, "option1": 1}], "'option1' is '1' .int."),
        ("truthfulqa", [{**SUM, "mc1_targets": TRUE, "mc2_targets": TRUE}], "mc1_targets has several true choices"),
        ("mmlu", [{**MMLU, "choices": list("abcde"), "answer": 0}], "row 1: it has 5 choices; .* 4 are needed"),
        ("medqa_chat", [{"question": "Q?", "options": {"A": "a", "B": None}, "answer_idx": "B"}], "answer_idx is 'B'"),
        ("medqa_chat", [{"question": "Q?"}], "is no multiple-choice question known here"),
        ("pubmedqa_chat", [{**PUBMED, "final_decision": "perhaps"}], "final_decision is 'perhaps'; allowed: yes, no"),
        ("cluewsc", [{**SCHEMA, "label": "0"}], "label is '0'; allowed: true, false"),
        ("cluewsc_chat", [{**SCHEMA, "label": 1}], "label is 1; allowed"),
        ("cluewsc", [{**SCHEMA, "label": "true", "target": {}}], "target has no 'span1_text'"),
        ("ifeval", [{**ASKED, "kwargs": []}], "must be lists of one length"),
        ("ifeval", [{**ASKED, "kwargs": 3}], "row 1: 'kwargs' is '3' .int.; expected a list of dict"),
        ("ifeval", [{**ASKED, "instruction_id_list": "a:b", "kwargs": [{}] * 3}], "'instruction_id_list' is 'a:b'"),
    ],
)
def test_rows_that_are_refused(task: str, rows: list[dict[str, Any]], message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        read(task, tmp_path, *rows)


def test_medmcqa_counts_from_one_or_from_zero(tmp_path: Path):
    original = read("medmcqa_chat", tmp_path, *({**MED, "cop": cop} for cop in (1, 4, 2)))
    assert [choices.choice_target(row) for row in original] == ["A", "D", "B"]
    hub = read("medmcqa_chat", tmp_path, *({**MED, "cop": cop} for cop in (0, 3, 1)))
    assert [choices.choice_target(row) for row in hub] == ["A", "D", "B"]


def test_mmlu_takes_letters_and_digits(tmp_path: Path):
    rows = read("mmlu", tmp_path, *({**MMLU, "answer": answer} for answer in ("C", 2, "2", "c")))
    assert [row["answer"] for row in rows] == [2, 2, 2, 2]
    assert [choices.choice_target(row) for row in read("mmlu_chat", tmp_path, {**MMLU, "answer": "C"})] == ["C"]


def test_a_letter_for_hellaswag_and_no_arguments_for_ifeval(tmp_path: Path):
    labels = [read("hellaswag", tmp_path, {**ENDED, "endings": ["w", "x"], "label": one})[0]["label"] for one in "B1"]
    assert labels == ["1", "1"]
    assert read("ifeval", tmp_path, {**ASKED, "kwargs": [None]})[0]["kwargs"] == [{}]


def test_rows_of_several_shapes_keep_all_their_fields(tmp_path: Path):
    """A table takes its columns from its first row."""
    shapes = [{"question": "Q", "options": {"A": "a", "B": "b"}, "answer_idx": "B"}, {**MMLU, "answer": 2, "id": "x"}]
    first, second = read("medqa_chat", tmp_path, *shapes, {**MED, "cop": 0})[:2]
    assert set(first) == {*shapes[0], *shapes[1], *MED, "cop"} and first["id"] is None and second["id"] == "x"
    assert [choices.choice_target(row) for row in (first, second)] == ["B", "C"]
    assert choices.choice_text(second).startswith("Q?\nA. a\n")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("keywords:existense", {}, "row 2: unknown instruction 'keywords:existense'; IFEval has keywords:existence"),
        ("keywords:existence", {"words": ["a"]}, "row 2: the kwargs of 'keywords:existence' are not its own"),
        ("keywords:existence", {}, "row 2: the kwargs of 'keywords:existence' lack keywords"),
    ],
)
def test_instructions_that_the_scorer_does_not_know(name: str, kwargs: dict[str, Any], message: str):
    """It would fail after the answers are written, or draw words of its own."""
    import types

    from eaft_verl.evaluation.benchmarks import _check_instructions

    good = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["a"], "num_words": None}]}
    task: Any = types.SimpleNamespace(eval_docs=[good, {"instruction_id_list": [name], "kwargs": [kwargs]}])
    with pytest.raises(DataError, match=message):
        _check_instructions(task, "rows.jsonl")


def test_more_than_ten_options_in_their_order(tmp_path: Path):
    many = {"sent1": "Q?", **{f"ending{n}": f"option {n}" for n in range(12)}, "label": 11}
    row = read("medqa_chat", tmp_path, many)[0]
    assert choices.choice_text(row).count("\n") == 14 and "\nL. option 11\n" in choices.choice_text(row)
    assert choices.choice_scores(row, ["The answer is L."])["accuracy"] == 1.0
    assert choices.choice_scores(row, ["The answer is K."])["accuracy"] == 0.0


def test_answers_in_latex_are_graded_as_such(tmp_path: Path):
    pytest.importorskip("math_verify", reason="extra 'math' is not installed")
    rows = [{"problem": "P", "answer": answer} for answer in (r"(-\infty, 3)", r"\frac{\sqrt{3}}{2}", "7")]
    interval, root, seven = read("aime24_boxed", tmp_path, *rows)
    for row, response, accuracy in [
        (interval, r"\boxed{3}", 0.0),
        (interval, r"\boxed{(-\infty,3)}", 1.0),
        (root, r"so $\boxed{\frac{\sqrt3}2}$", 1.0),
        (root, r"\boxed{\frac{1}{2}}", 0.0),
        (seven, r"\boxed{7}", 1.0),
        (seven, r"\boxed{2^2+3}", 1.0),
        (seven, "<think>7", 0.0),
    ]:
        assert choices.boxed_scores(row, [response])["accuracy"] == accuracy, response
    with pytest.raises(DataError, match="row 1: answer '' cannot be graded"):
        read("aime24_boxed", tmp_path, {"problem": "P", "answer": ""})


def test_without_math_verify_latex_answers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choices, "absent_package", lambda name: "missing")
    with pytest.raises(DataError, match="math-verify is not installed: pip install 'eaft-verl.math.'"):
        read("aime24_boxed", tmp_path, {"problem": "P", "answer": r"\sqrt{2}"})
    row = read("aime24_boxed", tmp_path, {"problem": "P", "answer": "7"})[0]
    assert choices.boxed_scores(row, [r"\boxed{2^3}"])["accuracy"] == 0.0


def test_loading_refuses_before_any_model(tmp_path: Path):
    from eaft_verl.evaluation.benchmarks import load_benchmark

    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({**SUM, "answer": "1", "id": "a"}) + "\n" + json.dumps({**SUM, "answer": "2", "id": "a"})
    )
    entry = EvaluateSettings(target=[{"task": "gsm8k", "data": str(path)}]).entries("target")[0]
    with pytest.raises(DataError, match=f"{path}: task 'gsm8k' has rows with the same id 'a'"):
        load_benchmark(entry)


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("assistant\n<think>\n\n</think>\n\n", ""),
        ("assistant\n", ""),
    ],
)
def test_thinking_that_the_prompt_opens(prompt: str, opened: str, tmp_path: Path):
    from lm_eval.api.instance import Instance

    from eaft_verl.evaluation.benchmarks import load_benchmark

    assert opened_thinking(prompt) == opened
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**MMLU, "answer": 1}))
    entry = EvaluateSettings(target=[{"task": "mmlu_chat", "data": str(path)}]).entries("target")[0]
    task = load_benchmark(entry).tasks["mmlu_chat"]
    doc = next(iter(task.test_docs()))

    def scores(response: str) -> dict[str, float]:
        """As the harness has them: filters, then the scorer."""
        task._instances = [Instance("generate_until", doc, (prompt, {}), 0, resps=[response])]
        task.apply_filters()
        return task.process_results(doc, list(task.instances[0].filtered_resps.values()))

    assert scores("Answer: B")["answered"] == float(not opened)
    assert scores("Hm.</think>Answer: B")["accuracy"] == 1.0
