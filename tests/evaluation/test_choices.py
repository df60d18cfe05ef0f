"""Benchmarks asked as a chat: rows of every shape, and answers as models write them."""

import json
from pathlib import Path

import pytest

from eaft_verl.errors import DataError
from eaft_verl.evaluation import choices
from eaft_verl.evaluation.questions import benchmark_questions
from eaft_verl.evaluation.settings import EvaluateSettings

SHARED = Path(__file__).parents[3] / "shared" / "data"
ROWS = [
    {"question": "Q?", "options": {"A": "a", "B": "b", "C": "c", "D": None}, "answer_idx": "B"},
    {"question": "Q?", "choices": ["a", "b", "c"], "answer": 1, "subject": "law"},
    {"question": "Q?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 1},
    {"sent1": "Q?", "sent2": "", "ending0": "a", "ending1": "b", "ending2": "c", "ending3": "d", "label": 1},
]
PUBMED = {"QUESTION": "Does it?", "CONTEXTS": ["One.", "Two."], "final_decision": "no"}
WINOGRAD = {"text": "T", "target": {"span1_text": "苏小姐", "span2_text": "他"}, "label": "false"}


@pytest.mark.parametrize("row", ROWS)
def test_shapes_of_multiple_choice(row):
    question, options, right = choices.options_of(row)
    assert (question, options[:3], right) == ("Q?", ["a", "b", "c"], 1)
    assert choices.choice_text(row).startswith("Q?\nA. a\nB. b\nC. c\n")
    assert choices.choice_text(row).endswith("Answer with the letter of the right option, as the last line: Answer: X")
    assert choices.choice_target(row) == "B"


def test_pubmedqa_gives_the_abstract_and_three_verdicts():
    text = choices.choice_text(PUBMED)
    assert text.startswith("One.\nTwo.\n\nDoes it?\nA. yes\nB. no\nC. maybe\n") and choices.choice_target(PUBMED) == "B"
    with pytest.raises(DataError, match="a row with a, b is no multiple-choice question"):
        choices.options_of({"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("response", "accuracy", "answered"),
    [
        ("Answer: B", 1.0, 1.0),
        ("It cannot be A, so\nAnswer: B", 1.0, 1.0),
        ("I lean to A.\n</think>\n\nAnswer: B", 1.0, 1.0),
        ("Answer: B\n</think>\n\nAnswer: C", 0.0, 1.0),
        ("Answer: B</think>", 0.0, 0.0),  # thought, never said
        ("A man came.", 0.0, 1.0),
        ("", 0.0, 0.0),
    ],
)
def test_what_is_said_after_thinking_counts(response, accuracy, answered):
    assert choices.choice_scores(ROWS[0], [response]) == {"accuracy": accuracy, "answered": answered}


@pytest.mark.parametrize(
    ("response", "accuracy"),
    [
        *((text, 1.0) for text in ("B", "否", "“否”。", "不是。", "否，“他”指代别人。", "答：B")),  # noqa: RUF001
        *((text, 0.0) for text in ("A", "是", "是的", "否定词不算", "")),
    ],
)
def test_cluewsc_by_letter_or_word(response, accuracy):
    assert choices.cluewsc_scores(WINOGRAD, [response])["accuracy"] == accuracy
    assert "“他”是否指代“苏小姐“？" in choices.cluewsc_text(WINOGRAD)  # noqa: RUF001


@pytest.mark.parametrize(
    ("answer", "response", "accuracy"),
    [
        ("025", "so \\boxed{25}", 1.0),
        (204, "\\boxed{204} minutes", 1.0),
        ("3+4=<<3+4=7>>7\n#### 7", "It is 7.", 1.0),
        ("7", "5 and then \\boxed{8}, not 7", 0.0),
        ("7", "\\boxed{7}</think>I give up", 0.0),
    ],
)
def test_boxed_numbers(answer, response, accuracy):
    assert choices.boxed_scores({"answer": answer}, [response])["accuracy"] == accuracy


def test_boxed_question_under_either_name():
    text = "P\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert choices.boxed_text({"problem": "P"}) == choices.boxed_text({"question": "P"}) == text
    with pytest.raises(DataError, match="neither a problem nor a question"):
        choices.boxed_text({"answer": "1"})


def test_their_questions_are_known_to_the_leakage_check(tmp_path: Path):
    entries = []
    for name, row in (("medqa_chat", ROWS[3]), ("medmcqa_chat", ROWS[0]), ("pubmedqa_chat", PUBMED)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        entries.append({"task": name, "data": str(path)})
    known, _ = benchmark_questions(EvaluateSettings(target=entries))
    assert known == {"medqa_chat": ["Q?"], "medmcqa_chat": ["Q?"], "pubmedqa_chat": ["Does it?"]}


def test_what_winogrande_and_hellaswag_ask_is_known_too_and_bfcl_is_not(tmp_path: Path):
    rows = {"winogrande": {"sentence": "Ann fed _."}, "hellaswag": {"ctx_a": "A", "ctx_b": "b", "ctx": "A b"}}
    entries: list = ["bfcl_v3"]
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        entries.append({"task": name, "data": str(tmp_path / f"{name}.jsonl")})
    known, unknown = benchmark_questions(EvaluateSettings(general=entries))
    assert known == {"winogrande": ["Ann fed _."], "hellaswag": ["A b"]}
    assert list(unknown) == ["bfcl_v3"] and "within bfcl-eval" in unknown["bfcl_v3"]


def test_medical_questions_are_asked_as_medevalkit_asks():
    """Its two forms, written out: a space behind the letter, and PubMedQA's without, after the abstract."""
    end = '\nAnswer with the option\'s letter from the given choices and put the letter in one "\\boxed{}".'
    assert choices.medical_text(ROWS[0]) == "\nQuestion: Q?\nOptions: \nA. a\nB. b\nC. c" + end
    asked = "Context: One.\nTwo.\n\nQuestion: Does it?\nOptions: \nA.yes\nB.no\nC.maybe" + end
    assert choices.medical_text(PUBMED) == asked


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("medmcqa_chat", "medmcqa/test_1000.jsonl"),
        ("medqa_chat", "medqa/test_4opt.jsonl"),
        ("pubmedqa_chat", "pubmedqa/pqal_test.jsonl"),
        ("mmlu_chat", "mmlu/test_20_per_subject.jsonl"),
        ("cluewsc_chat", "cluewsc/test_public_dev.jsonl"),
        ("gsm8k_boxed", "gsm8k/test_dev.jsonl"),
        ("aime24_boxed", "aime/aime24.jsonl"),
        ("aime25_boxed", "aime/aime25.jsonl"),
    ],
)
def test_real_files_load_and_their_own_answers_score(task: str, file: str):
    if not (SHARED / file).is_file():
        pytest.skip("needs the benchmark's rows, which are not part of the project")
    from eaft_verl.evaluation.benchmarks import load_benchmark

    entry = EvaluateSettings(target=[{"task": task, "data": str(SHARED / file)}]).entries("target")[0]
    benchmark = load_benchmark(entry)
    harness_task = benchmark.tasks[task]
    docs = list(harness_task.test_docs())
    assert len(docs) >= 30
    for doc in docs[:200]:
        assert len(harness_task.doc_to_text(doc)) > 20
        right = harness_task.doc_to_target(doc)
        answer = f"\\boxed{{{str(right).rpartition('####')[2]}}}" if "boxed" in task else f"Answer: {right}"
        assert harness_task.process_results(doc, [f"Hm.</think>{answer}"])["accuracy"] == 1.0, (doc, answer)
