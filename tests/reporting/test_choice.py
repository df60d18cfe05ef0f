"""The rule decides as by hand, and the stated probability is how often such a choice is right."""

import numpy as np
import pytest
from reporting.fake_runs import STEPS, edit, make_arm, make_base

from eaft_verl.pages.statistics import jointly_over_seeds, resampled_means
from eaft_verl.recipe.choose import Rule, rule_of
from eaft_verl.reporting.answer import answer
from eaft_verl.reporting.choice import NONE, Candidates, choice
from eaft_verl.reporting.collect import load
from eaft_verl.reporting.measures import build_board
from eaft_verl.reporting.results import columns


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice")
    runs = [make_base(folder / "base")]
    runs += [make_arm(folder / f"{arm}-seed{seed}", arm, seed) for arm in ("sft", "eaft") for seed in (0, 1)]
    base, arms = load(runs)
    return build_board(base, arms, resamples=500, seed=0), [run for arm in arms for run in arm.runs]


def decided(board, rule):
    found = choice(board[0], rule, board[1], seed=0)
    said = {"choice": found, "columns": columns(board[0]), "seeds": {"sft": [0, 1]}, "paths": {}}
    return found, " ".join(answer(said))


def test_the_best_within_the_bound_by_hand(board):
    """KL over two seeds is 1.05 times the curve: SFT 3, EAFT 3 and 6 are below 0.09; NLL 1.005, 1.065, .915."""
    found, said = decided(board, Rule("kl", 0.09, "heldout"))
    assert (found["chosen"]["arm"], found["chosen"]["step"], found["allowed"], found["candidates"]) == ("eaft", 6, 3, 8)
    assert found["chosen"]["gain"] == pytest.approx(1.60 - 0.915 + 0.005, abs=0.006)
    assert found["chosen"]["cost"] == pytest.approx(0.075 * 1.05)
    assert found["chosen"]["run"] == "eaft-seed0" and found["chosen"]["checkpoint"] == "checkpoints/step_000006"
    assert said.startswith("Ship EAFT, step 6, seed 0: lowest held-out NLL 0.9")
    assert 0 <= found["probability"] <= found["bound_probability"] <= 1
    assert all(run.label in said for run in board[1]) and "recorded no rule" in said  # it was made up afterwards


def test_points_of_the_general_mean_bound_the_loss(board):
    """General means move -17.5, -16.25, -20 ... points; see the sums of ifeval and mmlu in the fake runs."""
    found, said = decided(board, Rule("general", -1.0, "target"))
    assert found["chosen"]["arm"] == "eaft" and found["chosen"]["cost"] <= 1.0 + 1e-9
    assert "lose at most 1 point of the general mean" in said


def test_where_none_qualifies_the_closest_is_named(board):
    found, said = decided(board, Rule("kl", 1e-4, "heldout"))
    assert found["chosen"] is None and found["closest"]["arm"] == "eaft" and found["closest"]["step"] == STEPS[0]
    assert said.startswith("Ship none: of 8 checkpoints none") and "Closest: EAFT, step 3" in said
    assert found["probability"] > 0.9  # two seeds bound nothing tightly: Student's t with one degree of freedom


def test_a_measure_that_is_not_there_cannot_be_judged(board):
    found, said = decided(board, Rule("task_kl", 1.0, "heldout"))
    assert found["unjudged"] == "the runs have no drift_task.kl" and said.startswith("Nothing is chosen")


def test_without_a_rule_nothing_is_recommended(board):
    found, said = decided(board, None)
    assert found["rule"] is None and said.startswith("No checkpoint is recommended")


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ({"sft": (0.9, 0.05)}, "At the end SFT: held-out NLL 0.900, KL to base 0.050."),
        ({"sft": (0.9, 0.02), "eaft": (1.1, 0.03)}, "At the end SFT learnt most and moved least (held-out NLL 0.900"),
        ({"sft": (0.9, 0.05), "eaft": (1.1, 0.03)}, "At the end SFT learnt most (held-out NLL 0.900, KL to base"),
    ],
)
def test_what_the_ends_were_is_said_without_a_rule(board, ends, words):
    """Of one arm there is no most and no least."""
    paths = {"heldout": {arm: [{"x": 2.0, "kl": 0.0}, {"x": x, "kl": kl}] for arm, (x, kl) in ends.items()}}
    said = {"choice": {"rule": None}, "columns": columns(board[0]), "seeds": {"sft": [0]}, "paths": paths}
    assert " ".join(answer(said)).startswith(words)


def test_a_recorded_rule_is_no_change(tmp_path):
    runs = [make_base(tmp_path / "base"), make_arm(tmp_path / "sft-seed0", "sft")]
    for name in ("config.yaml", ".config.yaml"):
        file = runs[1] / name
        file.write_text(file.read_text() + "choose: {forget_at_most: {kl: 0.07}, by: heldout}\n")
    base, arms = load(runs)
    made = build_board(base, arms, resamples=50, seed=0)
    rule = rule_of({"forget_at_most": {"kl": 0.07}})
    assert choice(made, rule, arms[0].runs, 0)["changed"] == []
    other = choice(made, Rule("kl", 0.5, "heldout"), arms[0].runs, 0)
    assert other["changed"] == ["sft seed 0 recorded forget_at_most kl 0.07, by heldout"]


def test_scores_without_examples_have_no_probability(tmp_path):
    runs = [make_base(tmp_path / "base"), make_arm(tmp_path / "sft-seed0", "sft")]
    edit(
        runs[1] / "eval" / "step_000003" / "heldout.json",
        lambda r: {**r, "metrics": {"nll": {**r["metrics"]["nll"], "score": 0.5}}},
    )
    base, arms = load(runs)
    found = choice(build_board(base, arms, resamples=50, seed=0), Rule("kl", 0.07, "heldout"), arms[0].runs, 0)
    assert found["chosen"]["step"] == 3 and found["probability"] is None


def problem(rng, seeds):
    """(candidates as measured and resampled, true gains, true costs) of one made-up comparison.

    True scores are far apart compared with the noise of 60 examples, so that little is known of them beforehand.
    """
    number, arms, points = 60, 3, 2
    gain, cost = rng.normal(0, 0.6, (arms, points)), rng.normal(0, 0.6, (arms, points))
    parts = []
    level_N = rng.normal(0, 1, (2, number))  # examples that are hard are so for every model
    for arm in range(arms):
        seed_S = rng.normal(0, 0.15, (2, points, seeds)) if seeds > 1 else np.zeros((2, points, seeds))
        truth = np.stack([gain[arm], cost[arm]])[:, :, None] + seed_S
        noise = rng.normal(0, 1, (number, 2, points, seeds))
        values = truth[None] + 0.0 * level_N.T[:, :, None, None] + noise
        flat = values.reshape(number, -1)
        draws = resampled_means(flat, np.ones(number), 250, rng)
        both = np.concatenate([flat.mean(axis=0)[None], draws]).reshape(251, 2 * points, seeds)
        parts.append(jointly_over_seeds(np.swapaxes(both, 1, 2), rng))
    gains, costs = (np.hstack([part[:, i * points : (i + 1) * points] for part in parts]) for i in (0, 1))
    return Candidates([], gains, costs, 0.0), gain.ravel(), cost.ravel()


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_stated_probability_is_how_often_the_choice_is_right(seeds):
    rng = np.random.default_rng(seeds)
    stated, right, allowed, within = [], [], [], []
    for _ in range(500):
        candidates, gain, cost = problem(rng, seeds)
        decided_R, meets_RC = candidates.decide(), candidates.meets()
        truly = Candidates([], gain[None], cost[None], 0.0).decide()[0]
        stated.append((decided_R[1:] == decided_R[0]).mean())
        right.append(truly == decided_R[0])
        if decided_R[0] != NONE:
            allowed.append(meets_RC[1:, decided_R[0]].mean())
            within.append(cost[decided_R[0]] <= 0 < gain[decided_R[0]])
    for said, was in ((stated, right), (allowed, within)):
        said, was = np.array(said), np.array(was, float)
        assert said.mean() == pytest.approx(was.mean(), abs=4 * 0.5 / np.sqrt(len(said)))
        for low, high in ((0.3, 0.6), (0.6, 0.85), (0.85, 1.01)):
            chosen = (said >= low) & (said < high)
            spread = np.sqrt(max(0.02, said[chosen].mean() * (1 - said[chosen].mean())) / max(1, chosen.sum()))
            assert chosen.sum() > 15 and abs(was[chosen].mean() - said[chosen].mean()) < 0.03 + 3 * spread, (low, high)
