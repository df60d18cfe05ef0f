"""What a report says of chains, averages and arms with rows of their own."""

from pathlib import Path
from typing import Any

import fake_runs
import pytest

from eaft_verl.errors import RunError
from eaft_verl.reporting.collect import load
from eaft_verl.reporting.comparability import check
from eaft_verl.reporting.report import measure
from eaft_verl.runs import Run

BEFORE = {"updates": 6, "tokens": 3600, "samples": 48, "device_seconds": 120.0}


def configured(run: Path, **blocks: Any) -> None:
    """Add what a recipe says to config.yaml, and to what the arm declares."""
    text = "".join(f"{key}: {value}\n" for key, value in blocks.items())
    Run(run).change_config((run / "config.yaml").read_text() + text)
    Run(run).update(declared=[*Run(run).info["declared"], *blocks])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """sft -> grpo from its step 6, an average of eaft, and eaft on other rows."""
    folder = tmp_path_factory.mktemp("chains")
    runs = fake_runs.make_runs(folder, ("sft", "eaft", "grpo"))
    runs.append(fake_runs.make_arm(folder / "mean", "mean", shape="eaft", steps=(1, 2, 3)))
    _, sft, eaft, grpo, mean = runs
    Run(grpo).update(derived={"start": {"arm": "sft", "run": sft.name, "step": 6, "key": "k", "before": BEFORE}})
    configured(grpo, start="{arm: sft, step: 6}")
    weights = {"1": 0.25, "2": 0.5, "3": 0.75}
    Run(mean).update(average={"of": "eaft", "with": "base", "weights": weights}, declared=["objective.name"])
    configured(mean, average="{of: eaft, with: base, weights: [0.25, 0.5, 0.75]}")
    (mean / "metrics.jsonl").unlink()
    Run(eaft).update(
        keys={**fake_runs.KEYS, "data": "other"}, drawn={"replay": {"examples": 0.21, "tokens": 0.3}, "data": {}}
    )
    configured(eaft, replay="{data: general.jsonl, share: 0.2}")
    loaded, arms = load(runs)
    problems = check(loaded, arms, force=True)
    return measure(loaded, arms, folder, problems=problems, seed=0) | {"problems": problems}


def test_declared_differences_are_no_problem(found: dict[str, Any]) -> None:
    assert found["problems"] == []


def test_a_path_begins_where_the_chain_begins(found: dict[str, Any]) -> None:
    sft, chain = (found["paths"]["heldout"][arm] for arm in ("sft", "grpo"))
    assert [point["step"] for point in sft] == [0, 3, 6, 9, 12]
    assert [point["step"] for point in chain] == [0, 3, 6, 6 + 3, 6 + 6, 6 + 9, 6 + 12]
    assert chain[:3] == sft[:3]
    assert chain[3]["kl"] == pytest.approx(fake_runs.SHAPES["grpo"]["drift"][1])


def test_budgets_are_the_arms_own_and_what_came_before_is_stated(found: dict[str, Any]) -> None:
    rows = {row["arm"]: row for row in found["budgets"]["arms"]}
    assert rows["grpo"]["before"] == BEFORE and rows["grpo"]["spent"]["updates"] == 12 and rows["grpo"]["equal"]
    assert rows["sft"]["before"] is None
    assert rows["mean"]["equal"] is None and rows["mean"]["spent"]["updates"] == 0


def test_the_reader_is_told(found: dict[str, Any]) -> None:
    said = "\n".join(found["caveats"])
    assert "grpo begins at sft, step 6: its budget and cost are its own, and the chain had spent 6 updates" in said
    assert "mean was not trained: it is the weight average of eaft and base" in said and "step 3 = 0.75" in said
    assert (
        "eaft was trained on other rows (replay: general.jsonl, share 0.2 asked, 0.21 of the examples and 0.3" in said
    )


def test_other_rows_that_nobody_declares_are_still_refused(tmp_path: Path) -> None:
    runs = fake_runs.make_runs(tmp_path)
    Run(runs[2]).update(keys={**fake_runs.KEYS, "data": "other"})
    with pytest.raises(RunError, match="keys.data: 'd0' in sft seed 0 .*, 'other' in eaft seed 0"):
        check(*load(runs))
