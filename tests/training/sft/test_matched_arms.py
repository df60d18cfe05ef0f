"""Real training of matched arms and controls on a tiny model, in one process; then the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from one_worker import without_ray

from eaft_verl.errors import RunError
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import declared_keys, load_recipe, resolve
from eaft_verl.reporting.report import report
from eaft_verl.runs import Run

RECIPE = """
model: {model}
output: {folder}/out
device: cpu
data: {{train: {folder}/train.jsonl, heldout: {folder}/heldout.jsonl, max_length: 256}}
compare: {{match: tokens, to: eaft}}
evaluate: {{drift: {{data: generate:neutral_prompts, rows: 2, new_tokens: 4}}, points: 2}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  optim: {{lr: 1.0e-3}}
  data: {{train_batch_size: 4, max_token_len_per_gpu: 256}}
  trainer: {{total_epochs: 4}}
arms:
  eaft: {{objective: {{name: eaft}}}}
  sft: {{verl: {{data: {{train_batch_size: 2}}}}}}
  stopped: {{control: {{of: eaft, by: nll}}}}
  timed: {{objective: {{name: eaft}}}}
"""
TIMED = ["compare.match=device_seconds", "verl.optim.lr_scheduler_type=constant"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> dict[str, Run]:
    """Finished runs of every arm; the reference was missing when its control was first asked for."""
    from eaft_verl.experiment.train import train

    folder = tmp_path_factory.mktemp("matched")
    tiny.write_sums(folder / "train.jsonl", 10, seed=1)
    tiny.write_sums(folder / "heldout.jsonl", 4, seed=2)
    (folder / "r.yaml").write_text(RECIPE.format(model=tiny_model_path, folder=folder))
    recipe = load_recipe(folder / "r.yaml")

    def trained(arm: str, *overrides: str) -> Run:
        config = resolve(recipe, arm, overrides)
        check(config)
        return train(config, declared_keys(recipe, arm))

    with pytest.raises(RunError, match="stopped is a control of eaft|gives stopped the budget of eaft"):
        trained("stopped")
    with without_ray(folder):
        found = {arm: trained(arm) for arm in ("eaft", "sft", "stopped")}
        return found | {"timed": trained("timed", *TIMED)}


def rows(run: Run) -> list[dict[str, Any]]:
    return run.metrics("train")


def test_samples_are_counted_without_padding(runs: dict[str, Run]) -> None:
    assert [row["samples"] for row in rows(runs["eaft"])] == [4, 8, 10, 14, 18, 20, 24, 28, 30, 34, 38, 40]


def test_the_tokens_are_those_of_the_reference(runs: dict[str, Run]) -> None:
    eaft, sft = (rows(runs[arm]) for arm in ("eaft", "sft"))
    assert len(eaft) == 12 and len(sft) == 20  # four epochs of 10 examples, 4 or 2 at a time
    assert eaft[-1]["tokens"] == sft[-1]["tokens"]
    assert runs["sft"].info["derived"]["budget"]["amount"] == eaft[-1]["tokens"]
    assert runs["sft"].config["verl"]["trainer"]["total_training_steps"] == runs["sft"].info["total_steps"] == 20
    assert sorted(runs["sft"].checkpoints()) == [1, 2, 4, 8, 20]


def test_the_control_by_nll_stopped_at_the_first_step_at_the_level(runs: dict[str, Run]) -> None:
    reference, stopped, info = rows(runs["eaft"]), rows(runs["stopped"]), runs["stopped"].info
    level = reference[-1]["nll"]  # a tenth of 12 updates is one
    assert info["derived"]["control"]["level"] == level and info["derived"]["control"]["window"] == 1
    assert info["nll_reached"] is True
    assert info["total_steps"] == stopped[-1]["step"] == len(stopped)
    assert stopped[-1]["nll"] <= level < min(row["nll"] for row in stopped[:-1])
    assert max(runs["stopped"].checkpoints()) == info["total_steps"]


def test_time_ended_the_arm_that_was_given_some(runs: dict[str, Run]) -> None:
    timed, info = rows(runs["timed"]), runs["timed"].info
    budget = runs["eaft"].info["train_seconds"]
    assert info["derived"]["budget"] == {"of": "eaft", "unit": "device_seconds", "amount": budget, "run": "eaft-seed0"}
    last = timed[-1]
    assert last["seconds"] + last["step_s"] / 2 >= budget
    assert all(row["seconds"] + row["step_s"] / 2 < budget for row in timed[:-1])
    assert info["total_steps"] == last["step"] == max(runs["timed"].checkpoints())


def test_the_arms_are_evaluated_at_their_own_ends_and_reported_together(
    runs: dict[str, Run], tiny_model_path: Path, tmp_path: Path
) -> None:
    from eaft_verl.experiment.evaluate import evaluate_command

    folder = runs["eaft"].path.parent
    recipe = str(folder.parent / "r.yaml")
    base = evaluate_command(str(tiny_model_path), recipe, folder / "base", [])
    compared = [run for arm, run in runs.items() if arm != "timed"]
    for run in compared:
        evaluate_command(str(run.path), None, None, [])
    found = report([base.path, *(run.path for run in compared)], tmp_path / "report")
    assert found["problems"] == []
    assert [(row["arm"], row["equal"]) for row in found["budgets"]["arms"]] == [
        ("sft", True),
        ("eaft", None),
        ("stopped", None),
    ]
    assert {row["arm"]: row["of"] for row in found["controls"]} == {"stopped": "eaft"}
    assert found["paths"]["heldout"]["stopped"][-1]["step"] == runs["stopped"].info["total_steps"]
    assert found["controls"][0]["versus"]["drift.kl"]["low"] is not None
    assert json.loads((tmp_path / "report" / "report.json").read_text())["controls"] == found["controls"]
