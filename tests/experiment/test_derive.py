"""What a run takes from a finished one: numbers of updates and stop levels worked out by hand."""

from pathlib import Path
from typing import Any

import pytest
from config_fixtures import composed_once  # noqa: F401
from omegaconf import OmegaConf

from eaft_verl.data.prepare import Example
from eaft_verl.errors import RunError
from eaft_verl.experiment.derive import derive
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.runs import Run
from eaft_verl.training.schedule import DeviceSeconds, UntilNll, training_plan
from eaft_verl.training.sft.order import PADDING, batch_indices

KEYS = {"model": "m", "data": "d", "template": "t", "evaluation": "e"}
RECIPE = """
model: some/model
device: cpu
output: {output}
data: {{train: generate:sums_train, max_length: 64}}
evaluate: {{target: [sums], points: 2}}
compare: {{match: {match}, to: eaft}}
verl: {{optim: {{lr: 1.0e-4, lr_scheduler_type: constant}}, data: {{train_batch_size: 2, max_token_len_per_gpu: 64}}}}
arms:
  eaft: {{objective: {{name: eaft}}}}
  sft: {{objective: {{name: sft}}, verl: {{data: {{train_batch_size: {size}}}}}}}
  slow: {{control: {{of: eaft, by: nll}}}}
  stopped: {{control: {{of: eaft, by: nll}}}}
  grpo: {{trainer: grpo, verl: {{actor_rollout_ref: {{rollout: {{n: 3}}}}}}}}
"""
# five examples that train 1, 2, 4, 8 and 16 tokens
EXAMPLES = [Example(str(i), [], list(range(20)), [0] * (20 - 2**i) + [1] * 2**i) for i in range(5)]
ROWS = [  # 10 steps of 2 samples
    {"step": step, "tokens": 7 * step, "samples": 2 * step, "step_tokens": 10, "nll": 3.0} for step in range(1, 9)
] + [
    {"step": 9, "tokens": 80, "samples": 18, "step_tokens": 40, "nll": 2.0},
    {"step": 10, "tokens": 93, "samples": 20, "step_tokens": 40, "nll": 1.0},
]


def recipe(folder: Path, match: str = "tokens", size: int = 2) -> Any:
    (folder / "r.yaml").write_text(RECIPE.format(output=folder / "out", match=match, size=size))
    return load_recipe(folder / "r.yaml")


def finished(folder: Path, arm: str = "eaft", seed: int = 0, **info: Any) -> Run:
    run = Run.create(folder / "out" / f"{arm}-seed{seed}", info={"keys": KEYS}, config="a: 1\n", env={})
    for row in ROWS:
        run.log({"split": "train", **row})
    run.update(**{"status": "finished", "total_steps": 10, "train_seconds": 30.0, "workers": 2, **info})
    return run


def derived(folder: Path, arm: str, match: str = "tokens", size: int = 2, **keys: str) -> Any:
    config = resolve(recipe(folder, match, size), arm)
    return derive(config, ["own.key"], {**KEYS, **keys}, EXAMPLES)


def trained(steps: int, size: int) -> list[int]:
    """Trained tokens of each of the first steps, from the order of the data alone."""
    batches = [batch_indices(step, 5, size, seed=0) for step in range(1, steps + 1)]
    return [sum(2**row for row in batch if row != PADDING) for batch in batches]


def test_the_reference_itself_changes_nothing(tmp_path: Path) -> None:
    config = resolve(recipe(tmp_path), "eaft")
    assert derive(config, ["x"], KEYS, EXAMPLES) == (config, ["x"], {})


def test_a_budget_of_tokens_is_three_epochs(tmp_path: Path) -> None:
    finished(tmp_path)
    config, declared, record = derived(tmp_path, "sft")
    # an epoch trains 31 tokens in 3 steps, 93 is three of them
    assert config.verl.trainer.total_training_steps == 9
    assert sum(trained(9, 2)) == 93
    assert declared == ["own.key", "verl.trainer.total_training_steps"]
    assert record["budget"] == {"of": "eaft", "unit": "tokens", "amount": 93, "run": "eaft-seed0"}
    assert record["asked"] == {"budget": {"of": "eaft"}, "verl.trainer.total_training_steps": None}
    assert config.budget == {"of": "eaft", "unit": "tokens", "amount": 93}


def test_a_budget_of_tokens_that_no_step_meets_takes_the_nearest(tmp_path: Path) -> None:
    run = finished(tmp_path)
    run.log({"split": "train", **ROWS[-1], "step": 11, "tokens": 93 + 20, "samples": 22})
    steps = derived(tmp_path, "sft", size=3).config.verl.trainer.total_training_steps
    used = [sum(trained(count, 3)) for count in range(1, 20)]
    assert abs(used[steps - 1] - 113) == min(abs(amount - 113) for amount in used)


def test_a_budget_of_samples_does_not_count_padding(tmp_path: Path) -> None:
    finished(tmp_path)
    # batches of 3 and 2 examples: 20 samples are 4 epochs of 2 steps
    assert derived(tmp_path, "sft", "samples", size=3).config.verl.trainer.total_training_steps == 8


def test_a_budget_of_updates_is_their_number(tmp_path: Path) -> None:
    finished(tmp_path)
    assert derived(tmp_path, "sft", "updates", size=3).config.verl.trainer.total_training_steps == 10


def test_a_budget_of_device_seconds_ends_training_by_the_clock(tmp_path: Path) -> None:
    finished(tmp_path)
    config = derived(tmp_path, "sft", "device_seconds").config
    assert config.budget == {"of": "eaft", "unit": "device_seconds", "amount": 60.0}
    assert config.verl.trainer.total_training_steps is None
    plan = training_plan(config, steps=30, devices=3)
    assert isinstance(plan, DeviceSeconds) and (plan.amount, plan.devices, plan.expected) == (60, 3, 30)


@pytest.mark.parametrize(("match", "expected"), [("updates", 10), ("samples", 3)])
def test_a_grpo_arm_is_matched_by_its_number_of_steps(tmp_path: Path, match: str, expected: int) -> None:
    finished(tmp_path)
    # a step of main_ppo is one update on 2 prompts x 3 responses; 3 steps are 18 samples, 4 are 24
    assert derived(tmp_path, "grpo", match).config.verl.trainer.total_training_steps == expected


def test_a_control_by_nll_stops_at_the_references_last_mean(tmp_path: Path) -> None:
    finished(tmp_path)
    config, _, record = derived(tmp_path, "stopped")
    # ten updates: a window of one
    assert config.control == {"of": "eaft", "by": "nll", "level": 1.0, "window": 1}
    assert record["control"] == {"of": "eaft", "by": "nll", "run": "eaft-seed0", "level": 1.0, "window": 1}
    plan = training_plan(config, 9, 1)
    assert isinstance(plan, UntilNll) and (plan.level, plan.window, plan.expected) == (1.0, 1, 9)


def test_what_was_derived_is_the_same_when_the_run_goes_on(tmp_path: Path) -> None:
    finished(tmp_path)
    for arm in ("sft", "slow", "stopped"):
        first, again = derived(tmp_path, arm), derived(tmp_path, arm)
        assert OmegaConf.to_yaml(first.config) == OmegaConf.to_yaml(again.config)
        stored = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(first.config)))
        assert stored == OmegaConf.to_container(again.config)  # as _open compares them


@pytest.mark.parametrize(
    ("arm", "why"), [("sft", "compare.match=tokens gives sft the budget of eaft"), ("slow", "slow")]
)
def test_a_missing_reference_is_named_with_the_command_that_makes_it(tmp_path: Path, arm: str, why: str) -> None:
    with pytest.raises(
        RunError, match=rf"{why}.*out/eaft-seed0 does not exist; first run `eaft train .*--arm eaft seed=0`"
    ):
        derived(tmp_path, arm)
    finished(tmp_path, status="failed")
    with pytest.raises(RunError, match="eaft-seed0 has status 'failed'; first run"):
        derived(tmp_path, arm)


def test_a_control_alone_names_the_arm_it_is_a_control_of(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="slow is a control of eaft, and .*eaft-seed0 does not exist"):
        derived(tmp_path, "slow", "none")


def test_a_reference_of_another_model_or_data_is_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(RunError, match=r"eaft-seed0 was trained from another model \(m, now other\)"):
        derived(tmp_path, "sft", model="other")
    with pytest.raises(RunError, match=r"another data \(d, now other\)"):
        derived(tmp_path, "slow", "none", data="other")


def test_a_reference_that_did_not_log_the_unit_is_refused(tmp_path: Path) -> None:
    run = finished(tmp_path)
    run.log({"split": "train", "step": 11, "tokens": 100, "step_tokens": 7, "nll": "nan"})
    with pytest.raises(RunError, match="eaft-seed0 has not logged its samples"):
        derived(tmp_path, "sft", "samples")
    with pytest.raises(RunError, match="last training NLL is nan"):
        derived(tmp_path, "stopped", "none")
