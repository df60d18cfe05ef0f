"""Questions lost and gained by hand, what guessing explains of them by simulation, and their text."""

import numpy as np
import pytest
from reporting.fake_runs import edit_samples, make_arm, make_base
from scipy.stats import binomtest

from eaft_verl.reporting.collect import load
from eaft_verl.reporting.forgetting_tables import token_drift_table, transitions_table
from eaft_verl.reporting.token_drift import token_drift
from eaft_verl.reporting.transitions import guessed_flips, lost_questions, question_paths, transitions


@pytest.fixture
def made(tmp_path):
    base, *arms = [make_base(tmp_path / "base"), make_arm(tmp_path / "sft-seed0", "sft")]
    return base, arms[0], tmp_path


def scores(folder, step, name, right):
    edit_samples(
        folder / "samples" / f"step_{step:06d}" / f"{name}.jsonl",
        lambda rows: [{**row, "scores": {"exact_match": float(i in right)}} for i, row in enumerate(rows)],
    )


def test_lost_and_gained_by_hand(made):
    base, arm, _ = made
    scores(base, 0, "mmlu", set(range(0, 20)))
    scores(arm, 12, "mmlu", set(range(11, 23)))  # 11 of the first 20 lost, 3 gained
    row = next(row for row in transitions(*load([base, arm])) if row["benchmark"] == "mmlu")
    assert (row["n"], row["lost"], row["gained"], row["chance"]) == (40, 11, 3, None)
    assert row["p"] == pytest.approx(binomtest(3, 14, 0.5).pvalue)
    assert row["unmarked"] == "holm"  # .057 by itself already


def test_marks_need_to_survive_the_table(made):
    base, arm, _ = made
    scores(base, 0, "mmlu", set(range(0, 20)))
    scores(arm, 12, "mmlu", set())
    found = {row["benchmark"]: row for row in transitions(*load([base, arm]))}
    assert found["mmlu"]["unmarked"] is None and found["gsm8k"]["unmarked"] == "holm"
    table = transitions_table({"transitions": list(found.values())})
    lost = next(row for row in table.rows if row[0].text.startswith("mmlu"))[2]
    assert (lost.text, lost.mark) == ("20", "worse")
    assert [cell.text for cell in table.header] == ["", "Questions", "Lost", "Gained", "Exact p"]  # none had choices


def test_the_mark_stands_at_what_it_says(made):
    base, arm, _ = made
    scores(base, 0, "mmlu", {0})
    scores(arm, 12, "mmlu", set(range(1, 25)))
    row = next(row for row in transitions(*load([base, arm])) if row["benchmark"] == "mmlu")
    cells = transitions_table({"transitions": [{**row, "chance": 0.5}]}).rows[0]
    assert [(cell.text, cell.mark) for cell in cells[2:6]] == [("1", ""), ("24", "better"), ("0.5", ""), ("0.5", "")]


def test_scores_between_right_and_wrong_have_no_transitions(made):
    base, arm, _ = made
    edit_samples(
        arm / "samples" / "step_000012" / "mmlu.jsonl",
        lambda rows: [{**row, "scores": {"exact_match": 0.5}} for row in rows],
    )
    assert "mmlu" not in {row["benchmark"] for row in transitions(*load([base, arm]))}


def test_what_guessing_explains_is_what_guessing_models_do():
    """Two models know the same questions and guess at the others, anew each time."""
    rng = np.random.default_rng(0)
    choices = rng.choice([2, 4, 5], 400)
    known = rng.random(400) < 0.35
    flips, foretold = [], []
    for _ in range(2000):
        before, after = (known | (rng.random(400) < 1 / choices) for _ in range(2))
        flips.append((before & ~after).sum())
        foretold.append(guessed_flips(choices.tolist(), before.mean(), after.mean()))
    assert np.mean(foretold) == pytest.approx(np.mean(flips), rel=0.04)
    assert guessed_flips([4] * 10, 1.0, 1.0) == 0 and guessed_flips([1] * 3, 0.0, 0.0) == 0
    assert guessed_flips([4] * 16, 0.25, 0.25) == pytest.approx(16 * 3 / 16)  # nothing known: 1/4 right, 3/4 of it lost


def test_choices_are_counted_from_their_log_probabilities(made):
    base, arm, _ = made
    for folder, step in ((base, 0), (arm, 12)):
        edit_samples(
            folder / "samples" / f"step_{step:06d}" / "mmlu.jsonl",
            lambda rows: [{**row, "logprobs": {"A": -1.0, "B": -2.0, "C": -2.0, "D": -2.0}} for row in rows],
        )
    scores(base, 0, "mmlu", set(range(20)))
    scores(arm, 12, "mmlu", set(range(10)))
    row = next(row for row in transitions(*load([base, arm])) if row["benchmark"] == "mmlu")
    assert row["chance"] == pytest.approx((1 - 0.5) / 0.75 * 40 * 3 / 16)


def test_lost_questions_show_both_answers_and_the_right_one(made):
    base, arm, _ = made
    scores(base, 0, "mmlu", set(range(40)))
    scores(arm, 12, "mmlu", set(range(5, 40)))
    found = next(row for row in lost_questions(*load([base, arm])) if row["benchmark"] == "mmlu")
    assert (found["arm"], found["lost"], len(found["examples"])) == ("sft", 5, 5)
    assert {"id", "prompt", "target", "before", "after"} == found["examples"][0].keys()
    assert found["examples"][0]["target"] == "7" and "after 12 steps" in found["examples"][0]["after"]


def test_every_question_is_followed_along_the_path(made):
    base, arm, _ = made
    rows = {row["id"]: row for row in question_paths(*load([base, arm])) if row["benchmark"] == "gsm8k"}
    assert len(rows) == 40 and len({row["question"] for row in rows.values()}) == 40
    one = rows["gsm8k-000"]["paths"]
    assert one.keys() == {"base", "sft seed 0"} and one["sft seed 0"].keys() == {"3", "6", "9", "12"}


def test_the_spread_over_tokens_by_hand(made):
    base, arm, _ = made
    rng = np.random.default_rng(1)
    kept = {}

    def give(rows):
        for row in rows:
            row["kl_T"] = kept[row["id"]] = rng.gamma(0.3, size=row["tokens"]).tolist()
        return rows

    edit_samples(arm / "samples" / "step_000012" / "drift.jsonl", give)
    (row,) = token_drift(load([base, arm])[1], seed=0)
    every = np.concatenate(list(kept.values()))
    assert row["tokens"] == len(every) and row["text"] == "drift"
    known = np.quantile(every, (0.5, 0.95, 0.99), method="inverted_cdf")
    assert [item["value"] for item in row["quantiles"]] == pytest.approx(known)
    assert all(item["low"] <= item["value"] <= item["high"] for item in row["quantiles"])
    assert len(token_drift_table({"token_drift": [row]}).rows[0]) == 6
