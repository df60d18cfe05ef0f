"""Budgets, controls, failed runs and arms that generate, as the report states them; numbers from the fake runs."""

import json
import shutil

import pytest
from reporting.fake_runs import edit, make_arm, make_base, make_runs

from eaft_verl.errors import RunError
from eaft_verl.reporting.collect import load
from eaft_verl.reporting.comparability import check
from eaft_verl.reporting.report import measure, report
from eaft_verl.reporting.spending import budgets, unequal
from eaft_verl.reporting.tables import budgets_table, config_table, cost_table, results_table

SLOW = {"of": "eaft", "by": "nll", "run": "eaft-seed0", "level": 0.25, "window": 2}
STOPPED = {"of": "eaft", "by": "nll", "run": "eaft-seed0", "level": 0.5125, "window": 1}


def rematch(runs, match, to="sft"):
    for path in runs:
        config = path / "config.yaml"
        config.write_text(config.read_text().replace("{match: updates, to: sft}", f"{{match: {match}, to: {to}}}"))


def lengthen(path, tokens):
    """As if every step had trained on that many tokens."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [{**row, "tokens": tokens * row["step"]} if row["split"] == "train" else row for row in rows]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measured(runs, out, **options):
    base, arms = load(runs)
    return measure(base, arms, out, problems=[], seed=0, **options)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """base, sft, eaft, both controls of eaft and a grpo arm, reported on."""
    folder = tmp_path_factory.mktemp("everything")
    runs = make_runs(folder, ("sft", "eaft", "grpo"))
    runs.append(make_arm(folder / "slow", "slow", shape="eaft", control=SLOW))
    runs.append(make_arm(folder / "stopped", "stopped", shape="sft", control=STOPPED, steps=(3, 6, 7)))
    for path, reached in ((runs[-2], False), (runs[-1], True)):
        edit(path / "run.json", lambda info, reached=reached: {**info, "nll_reached": reached})
    return report(runs, folder / "report"), folder / "report", runs


# budgets


def test_budgets_in_four_units(everything):
    rows = {row["arm"]: row for row in everything[0]["budgets"]["arms"]}
    assert rows["sft"]["spent"] == {"updates": 12, "tokens": 7200, "samples": 96, "device_seconds": 240}
    assert rows["grpo"]["spent"] == {"updates": 12, "tokens": 12000, "samples": 192, "device_seconds": 240}
    assert rows["grpo"]["generated_tokens"] == 6000
    assert rows["stopped"]["spent"] == {"updates": 7, "tokens": 4200, "samples": 56, "device_seconds": 140}
    assert [rows[arm]["equal"] for arm in ("sft", "eaft", "grpo", "slow", "stopped")] == [None, True, True, None, None]
    assert rows["stopped"]["ratio"] == pytest.approx(7 / 12)
    assert rows["stopped"]["control"] == "eaft"


def test_the_table_says_what_is_matched_and_what_is_exempt(everything):
    table = budgets_table(everything[0])
    assert [cell.text for cell in table.header][1:] == [
        "Updates",
        "Tokens",
        "Samples",
        "Device seconds",
        "Of the budget",
    ]
    assert table.header[1].lines == ("matched",)
    last = {row[0].arm: row[-1] for row in table.rows}
    assert last["sft"].lines == ("the others are matched to it",)
    assert (last["eaft"].text, last["eaft"].lines) == ("100.0 %", ("matched",))
    assert (last["stopped"].text, last["stopped"].lines) == ("58.3 %", ("control, exempt",))
    assert {row[0].arm: row[2].lines for row in table.rows}["grpo"] == ("6,000 generated",)


@pytest.mark.parametrize(("tokens", "equal"), [(571, True), (569, False), (629, True), (631, False)])
def test_budgets_further_apart_than_five_percent_are_refused(tmp_path, tokens, equal):
    # sft: 12 updates of 600, 7200 in all, of which 5 % are 360: more than half an update of the other arm
    runs = make_runs(tmp_path)
    lengthen(runs[2], tokens)
    rematch(runs, "tokens")
    found = list(unequal(load(runs)[1]))
    assert (found == []) is equal
    assert equal or f"eaft seed 0 has {12 * tokens:,} tokens, sft seed 0 7,200 (" in found[0]


def test_an_unequal_budget_is_refused_and_marked_when_forced(tmp_path):
    runs = make_runs(tmp_path)
    lengthen(runs[2], 900)
    assert check(*load(runs)) == []  # updates are matched, and they are equal
    rematch(runs, "tokens")
    with pytest.raises(
        RunError, match=r"eaft seed 0 has 10,800 tokens, sft seed 0 7,200 \(\+50.0%\), and compare.match"
    ):
        report(runs, tmp_path / "report")
    found = report(runs, tmp_path / "report", force=True)
    assert "compare.match=tokens allows 5%" in found["problems"][0]
    assert budgets_table(found).rows[1][-1].lines == ("NOT MATCHED",)
    assert "NOT MATCHED" in (tmp_path / "report" / "report.html").read_text()


def test_generated_tokens_are_part_of_the_budget(tmp_path):
    runs = make_runs(tmp_path, ("sft", "grpo"))
    rematch(runs, "tokens", to="grpo")
    lengthen(runs[1], 1000)  # the grpo arm trains on 500 and generates 500 a step
    assert check(*load(runs)) == []
    lengthen(runs[1], 500)
    assert "budget: sft seed 0 has 6,000 tokens, grpo seed 0 12,000" in check(*load(runs), force=True)[0]


def test_a_control_is_exempt_and_unknown_amounts_are_not_equal(tmp_path, everything):
    assert check(*load(everything[2])) == []
    runs = make_runs(tmp_path)
    rematch(runs, "device_seconds")
    edit(runs[2] / "run.json", lambda info: {key: info[key] for key in info if key != "workers"})
    (line,) = check(*load(runs), force=True)
    assert line.startswith("budget: the device seconds of eaft seed 0 or sft seed 0 are not logged")
    assert budgets(load(runs)[1])["arms"][1]["equal"] is None


def test_nothing_is_judged_where_nothing_is_matched(tmp_path):
    runs = make_runs(tmp_path)
    lengthen(runs[2], 900)
    rematch(runs, "none")
    found = measured(runs, tmp_path)
    assert check(*load(runs)) == []
    assert [row["ratio"] for row in found["budgets"]["arms"]] == [None, None]


# controls


def test_the_arm_minus_its_control(everything):
    slow, stopped = everything[0]["controls"]
    assert (slow["arm"], slow["of"], slow["by"]) == ("slow", "eaft", "nll")
    assert slow["versus"]["drift.kl"]["delta"] == 0  # the fake control is the same model
    # sft at the third evaluation, where it was stopped: KL 0.16, chain_sum 28; eaft at its end: 0.15, 29
    assert stopped["versus"]["drift.kl"]["delta"] == pytest.approx(0.15 - 0.16)
    assert stopped["versus"]["chain_sum"]["delta"] == pytest.approx((29 - 28) / 40)
    assert stopped["runs"]["0"] == {"steps": 7, **STOPPED, "nll_reached": True}


def test_what_controls_answer_is_said(everything):
    text = (everything[1] / "report.md").read_text()
    assert "Is it only less training?" in text
    assert "slow is SFT stopped where its training NLL, a mean over the last 2 updates" in text
    assert "(seed 0: update 12, NLL 0.250, not reached)" in text
    assert (
        "a mean over the last 1 updates, first came down to the final one of EAFT (seed 0: update 7, NLL 0.512" in text
    )
    assert "EAFT \u2212 stopped" in text
    names = {row[0].arm: row[0].lines for row in results_table(everything[0]).rows}
    assert names["slow"] == ("control of EAFT",) and names["eaft"] == ()


def test_controls_are_dashed_in_the_figures_and_do_not_lower_the_common_gain(everything, tmp_path):
    found, _, runs = everything
    without = measured([run for run in runs if run.name != "stopped"], tmp_path)
    assert found["equal_gain"]["heldout"]["common_gain"] == without["equal_gain"]["heldout"]["common_gain"]
    from eaft_verl.reporting.labels import line_style

    assert [line_style(found, arm) for arm in ("sft", "eaft", "slow", "stopped")] == ["-", "-", "--", "--"]


def test_a_control_that_was_never_reached_is_a_caveat(tmp_path):
    runs = make_runs(tmp_path)
    runs.append(make_arm(tmp_path / "stopped", "stopped", shape="sft", control=STOPPED))
    edit(runs[-1] / "run.json", lambda info: {**info, "nll_reached": False})
    found = measured(runs, tmp_path)
    assert any(
        line.startswith("stopped seed 0 never came down to the training NLL of eaft") for line in found["caveats"]
    )


def test_a_control_without_its_arm_is_still_an_arm(tmp_path):
    runs = [make_base(tmp_path / "base"), make_arm(tmp_path / "sft", "sft")]
    runs.append(make_arm(tmp_path / "slow", "slow", shape="sft", control=SLOW))
    edit(runs[-1] / "run.json", lambda info: {**info, "nll_reached": True})
    found = report(runs, tmp_path / "report")
    assert found["controls"][0]["versus"] == {}


def test_seeds_that_stopped_at_different_steps_are_one_arm(tmp_path):
    runs = make_runs(tmp_path)
    runs += [make_arm(tmp_path / f"{arm}1", arm, 1) for arm in ("sft", "eaft")]
    for seed, steps in ((0, (3, 6, 7)), (1, (3, 6, 9, 10))):
        runs.append(make_arm(tmp_path / f"stopped{seed}", "stopped", seed, "sft", STOPPED, steps))
        edit(runs[-1] / "run.json", lambda info: {**info, "nll_reached": True})
    found = measured(runs, tmp_path)
    path = found["paths"]["heldout"]["stopped"]
    assert [point["step"] for point in path] == [0, 3, 6, 8.5]  # what both have, then both ends
    # seed 0 ends at its third evaluation (0.92), seed 1 at its fourth (1.05 + 0.01)
    assert path[-1]["x"] == pytest.approx((0.92 + 1.06) / 2)
    assert found["results"]["stopped"]["heldout"]["seeds"] == {"0": 0.92, "1": pytest.approx(1.06)}
    assert budgets_table(found).rows[-1][1].text == "8.5"


def test_seeds_with_equally_many_evaluations_are_paired_by_share(tmp_path):
    runs = [make_base(tmp_path / "base"), make_arm(tmp_path / "sft0", "sft", 0, steps=(3, 6, 9))]
    runs.append(make_arm(tmp_path / "sft1", "sft", 1, steps=(4, 8, 11)))
    assert load(runs)[1][0].points() == [(3, 4), (6, 8), (9, 11)]


# failed runs


def test_a_failed_run_is_on_the_page_with_its_cause(tmp_path):
    runs = make_runs(tmp_path)
    runs.append(make_arm(tmp_path / "dft", "dft", shape="sft"))
    edit(runs[-1] / "run.json", lambda info: {**info, "status": "failed", "error": "RunError: <b>loss</b> is nan"})
    found = report(runs, tmp_path / "report")
    assert found["failed"] == [{"arm": "dft", "seed": 0, "run": "dft", "error": "RunError: <b>loss</b> is nan"}]
    assert found["arms"] == ["sft", "eaft"]
    html = (tmp_path / "report" / "report.html").read_text()
    assert "RunError: &lt;b&gt;loss&lt;/b&gt; is nan" in html and ">dft seed 0" in html
    assert "RunError: &lt;b>loss&lt;/b> is nan" in (tmp_path / "report" / "report.md").read_text()
    assert json.loads((tmp_path / "report" / "report.json").read_text())["failed"] == found["failed"]


def test_a_run_that_never_had_a_folder_is_named_by_its_caller(tmp_path):
    runs = make_runs(tmp_path)
    row = {"arm": "dft", "seed": 3, "run": "dft-seed3", "error": "not started: it needs sft-seed3, which failed"}
    found = report(runs, tmp_path / "report", failed=[row])
    assert found["failed"] == [row]
    assert "not started: it needs sft-seed3" in (tmp_path / "report" / "report.html").read_text()


def test_a_report_needs_one_arm_that_did_not_fail(tmp_path):
    runs = make_runs(tmp_path)
    for path in runs[1:]:
        edit(path / "run.json", lambda info: {**info, "status": "failed", "error": f"RunError: {info['arm']} broke"})
    with pytest.raises(
        RunError, match=r"every arm failed(.|\n)*- sft: RunError: sft broke\n- eaft: RunError: eaft broke"
    ):
        report(runs, tmp_path / "report")


# seeds


def test_arms_with_other_seeds_are_refused_unless_the_missing_ones_failed(tmp_path):
    runs = [*make_runs(tmp_path), make_arm(tmp_path / "sft1", "sft", 1)]
    with pytest.raises(RunError, match=r"seeds: sft has \[0, 1\], eaft has \[0\]; differences are paired by seed"):
        report(runs, tmp_path / "report")
    row = {"arm": "eaft", "seed": 1, "run": "eaft-seed1", "error": "RunError: x"}
    found = report(runs, tmp_path / "report", failed=[row])
    assert found["problems"] == []
    assert any("do not have the same seeds: eaft has no run of seed 1" in line for line in found["caveats"])
    assert "eaft has no run of seed 1: its differences" in (tmp_path / "report" / "report.md").read_text()
    # sft's seed 1 has one right answer more in each of the benchmarks; the difference knows seed 0 only
    cells = found["versus"]["arms"]["eaft"]
    assert cells["chain_sum"]["delta"] == pytest.approx((29 - 28) / 40) and cells["chain_sum"]["seeds"] == 1
    assert found["results"]["sft"]["chain_sum"]["score"] == pytest.approx(28.5 / 40)


def test_arms_without_a_common_seed_have_no_difference(tmp_path):
    runs = [make_base(tmp_path / "base"), make_arm(tmp_path / "sft", "sft", 0), make_arm(tmp_path / "eaft", "eaft", 1)]
    found = report(runs, tmp_path / "report", force=True)
    assert found["versus"]["arms"]["eaft"] == {}
    assert [found["equal_gain"][axis]["levels"] for axis in found["equal_gain"]] == [[], []]
    assert (
        "sft has no run of seed 1" in found["lost_seeds"][0] and "eaft has no run of seed 0" in found["lost_seeds"][1]
    )


# spend


def test_passes_before_the_first_step_are_spent_but_slow_no_step(tmp_path):
    runs = make_runs(tmp_path)
    passes = {"base_pass": {"seconds": 15.0}, "reference_cache": {"seconds": 5.0, "bytes": 9}, "train_seconds": 140.0}
    edit(runs[2] / "run.json", lambda info: {**info, **passes})
    found = measured(runs, tmp_path)
    assert [row["spent"]["device_seconds"] for row in found["budgets"]["arms"]] == [240, 280]
    assert [row["train_seconds"] for row in found["cost"]] == [120, 140]
    assert [row["tokens_per_s"] for row in found["cost"]] == [60, 60]  # 7200 tokens in 120 s of steps


# an arm that generates


def test_an_arm_without_weights_and_nll_breaks_nothing(everything):
    found, out, _ = everything
    curve = next(curve for curve in found["curves"] if curve["arm"] == "grpo")["train"]
    assert curve["nll"] == [None] * 12 and curve["weight_mean"] == [None] * 12
    assert curve["reward"][-1] == pytest.approx(0.54)
    assert curve["groups_equal_share"][:3] == [0.25, 0.5, 0.0]  # 1, 2, 0 of 4
    assert curve["generated_tokens"][-1] == 6000 and curve["tokens"][-1] == 12000
    assert curve["generation_share"] == [pytest.approx(0.7)] * 12
    assert (out / "figures" / "curves_step.png").read_bytes()[:4] == b"\x89PNG"
    assert "grpo seed 0: logged values that are not finite" not in " ".join(found["caveats"])


def test_generation_has_its_own_panels_and_column_only_where_it_happened(everything, tmp_path):
    from eaft_verl.reporting.curves import logged

    own = {"reward", "groups_equal_share", "generated_tokens", "generation_share"}
    assert own <= set(logged(everything[0], "step"))
    plain = measured(make_runs(tmp_path), tmp_path)
    assert not own & set(logged(plain, "step"))
    assert "of it generation" in [cell.text for cell in cost_table(everything[0]).header]
    assert "of it generation" not in [cell.text for cell in cost_table(plain).header]
    shares = {row[0].arm: row[2].text for row in cost_table(everything[0]).rows}
    assert shares["grpo"] == "70 %" and shares["sft"] == "\u2013"


def test_keys_of_one_trainer_are_declared_with_it_and_kept_out_of_the_table(everything, tmp_path):
    rows = {row["key"]: row for row in everything[0]["config_differences"]}
    assert rows["verl.rollout.n"]["declared"] and rows["verl.rollout.n"]["of_trainer"]
    assert rows["trainer"]["declared"] and not rows["trainer"]["of_trainer"]
    assert rows["control"]["values"]["slow seed 0"] == '"nll of eaft"'
    shown = [row[0].text for row in config_table(everything[0]).rows]
    assert "verl.rollout.n" not in shown and {"trainer", "control", "objective.name"} <= set(shown)
    runs = make_runs(tmp_path, ("sft", "grpo"))
    again = shutil.copytree(runs[2], tmp_path / "again")
    edit(again / "run.json", lambda info: {**info, "arm": "again"})
    config = again / "config.yaml"
    config.write_text(config.read_text().replace("n: 4", "n: 8"))
    (line,) = check(*load([*runs, again]), force=True)  # sft has no such key, but that is the trainer's difference
    assert line.startswith("config verl.rollout.n: 4 in grpo seed 0, 8 in again seed 0, and neither grpo nor again")
