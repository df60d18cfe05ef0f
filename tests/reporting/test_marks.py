"""Which differences are called better or worse: Holm by hand, three seeds between arms, the noise floor."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from reporting.fake_runs import make_arm, make_base, make_runs

from eaft_verl.errors import RunError
from eaft_verl.files import write_json
from eaft_verl.pages.statistics import holm
from eaft_verl.reporting.collect import load
from eaft_verl.reporting.marks import set_marks, with_floors
from eaft_verl.reporting.report import measure, report
from eaft_verl.reporting.wording import direction

NOISE = {
    "kl": 0.001,
    "agreement": 0.99,
    "nll": -0.002,
    "accuracy": {
        "chain_sum": {"changed": 2, "n": 40, "difference": 0.0},
        "gsm8k": {"changed": 0, "n": 40, "difference": 0.0},
        "ifeval": {"changed": 1, "n": 40, "difference": -0.025},
    },
}
KL = {"id": "drift.kl", "members": [], "percent": False, "higher_is_better": False}


def difference(delta: float, p: float, seeds: int = 3) -> dict[str, Any]:
    return {
        "delta": delta,
        "low": delta - 0.01,
        "high": delta + 0.01,
        "excludes_zero": p < 0.05,
        "p": p,
        "seeds": seeds,
    }


def marked(versus: dict[str, dict[str, Any]], columns: list[dict[str, Any]], noise: Any = None) -> dict[str, Any]:
    """Reasons of a report that has these differences between arms and nothing else."""
    report = {"columns": with_floors(columns, noise), "results": {}, "versus": {"arms": {"eaft": versus}}}
    set_marks(report | {"controls": [], "equal_gain": {}})
    return {name: row["unmarked"] for name, row in versus.items()}


def shares(*names: str) -> list[dict[str, Any]]:
    return [{"id": name, "members": [], "percent": True, "higher_is_better": True} for name in names]


def test_the_marks_of_a_table_share_one_error_rate() -> None:
    rows = {
        "a": difference(0.2, 0.01),
        "b": difference(0.2, 0.02),
        "c": difference(0.2, 0.04),
        "d": difference(0.2, 0.4),
    }
    # .0125, .0167: only the first passes, although three of the raw intervals exclude zero
    assert marked(rows, shares(*"abcd")) == {"a": None, "b": "holm", "c": "holm", "d": "zero"}
    assert direction({"higher_is_better": False}, rows["a"]) == "worse" and direction({}, rows["b"]) == ""


def test_between_arms_three_seeds_are_needed() -> None:
    rows = {"a": difference(0.2, 0.0005, seeds=2), "b": difference(0.2, 0.0005, seeds=3)}
    assert marked(rows, shares("a", "b")) == {"a": "seeds", "b": None}


def test_what_is_not_larger_than_the_noise_is_not_marked() -> None:
    rows = {
        "drift.kl": difference(-0.001, 0.0005),
        "chain_sum": difference(0.05, 0.0005),
        "gsm8k": difference(0.025, 0.0005),
    }
    columns = [KL, *shares("chain_sum", "gsm8k")]
    assert marked(rows, columns) == dict.fromkeys(rows)
    assert marked(rows, columns, NOISE) == {"drift.kl": "noise", "chain_sum": "noise", "gsm8k": None}


def test_floors_by_hand() -> None:
    mean = {"id": "target_mean", "members": ["chain_sum", "gsm8k"], "percent": True}
    partly = {"id": "general_mean", "members": ["ifeval", "mmlu"], "percent": True}
    losses = [{"id": f"drift.{name}", "members": [], "percent": False} for name in ("kl", "agreement", "nll")]
    others = [*losses, {"id": "heldout", "members": [], "percent": False}, *shares("ifeval", "mmlu")]
    found = {
        column["id"]: column["floor"]
        for column in with_floors([mean, partly, *others, *shares("chain_sum", "gsm8k")], NOISE)
    }
    assert found == {
        **{"drift.kl": 0.001, "drift.agreement": pytest.approx(0.01), "drift.nll": 0.002, "heldout": 0.002},
        **{
            "chain_sum": 2 / 40,
            "gsm8k": 0.0,
            "target_mean": 1 / 40,
            "ifeval": 1 / 40,
            "mmlu": None,
            "general_mean": None,
        },
    }
    assert {column["floor"] for column in with_floors([mean, *others], None)} == {None}
    score = {"id": "gsm8k", "members": [], "percent": False}  # say, a log-probability: all of them change a little
    assert with_floors([score], {**NOISE, "accuracy": {"gsm8k": {"changed": 9, "n": 9, "difference": 0.003}}})[0][
        "floor"
    ] == pytest.approx(0.003)
    unknown = {"kl": None, "agreement": None, "nll": None, "accuracy": {}}
    assert {column["floor"] for column in with_floors([mean, *others], unknown)} == {None}


def test_the_page_prints_the_floor_or_that_there_is_none(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    assert report(runs, tmp_path / "report")["noise"] is None
    for name in ("report.md", "report.html"):
        assert "Noise floor not measured." in (tmp_path / "report" / name).read_text()
    write_json(runs[0] / "eval" / "noise.json", {**NOISE, "kl": 0.3})
    found = report(runs, tmp_path / "report")
    assert found["noise"] == {**NOISE, "kl": 0.3}
    assert any("noise floor not measured for mmlu, General mean: a mark" in line for line in found["caveats"])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "noise 5 %" in text and "noise 0.3" in text and "noise 1 %" in text
    assert "On general text its KL to the base is within the noise floor of 0.3 nats per token." in text
    assert found["versus"]["arms"]["eaft"]["drift.kl"]["unmarked"] == "noise"


def test_a_broken_record_of_the_noise_is_named(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    write_json(runs[0] / "eval" / "noise.json", {"kl": 0.1, "nll": 0.0})
    with pytest.raises(RunError, match=r"noise.json lacks accuracy, agreement; delete it and evaluate the base again"):
        report(runs, tmp_path / "report")


def test_three_seeds_are_marked_two_are_not(tmp_path: Path) -> None:
    runs = [
        make_base(tmp_path / "base"),
        *(make_arm(tmp_path / f"{a}{s}", a, s) for a in ("sft", "eaft") for s in (0, 1, 2)),
    ]
    base, arms = load(runs)
    found = measure(base, arms, tmp_path, problems=[], seed=0)
    kl = found["versus"]["arms"]["eaft"]["drift.kl"]  # -0.06, -0.066, -0.072
    assert kl["delta"] == pytest.approx(-0.066) and kl["seeds"] == 3
    assert kl["unmarked"] == (
        None if holm([row["p"] for row in found["versus"]["arms"]["eaft"].values()])[-3] else "holm"
    )
    assert "no arm is called better" not in found["caveats"][0]
    base, arms = load([run for run in runs if not run.name.endswith("2")])
    found = measure(base, arms, tmp_path, problems=[], seed=0)
    assert {row["unmarked"] for row in found["versus"]["arms"]["eaft"].values()} <= {"zero", "seeds"}
    assert "below 3 shared seeds no arm is called better or worse than another" in found["caveats"][0]


def test_enough_resamples_for_the_smallest_p_of_a_large_table(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    base, arms = load(runs)
    many = [*arms] * 20
    assert 2 / (1 + measure(base, arms, tmp_path, problems=[], seed=0)["resamples"]) < 0.05 / (2 * 10)
    from eaft_verl.reporting.report import _resamples

    assert 2 / (1 + _resamples(base, many)) < 0.05 / (40 * 11)


def test_a_model_that_did_not_move_is_not_within_a_floor_that_nobody_measured(tmp_path: Path) -> None:
    """Its records at every step are the base's own; no noise.json."""
    base, sft, still = make_runs(tmp_path, ("sft", "eaft"))
    for step in (3, 6, 9, 12):
        for part in ("eval", "samples"):
            shutil.rmtree(still / part / f"step_{step:06d}")
            shutil.copytree(base / part / "step_000000", still / part / f"step_{step:06d}")
    found = measure(*load([base, sft, still]), tmp_path, problems=[], seed=0)
    assert found["results"]["eaft"]["drift.kl"]["delta"]["unmarked"] == "zero"
    (said,) = [row["sentences"] for row in found["headline"] if row["arm"] == "eaft"]
    assert "On general text it moved 0.000 nats per token away from the base" in " ".join(said)
    assert "noise floor" not in " ".join(said)
