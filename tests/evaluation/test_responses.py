"""Benchmarks on saved answers whose right score is stated beside them, without the code under test."""

import itertools
import json
import random
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted

from eaft_verl.errors import ConfigError
from eaft_verl.evaluation import harness
from eaft_verl.evaluation.benchmarks import load_benchmark
from eaft_verl.evaluation.responses import STOPS, counts_of, pass_at_k
from eaft_verl.evaluation.tasks import parse_entries

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(("total", "right"), [(1, 0), (1, 1), (4, 2), (5, 1), (6, 0), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(total: int, right: int):
    for k in range(1, total + 1):
        draws = list(itertools.combinations([1] * right + [0] * (total - right), k))
        assert pass_at_k(total, right, k) == pytest.approx(float(Fraction(sum(map(any, draws)), len(draws))))


def test_pass_at_k_is_unbiased():
    """Over many sets of 8 answers that are right with p = 0.3, its mean is the chance of one right in 4: 1 - 0.7^4."""
    rng = random.Random(0)
    sets = [sum(rng.random() < 0.3 for _ in range(8)) for _ in range(20_000)]
    assert sum(pass_at_k(8, right, 4) for right in sets) / len(sets) == pytest.approx(1 - 0.7**4, abs=0.006)


def test_counts_of():
    assert [counts_of(n) for n in (1, 2, 3, 6, 8)] == [[], [2], [2, 3], [2, 4, 6], [2, 4, 8]]


def run(language: Scripted, entry: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (parsed,) = parse_entries([entry])
    benchmark = load_benchmark(parsed)
    harness.give_room(language, benchmark)
    return harness.run_benchmarks(language, [benchmark])[0]


def rows_file(folder: Path, rows: list[dict]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def shared(name: str, count: int) -> list[dict]:
    if not (SHARED / name).is_file():
        pytest.skip("needs the benchmark's rows, which are not part of the project")
    with (SHARED / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, count)]


def test_several_answers_by_hand(tmp_path: Path):
    """Two questions, four answers each: 3 right of 4, 0 of 4. avg@4 = 3/8; pass@2 = (1 + 0)/2; pass@4 the same."""
    data = rows_file(
        tmp_path, [{"id": "a", "problem": "One?", "answer": "1"}, {"id": "b", "problem": "Two?", "answer": "2"}]
    )
    said = {
        "One?": ["\\boxed{1}", "It is 1.", "\\boxed{3}", "<think>3</think>\\boxed{1}"],
        "Two?": ["5", "", "6", "x " * 90],
    }

    def answer(prompt: str, number: int) -> str:
        return next(texts[number] for question, texts in said.items() if question in prompt)

    language = Scripted(answer)
    language.max_length = 200
    record, samples = run(
        language, {"task": "aime24_boxed", "data": data, "samples": 4, "temperature": 0.6, "top_p": 0.95}
    )
    assert {name: entry["score"] for name, entry in record["metrics"].items()} == {
        "accuracy": 3 / 8, "answered": 7 / 8, "pass@2": 0.5, "pass@4": 0.5,
    }  # fmt: skip
    assert record["metrics"]["accuracy"]["stderr"] == pytest.approx(0.375)  # of two questions: 3/4 and 0
    assert [sample["scores"]["accuracy"] for sample in samples] == [0.75, 0.0]
    assert (record["n"], record["answers"], record["truncated"]["answers"]) == (2, 8, 1)
    assert record["truncation_rate"] == 1 / 8
    assert samples[0]["responses"] == said["One?"] and samples[0]["response"] == said["One?"][0]
    assert {(s["temperature"], s["top_p"], s["do_sample"]) for s in language.settings} == {(0.6, 0.95, True)}


def letter(row: dict) -> str:
    return row["answer_idx"] if "answer_idx" in row else "ABCD"[row["answer"]]


def verdict(row: dict) -> str:
    return {"yes": "A", "no": "B", "maybe": "C"}[row["final_decision"]]


def truth(row: dict) -> str:
    return {"true": "A", "false": "B"}[str(row["label"]).lower()]


def number(row: dict) -> str:
    return str(row["answer"]).rpartition("####")[2].strip()


def another(text: str) -> str:
    return str(int(re.sub(r"\D", "", text)) + 1) if text[-1].isdigit() else {"A": "B"}.get(text, "A")


@pytest.mark.parametrize(
    ("task", "file", "right", "form"),
    [
        ("aime24", "aime/aime24.jsonl", number, "so $\\boxed{%s}$"),
        ("aime24_boxed", "aime/aime24.jsonl", number, "so \\boxed{%s}."),
        ("aime25_boxed", "aime/aime25.jsonl", number, "so \\boxed{%s}."),
        ("gsm8k", "gsm8k/test_dev.jsonl", number, "3 + 4.\n#### %s"),
        ("gsm8k_boxed", "gsm8k/test_dev.jsonl", number, "so \\boxed{%s}."),
        ("mmlu_chat", "mmlu/test_20_per_subject.jsonl", letter, "Answer: %s"),
        ("medqa_chat", "medqa/test_4opt.jsonl", letter, "so \\boxed{%s}"),
        ("medmcqa_chat", "medmcqa/test_1000.jsonl", letter, "so \\boxed{%s}"),
        ("pubmedqa_chat", "pubmedqa/pqal_test.jsonl", verdict, "so \\boxed{%s}"),
        ("cluewsc_chat", "cluewsc/test_public_dev.jsonl", truth, "Answer: %s"),
    ],
)
def test_written_answers_by_hand(task: str, file: str, right: Any, form: str, tmp_path: Path):
    """Right; wrong; right behind a thought of wrong; wrong behind a thought of right; thought and never said; right."""
    rows = shared(file, 6)
    truths = [right(row) for row in rows]
    good, bad = [form % text for text in truths], [form % another(text) for text in truths]
    texts = [good[0], bad[1], f"<think>{bad[2]}</think>\n\n{good[2]}", f"<think>{good[3]}</think>\n\n{bad[3]}"]
    texts += [f"<think>{good[4]}", good[5]]
    order = iter(texts)
    record, samples = run(
        Scripted(lambda prompt, number: next(order)), {"task": task, "data": rows_file(tmp_path, rows)}
    )
    assert [sample["scores"][record["metric"]] for sample in samples] == [1, 0, 1, 0, 0, 1]
    assert record["metrics"][record["metric"]]["score"] == pytest.approx(0.5)
    assert [sample["response"] for sample in samples] == texts


HELLASWAG = {
    "ctx_a": "A man sits.",
    "ctx_b": "he",
    "activity_label": "Roof",
    "endings": ["w", "xx", "y", "z"],
    "label": "1",
}
TRUTHFUL = {
    "question": "Is water wet?",
    "mc1_targets": {"choices": ["yes", "no"], "labels": [1, 0]},
    "mc2_targets": {"choices": ["yes", "sure", "no"], "labels": [1, 1, 0]},
}


@pytest.mark.parametrize(
    ("task", "file", "right"),
    [
        ("mmlu", "mmlu/test_20_per_subject.jsonl", letter),
        ("medqa", "medqa/test_4opt.jsonl", letter),
        ("medmcqa", "medmcqa/test_1000.jsonl", letter),
        ("pubmedqa", "pubmedqa/pqal_test.jsonl", lambda row: row["final_decision"]),
        ("cluewsc", "cluewsc/test_public_dev.jsonl", truth),
    ],
)
def test_weighed_answers_by_hand(task: str, file: str, right: Any, tmp_path: Path):
    """The right one likeliest for every other question."""
    rows = shared(file, 6)
    prompts: list[str] = []

    def weight(prompt: str, choice: str) -> float:
        if prompt not in prompts:
            prompts.append(prompt)
        number = len(prompts) - 1
        return -1.0 if (choice.strip() == right(rows[number])) == (number % 2 == 0) else -2.0

    _, samples = run(Scripted(weights=weight), {"task": task, "data": rows_file(tmp_path, rows)})
    assert [sample["scores"]["acc"] for sample in samples] == [1, 0, 1, 0, 1, 0]


def test_winogrande_hellaswag_truthfulqa_by_hand(tmp_path: Path):
    """hellaswag: -4 of four... the right ending has two characters: -2 is -1 a character, the others -1.5."""
    weights = {"w": -1.5, "xx": -2.0, "y": -1.6, "z": -1.7}
    record, _ = run(
        Scripted(weights=lambda prompt, choice: weights[choice.strip()]),
        {"task": "hellaswag", "data": rows_file(tmp_path, [HELLASWAG])},
    )
    assert {name: entry["score"] for name, entry in record["metrics"].items()} == {"acc_norm": 1.0, "acc": 0.0}
    blank = {"sentence": "Ann fed Bea because _ was hungry.", "option1": "Ann", "option2": "Bea", "answer": "2"}
    record, samples = run(
        Scripted(weights=lambda prompt, choice: -1.0 if "because Bea" in prompt else -3.0),
        {"task": "winogrande", "data": rows_file(tmp_path, [blank])},
    )
    assert record["metrics"]["acc"]["score"] == 1.0
    assert "because Bea" in samples[0]["response"] and len(samples[0]["logprobs"]) == 2
    # p = 1/2, 1/4, 1/4: true mass 3/4; MC1 takes yes
    mass = {"yes": -0.6931471805599453, "sure": -1.3862943611198906, "no": -1.3862943611198906}
    record, _ = run(
        Scripted(weights=lambda prompt, choice: mass[choice.strip()]),
        {"task": "truthfulqa", "data": rows_file(tmp_path, [TRUTHFUL])},
    )
    assert {name: entry["score"] for name, entry in record["metrics"].items()} == {
        "mc2": pytest.approx(0.75),
        "mc1": 1.0,
    }


def test_ifeval_is_scored_as_the_harness_scores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Plain answers get lm-eval's own scores; the first row's is checked by hand; thoughts do not count."""
    rows = shared("ifeval/input_data_dev.jsonl", 40)
    monkeypatch.setenv("NLTK_DATA", str(SHARED / "nltk_data"))
    import nltk

    nltk.data.path.insert(0, str(SHARED / "nltk_data"))
    from lm_eval.tasks.ifeval.utils import process_results

    texts = [f"First, {row['prompt']}\n\nSecond part * {n}." for n, row in enumerate(rows)]
    texts[0] = "Thou shalt go to Kyoto and then to Nara"  # no comma is asked for
    order = iter(texts)
    data = rows_file(tmp_path, rows)
    _, samples = run(Scripted(lambda prompt, number: next(order)), {"task": "ifeval", "data": data})
    for row, text, sample in zip(rows, texts, samples, strict=True):
        random.seed(0)
        assert sample["scores"]["prompt_level_strict_acc"] == float(
            process_results(row, [text])["prompt_level_strict_acc"]
        )
    assert rows[0]["instruction_id_list"] == ["punctuation:no_comma"]
    one = rows_file(tmp_path, rows[:1])
    for text, score in (("No comma", 1), ("A, comma", 0), ("<think>A, B</think>\n\nNone", 1), ("<think>Never said", 0)):
        _, (sample,) = run(Scripted(lambda prompt, number, text=text: text), {"task": "ifeval", "data": one})
        assert sample["scores"]["prompt_level_strict_acc"] == score, text


LONG = "every word of this answer is written in small letters as the question has asked"
KEPT_AND_BROKEN = [  # (instruction, its arguments, an answer that keeps it, one that does not), by IFEval's own words
    ("punctuation:no_comma", {}, "No comma", "A, comma"),
    ("length_constraints:number_words", {"num_words": 5, "relation": "at least"}, "a b c d e", "a b c d"),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"},
     "I am. So.", "I am. You are. We go."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\nTwo", "One\n\nTwo"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "dog"},
     "A cat\n\nDog days", "A cat\n\nCat days"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", "* one"),
    ("detectable_format:title", {}, "<<My day>>\nIt was fine.", "My day"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", "*one*"),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     "Section 1\nOne\nSection 2\nTwo", "Section 1\nOne"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi\nP.S. Bye", "Hi"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [place]", "[name]"),
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "A cat and a dog", "A cat"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A dog; a catalogue", "A cat"),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, "cat, Cat", "cat"),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "less than"}, "quiet", "Quick q"),
    ("change_case:english_lowercase", {}, LONG, LONG.title()),
    ("change_case:english_capital", {}, LONG.upper(), LONG),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "YES, NO", "Yes"),
    ("startend:end_checker", {"end_phrase": "The end."}, "Once. The end.", "The end. Or not"),
    ("startend:quotation", {}, '"Hi"', "Hi"),
    ("combination:two_responses", {}, "One\n******\nTwo", "One\n******\nOne"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. I say it.", "I say it."),
    ("language:response_language", {"language": "de"}, "Das ist ein ganz gewöhnlicher deutscher Satz.", LONG),
]  # fmt: skip


def test_ifeval_s_verdicts_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shared("ifeval/input_data_dev.jsonl", 1)
    monkeypatch.setenv("NLTK_DATA", str(SHARED / "nltk_data"))
    import nltk

    nltk.data.path.insert(0, str(SHARED / "nltk_data"))
    rows = [
        {"key": n, "prompt": f"Do {name}.", "instruction_id_list": [name], "kwargs": [given]}
        for n, (name, given, _, _) in enumerate(KEPT_AND_BROKEN)
    ]
    data = rows_file(tmp_path, rows)
    for column, score in ((2, 1.0), (3, 0.0)):
        order = iter([f"<think>{LONG}, *</think>{row[column]}" for row in KEPT_AND_BROKEN])
        record, samples = run(
            Scripted(lambda prompt, number, order=order: next(order)), {"task": "ifeval", "data": data}
        )
        found = [sample["scores"]["prompt_level_strict_acc"] for sample in samples]
        assert [row[0] for row, one in zip(KEPT_AND_BROKEN, found, strict=True) if one != score] == []
        assert record["metrics"]["inst_level_strict_acc"]["score"] == score


def test_a_model_without_a_template_is_asked_in_plain_text(tmp_path: Path):
    assert harness.plain_chat([{"role": "user", "content": "2 + 2?"}]) == "Question: 2 + 2?\nAnswer:"
    shots = [("user", "1 + 1?"), ("assistant", "2"), ("user", "Question: 3?\nAnswer:")]
    history = [{"role": role, "content": text} for role, text in shots]
    assert harness.plain_chat(history) == "Question: 1 + 1?\nAnswer: 2\n\nQuestion: 3?\nAnswer:"
    turns = [("system", " Be brief.\n"), ("user", "{{ 1 }}是？"), ("assistant", "a\n\nb"), ("user", "答：")]  # noqa: RUF001
    history = [{"role": role, "content": text} for role, text in turns]
    assert harness.plain_chat(history) == "Be brief.\n\nQuestion: {{ 1 }}是？\nAnswer: a\n\nb\n\n答："  # noqa: RUF001
    data = rows_file(tmp_path, [{"question": "2 + 2?", "answer": "4"}])
    language = Scripted(lambda prompt, number: " It is 4." if prompt.endswith("\nAnswer:") else "?", template=False)
    vars(language)["apply_chat_template"] = harness.plain_chat
    record, _ = run(language, {"task": "gsm8k_boxed", "data": data})
    assert record["metrics"]["accuracy"]["score"] == 1.0
    assert language.settings[0]["until"] == STOPS
    rows = rows_file(tmp_path, [{"subject": "law", "question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 1}])
    seen: list[tuple[str, str]] = []
    plain = Scripted(weights=lambda prompt, choice: seen.append((prompt, choice)) or -1.0, template=False)
    vars(plain)["apply_chat_template"] = harness.plain_chat
    run(plain, {"task": "mmlu", "data": rows})
    assert seen[1] == (seen[0][0], " B") and seen[0][0].endswith("\nD. d\nAnswer:")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"task": "sums", "samples": 0}, "samples is 0"),
        ({"task": "sums", "samples": 4}, "samples without a temperature"),
        ({"task": "sums", "top_p": 0.9}, "top_p without a temperature"),
        ({"task": "sums", "new_tokens": 0}, "new_tokens is 0; expected a positive number of tokens"),
        ({"task": "sums", "new_tokens": True}, "new_tokens is True"),
        ({"task": "sums", "new_tokens": 64.0}, "new_tokens is 64.0"),
        ({"task": "sums", "limit": 0}, "limit is 0; expected a positive number of examples"),
        ({"task": "sums", "temperature": 0}, "temperature is 0; expected a number above 0"),
        ({"task": "sums", "temperature": 0.6, "top_p": 1.5}, "top_p is 1.5"),
        ({"task": "bfcl_v3", "temperature": 0.6}, "asked as bfcl-eval asks"),
        ({"task": "bfcl_v3", "data": "x.jsonl"}, "asked as bfcl-eval asks"),
        ("cluewsc", "CLUEbenchmark/FewCLUE"),
    ],
)
def test_what_cannot_be_sampled_is_refused(entry: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_entries([entry])


def test_what_a_model_writes_is_never_run(tmp_path: Path):
    lines = ["task: runs", "output_type: generate_until", "test_split: test", "doc_to_text: '{{question}}'"]
    lines += [
        "doc_to_target: '1'",
        "unsafe_code: true",
        f"tasks: {{runs: {{data: {rows_file(tmp_path, [{'question': 'Q'}])}}}}}",
    ]
    (tmp_path / "runs.yaml").write_text("\n".join(lines))
    (entry,) = parse_entries([str(tmp_path / "runs.yaml")])
    with pytest.raises(ConfigError, match="runs the code that the model writes, which is never done here"):
        load_benchmark(entry)


def test_likelihoods_are_not_sampled(tmp_path: Path):
    data = rows_file(tmp_path, [TRUTHFUL])
    for given in ({"samples": 2, "temperature": 1.0}, {"new_tokens": 20}):
        (entry,) = parse_entries([{"task": "truthfulqa", "data": data, **given}])
        with pytest.raises(ConfigError, match="writes none: leave out samples"):
            load_benchmark(entry)


def test_an_answer_may_be_no_longer_than_asked_or_than_its_prompt_leaves(tmp_path: Path):
    """Of gsm8k's 512 tokens: 30 where 30 are asked, all but the prompt where the model takes no more."""
    data = rows_file(tmp_path, [{"question": "2 + 2?", "answer": "4"}])
    for asked, most in ((30, 30), (400, None), (None, None)):
        language = Scripted(lambda prompt, number: "No, " * 200)
        language.max_length = 200
        record, (sample,) = run(language, {"task": "gsm8k", "data": data, "new_tokens": asked})
        room = language.max_length - len(language.tok_encode(sample["prompt"]))
        assert language.settings[0]["max_gen_toks"] == (most or room)
        assert sample["truncated"] == "answer" and record["truncation_rate"] == 1
