"""From the harness's results to records, by hand-made results and hand-computed numbers."""

import math
from typing import Any

import pytest

from eaft_verl.errors import DataError
from eaft_verl.evaluation.records import Fit, convert, mean_and_stderr

FIT = Fit(max_length=8, length=lambda text: len(text.split()))


def row(doc_id: int, metrics: dict[str, Any], filter_name: str = "none", doc: dict | None = None) -> dict[str, Any]:
    return {
        "doc_id": doc_id,
        "doc": doc or {"question": f"q{doc_id}"},
        "target": "t",
        "arguments": [(f"prompt {doc_id}", {"until": [], "max_gen_toks": 20})],
        "resps": [[f"response {doc_id}"]],
        "filter": filter_name,
        "metrics": list(metrics),
        **metrics,
    }


def results(samples: dict[str, list], reported: dict[str, dict[str, float]], better: dict[str, bool]) -> dict[str, Any]:
    return {"samples": samples, "results": reported, "higher_is_better": dict.fromkeys(samples, better)}


def test_mean_and_stderr_by_hand():
    mean, stderr = mean_and_stderr([1.0, 0.0, 1.0, 1.0])
    assert mean == 0.75
    assert stderr == pytest.approx(0.5 / math.sqrt(4))  # sample standard deviation of 1, 0, 1, 1 is 0.5
    assert mean_and_stderr([3.0]) == (3.0, None)


def test_token_weights_by_hand():
    mean, stderr = mean_and_stderr([1.0, 4.0], [2.0, 1.0])
    assert mean == pytest.approx(2.0)  # (2 * 1 + 1 * 4) / 3
    assert stderr == pytest.approx(math.sqrt(((2 * -1) ** 2 + 2**2) * 2 / 1) / 3)
    assert mean_and_stderr([1.0, 4.0], [5.0, 5.0]) == pytest.approx(mean_and_stderr([1.0, 4.0]))


def test_one_task():
    samples = {"t": [row(0, {"accuracy": 1.0}), row(1, {"accuracy": 0.0}, doc={"id": "my-id"})]}
    record, rows = convert(results(samples, {"t": {"accuracy,none": 0.5}}, {"accuracy": True}), "t", None, FIT)
    assert record["metric"] == "accuracy"
    assert record["n"] == 2
    entry = record["metrics"]["accuracy"]
    assert entry == {"score": 0.5, "stderr": pytest.approx(0.5), "higher_is_better": True}
    assert [item["id"] for item in rows] == ["0", "my-id"]
    assert rows[0] == {
        "id": "0",
        "scores": {"accuracy": 1.0},
        "prompt": "prompt 0",
        "response": "response 0",
        "target": "t",
    }


def test_hashes_change_with_prompts_and_data():
    base = {"t": [row(0, {"a": 1.0})]}
    other_doc = {"t": [row(0, {"a": 1.0}, doc={"question": "other"})]}
    other_prompt = {"t": [{**row(0, {"a": 1.0}), "arguments": [("other", {"until": []})]}]}
    records = [
        convert(results(s, {"t": {"a,none": 1.0}}, {"a": True}), "t", None, FIT)[0]
        for s in (base, other_doc, other_prompt)
    ]
    assert records[0]["prompt_hash"] == records[1]["prompt_hash"] != records[2]["prompt_hash"]
    assert records[0]["data_hash"] != records[1]["data_hash"]
    assert records[0]["data_hash"] == records[2]["data_hash"]


def test_filters_become_one_row_per_document():
    scores = [(0, 0.0, "strict"), (1, 1.0, "strict"), (0, 1.0, "loose"), (1, 1.0, "loose")]
    samples = {"t": [row(doc_id, {"m": score}, name) for doc_id, score, name in scores]}
    reported = {"t": {"m,strict": 0.5, "m,loose": 1.0}}
    record, rows = convert(results(samples, reported, {"m": True}), "t", None, FIT)
    assert record["metric"] == "m,strict"
    assert rows[0]["scores"] == {"m,strict": 0.0, "m,loose": 1.0}
    assert record["metrics"]["m,loose"]["score"] == 1.0


def test_scores_that_are_not_means_keep_the_harness_number_and_no_error():
    first = {"acc": True, "inst": [True, False], "f1": 1.0}
    second = {"acc": False, "inst": [True], "f1": 1.0}
    samples = {"t": [row(0, first), row(1, second)]}
    reported = {"t": {"acc,none": 0.5, "inst,none": 2 / 3, "f1,none": 0.9}}
    record, rows = convert(results(samples, reported, {"acc": True, "inst": True, "f1": True}), "t", None, FIT)
    assert record["metrics"]["inst"] == {"score": 2 / 3, "stderr": None, "higher_is_better": True}
    assert record["metrics"]["f1"] == {"score": 0.9, "stderr": None, "higher_is_better": True}
    assert [item["scores"] for item in rows] == [{"acc": 1.0}, {"acc": 0.0}]


def test_a_group_is_the_mean_over_all_examples():
    samples = {"g_a": [row(0, {"acc": 1.0})], "g_b": [row(0, {"acc": 0.0}), row(1, {"acc": 0.0})]}
    reported = {"g": {"acc,none": 0.5}, "g_a": {"acc,none": 1.0}, "g_b": {"acc,none": 0.0}}
    record, rows = convert(results(samples, reported, {"acc": True}), "g", None, FIT)
    assert record["metrics"]["acc"]["score"] == pytest.approx(1 / 3)
    assert record["n"] == 3
    assert [item["id"] for item in rows] == ["g_a:0", "g_b:0", "g_b:1"]


def test_multiple_choice_keeps_the_log_probabilities():
    sample = row(0, {"acc": 1.0}) | {
        "arguments": [("prompt", "A"), ("prompt", "B")],
        "resps": [[(-2.0, False)], [(-1.0, True)]],
    }
    _, rows = convert(results({"t": [sample]}, {"t": {"acc,none": 1.0}}, {"acc": True}), "t", None, FIT)
    assert rows[0]["response"] == "B"
    assert rows[0]["logprobs"] == {"A": -2.0, "B": -1.0}


def test_cut_answers_are_marked_and_counted():
    rows = [row(0, {"a": 1.0}), row(1, {"a": 0.0}), row(2, {"a": 0.0})]
    rows[1]["resps"] = [["seven words are one fewer than eight"]]
    rows[2]["resps"] = [["these are all of the eight words allowed"]]
    for one in rows:
        one["arguments"] = [("a prompt", {"until": [], "max_gen_toks": 8})]
    record, samples = convert(results({"t": rows}, {"t": {"a,none": 1 / 3}}, {"a": True}), "t", None, FIT)
    assert [sample.get("truncated") for sample in samples] == [None, None, "answer"]
    assert record["truncated"] == {"prompts": 0, "answers": 1}


def test_a_prompt_that_is_shortened_for_one_choice_is_counted_once():
    rows = [row(number, {"a": 1.0}) | {"resps": [[(-2.0, False)], [(-1.0, True)]]} for number in range(2)]
    rows[0]["arguments"] = [("six words and the choices make", " nine here exactly"), ("six words and so on", " C")]
    rows[1]["arguments"] = [("one more word than in the other", " nine here exactly"), ("six words", " C")]
    record, samples = convert(results({"t": rows}, {"t": {"a,none": 1.0}}, {"a": True}), "t", None, FIT)
    assert [sample.get("truncated") for sample in samples] == [None, "prompt"]  # the ninth is scored, not fed
    assert record["truncated"] == {"prompts": 1, "answers": 0}


def test_equal_ids_are_refused():
    samples = {"t": [row(0, {"a": 1.0}, doc={"id": "x"}), row(1, {"a": 1.0}, doc={"id": "x"})]}
    with pytest.raises(DataError, match="same id"):
        convert(results(samples, {"t": {"a,none": 1.0}}, {"a": True}), "t", None, FIT)
