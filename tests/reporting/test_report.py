"""The report of three fake runs against numbers worked out by hand from their shapes."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from reporting.fake_runs import STEPS, make_runs

from eaft_verl.reporting.collect import load
from eaft_verl.reporting.report import measure, report


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    runs = make_runs(folder)
    return report(runs, folder / "report"), folder


@pytest.fixture(scope="module")
def found(made):
    return made[0]


@pytest.fixture(scope="module")
def stored(made):
    return json.loads((made[1] / "report" / "report.json").read_text())


def test_report_json_holds_what_is_returned(found, stored):
    assert stored == json.loads(json.dumps(found))


def test_scores_and_means_by_hand(stored):
    sft, eaft, base = (stored["results"][name] for name in ("sft", "eaft", "base"))
    assert sft["chain_sum"]["score"] == 28 / 40
    assert base["target_mean"]["score"] == pytest.approx((16 / 40 + 2 / 40) / 2)
    assert sft["target_mean"]["score"] == pytest.approx((28 / 40 + 7 / 40) / 2)
    assert sft["target_mean"]["delta"]["delta"] == pytest.approx(0.4375 - 0.225)
    assert eaft["general_mean"]["delta"]["delta"] == pytest.approx((10 + 14 - 12 - 14) / 80)
    assert eaft["heldout"]["delta"]["delta"] == pytest.approx(0.93 - 1.60)
    assert sft["drift.kl"]["score"] == 0.21
    assert sft["drift.agreement"]["score"] == pytest.approx(1 - 0.5 * 0.21)
    assert base["drift.kl"]["score"] == 0.0
    assert sft["chain_sum"]["stderr"] == pytest.approx(np.sqrt(0.7 * 0.3 / 40))


def test_columns_are_in_table_order_and_keep_losses_out_of_means(stored):
    columns = {column["id"]: column for column in stored["columns"]}
    assert list(columns) == [
        *("chain_sum", "gsm8k", "target_mean", "heldout", "ifeval", "mmlu", "general_mean"),
        *("drift.kl", "drift.agreement", "drift.nll"),
    ]
    assert columns["target_mean"]["members"] == ["chain_sum", "gsm8k"]
    assert (columns["chain_sum"]["n"], columns["heldout"]["n"]) == (40, 24)


def scores(folder, arm, name, step):
    rows = (folder / arm / "samples" / f"step_{step:06d}" / f"{name}.jsonl").read_text().splitlines()
    return {row["id"]: row["scores"]["exact_match"] for row in map(json.loads, rows)}


def bootstrap(differences):
    """An independent paired bootstrap: a plain loop over resamples."""
    draw = np.random.default_rng(5)
    means = [np.mean(draw.choice(differences, len(differences))) for _ in range(4000)]
    return np.percentile(means, [2.5, 97.5])


@pytest.mark.parametrize("name", ["chain_sum", "mmlu"])
def test_intervals_agree_with_an_independent_bootstrap(made, name):
    base, arm = scores(made[1], "base", name, 0), scores(made[1], "eaft", name, 12)
    low, high = bootstrap(np.array([arm[key] - base[key] for key in base]))
    delta = made[0]["results"]["eaft"][name]["delta"]
    assert delta["low"] == pytest.approx(low, abs=1 / 40)
    assert delta["high"] == pytest.approx(high, abs=1 / 40)


def test_the_mean_resamples_each_benchmark_on_its_own(made):
    results = made[0]["results"]["sft"]
    # independent benchmarks: the variances of their bootstrap distributions add up
    widths = [results[name]["delta"]["high"] - results[name]["delta"]["low"] for name in ("chain_sum", "gsm8k")]
    mean = results["target_mean"]["delta"]
    assert mean["high"] - mean["low"] == pytest.approx(np.hypot(*widths) / 2, rel=0.1)


def test_arms_with_equal_answers_differ_by_nothing(stored):
    assert stored["versus"]["reference"] == "sft"
    gsm8k = stored["versus"]["arms"]["eaft"]["gsm8k"]  # both 7 of 40, the same examples
    assert (gsm8k["delta"], gsm8k["low"], gsm8k["high"], gsm8k["excludes_zero"]) == (0, 0, 0, False)
    kl = stored["versus"]["arms"]["eaft"]["drift.kl"]
    assert kl["delta"] == pytest.approx(-0.06)
    assert kl["excludes_zero"]


def test_paths_start_at_the_base_and_visit_every_evaluation(stored):
    path = stored["paths"]["heldout"]["eaft"]
    assert [point["step"] for point in path] == [0, *STEPS]
    assert [point["x"] for point in path] == [1.60, 1.06, 0.91, 0.89, 0.93]
    assert [point["kl"] for point in path] == [0.0, 0.035, 0.075, 0.115, 0.15]


def test_forgetting_at_equal_gain_by_hand(stored):
    gain = stored["equal_gain"]["heldout"]
    assert gain["common_gain"] == pytest.approx(1.60 - 0.89)  # sft reaches 0.72, eaft 0.71
    half, three_quarters, full = gain["levels"]
    # by step 3 sft gained 0.60 and eaft 0.54: half of 0.71 and three quarters of it lie before that
    assert half["arms"] == three_quarters["arms"] == {"sft": {"withheld": True}, "eaft": {"withheld": True}}
    share = (0.71 - 0.60) / 0.12  # of the way from step 3 to step 6
    assert full["arms"]["sft"]["kl"] == pytest.approx((0.05**0.5 + (0.10**0.5 - 0.05**0.5) * share) ** 2)
    assert full["arms"]["sft"]["step"] == pytest.approx(3 + 3 * share)
    assert (full["arms"]["eaft"]["kl"], full["arms"]["eaft"]["step"]) == pytest.approx((0.115, 9))
    apart = full["arms"]["eaft"]["difference"]
    assert 0 < apart["low"] < apart["delta"] < apart["high"]
    assert apart["excludes_zero"] and apart["unmarked"] == "seeds"  # one seed says nothing of the chance of training


def test_pareto_by_hand(stored):
    # general, target: base 32.5, 22.5; sft 23.75, 43.75; eaft 30, 45: eaft dominates sft
    assert {point["arm"]: point["efficient"] for point in stored["pareto"]} == {
        "base": True,
        "sft": False,
        "eaft": True,
    }


def test_curves_keep_gaps(stored):
    sft, eaft = stored["curves"]
    assert sft["train"]["loss"][4] is None  # logged as nan
    assert eaft["train"]["entropy"][3] is None  # not logged at all
    assert len(eaft["train"]["nll"]) == 12
    assert eaft["val"]["step"] == list(STEPS)
    assert eaft["val"]["tokens"] == [600 * step for step in STEPS]
    assert any("not finite at step 5" in line for line in stored["caveats"])


def test_cost_config_and_environment(stored):
    sft = stored["cost"][0]
    assert (sft["steps"], sft["tokens"], sft["train_seconds"], sft["eval_seconds"]) == (12, 7200, 120, 60.25)
    assert (sft["tokens_per_s"], sft["memory_gib"]) == (60, 4.5 + 0.12)
    (row,) = stored["config_differences"]
    assert (row["key"], row["declared"]) == ("objective.name", True)
    assert stored["environment"]["equal"]["packages.verl"] == "0.9.1"
    assert stored["environment"]["differing"]["hostname"] == {
        "base": "node1",
        "sft seed 0": "node3",
        "eaft seed 0": "node4",
    }
    assert stored["environment"]["runs"]["sft seed 0"] == "../sft"


def test_samples_show_where_arms_differ_first(stored):
    chain_sum, gsm8k = stored["samples"]
    assert chain_sum["benchmark"] == "chain_sum"
    first = chain_sum["examples"][0]["answers"]
    assert first["sft"]["score"] != first["eaft"]["score"]
    assert len(chain_sum["examples"]) == 3
    assert all(
        len({e["answers"][arm]["score"] for arm in ("sft", "eaft")}) == 1 for e in gsm8k["examples"]
    )  # the arms never differ there, so these differ from the base
    assert all(len(a["text"]) <= 300 for s in stored["samples"] for e in s["examples"] for a in e["answers"].values())


def test_the_same_seed_gives_the_same_report(made, tmp_path):
    _, folder = made
    runs = [folder / name for name in ("base", "sft", "eaft")]
    again = report(runs, tmp_path / "report")
    names = ("report.html", "report.md", "figures/pareto.png")
    assert all((tmp_path / "report" / name).exists() for name in names)
    assert (tmp_path / "report" / "figures" / "pareto.png").read_bytes() == (
        folder / "report" / "figures" / "pareto.png"
    ).read_bytes()
    assert again["results"] == made[0]["results"]
    assert again["equal_gain"] == made[0]["equal_gain"]
    base, arms = load(runs)
    other = measure(base, arms, tmp_path, problems=[], seed=1)
    assert (
        other["results"]["sft"]["chain_sum"]["delta"]["delta"] == again["results"]["sft"]["chain_sum"]["delta"]["delta"]
    )
    assert other["results"]["sft"]["heldout"] != again["results"]["sft"]["heldout"]


def test_importing_the_report_needs_neither_torch_nor_matplotlib():
    heavy = "('torch', 'matplotlib', 'verl', 'ray')"
    code = f"import sys, eaft_verl.reporting.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_figures_are_png_files(made):
    figures = sorted(path.name for path in (made[1] / "report" / "figures").iterdir())
    assert figures == sorted(
        f"{name}.png"
        for name in (
            "deltas",
            "path_heldout",
            "path_target",
            "general_step",
            "general_kl",
            "pareto",
            "curves_step",
            "curves_tokens",
            "curves_seconds",
        )
    )
    assert all((made[1] / "report" / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in figures)


def test_nothing_temporary_is_left(made):
    assert sorted(path.name for path in (made[1] / "report").iterdir()) == [
        *("figures", "questions.jsonl", "report.html", "report.json", "report.md"),
    ]
    assert not re.search(r"\bnan\b", (made[1] / "report" / "report.md").read_text())
