"""Budgets and controls in a recipe: who waits for whom, and every recipe that makes no sense."""

from pathlib import Path
from typing import Any

import pytest
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.errors import ConfigError
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.matching import budget_source
from eaft_verl.recipe.resolve import load_recipe, resolve

SHARED = (
    "model: {folder}\ndevice: cpu\ndata: {{train: generate:sums_train, max_length: 64}}\nevaluate: {{target: [sums]}}"
)
ARMS = """
arms:
  sft: {objective: {name: sft}}
  eaft: {objective: {name: eaft}}
  slow: {control: {of: eaft, by: nll}}
  stopped: {control: {of: eaft, by: nll}}
"""


def recipe(folder: Path, *lines: str, arms: str = ARMS) -> Any:
    (folder / "config.json").write_text("{}")
    (folder / "r.yaml").write_text("\n".join([SHARED.format(folder=folder), *lines]) + arms)
    return load_recipe(folder / "r.yaml")


def source(arms: dict[str, dict[str, Any]], arm: str, match: str, to: str | None = None) -> tuple[str, str | None]:
    trainers = {name: own.get("trainer", "sft") for name, own in arms.items()}
    return budget_source(arms, trainers, arm, {"match": match, "to": to})


SFT_EAFT = {"sft": {}, "eaft": {"objective": {"name": "eaft"}}, "slow": {"control": {"of": "eaft", "by": "nll"}}}
WITH_GRPO = {**SFT_EAFT, "grpo": {"trainer": "grpo"}}


@pytest.mark.parametrize(
    ("arms", "arm", "match", "to", "expected"),
    [
        (SFT_EAFT, "eaft", "updates", None, ("sft", None)),  # equal as they stand
        (SFT_EAFT, "sft", "tokens", None, ("sft", None)),  # it is the budget
        (SFT_EAFT, "eaft", "tokens", None, ("sft", "sft")),
        (SFT_EAFT, "slow", "samples", None, ("sft", "sft")),
        (SFT_EAFT, "sft", "tokens", "eaft", ("eaft", "eaft")),
        (SFT_EAFT, "eaft", "none", None, ("sft", None)),
        (WITH_GRPO, "sft", "tokens", None, ("grpo", "grpo")),  # known only when it has finished
        (WITH_GRPO, "sft", "device_seconds", None, ("grpo", "grpo")),
        (WITH_GRPO, "grpo", "tokens", None, ("grpo", None)),
        (WITH_GRPO, "grpo", "updates", None, ("sft", "sft")),
        (WITH_GRPO, "eaft", "updates", None, ("sft", None)),
        (WITH_GRPO, "grpo", "samples", "sft", ("sft", "sft")),
    ],
)
def test_whose_spend_is_the_budget(arms, arm, match, to, expected) -> None:
    assert source(arms, arm, match, to) == expected


@pytest.mark.parametrize("keys", [{"data": {"train_batch_size": 8}}, {"trainer": {"total_epochs": 4}}])
def test_an_arm_whose_updates_would_differ_waits_for_the_first(keys: dict[str, Any]) -> None:
    arms = {"sft": {"verl": keys}, "eaft": {}}
    assert source(arms, "eaft", "updates") == ("sft", "sft")


WRONG = [
    ({"a": {}, "b": {}}, "a", "token", None, "compare.match='token' is not one of updates, tokens, samples"),
    ({"a": {}, "b": {}}, "a", "tokens", "c", "compare.to='c' is no arm of the recipe; its arms are a, b"),
    (SFT_EAFT, "sft", "tokens", "slow", "a control cannot give the others their budget"),
    ({"a": {"control": {"of": "a"}}}, "a", "updates", None, "every arm is a control"),
    (
        {"a": {}, "b": {"verl": {"trainer": {"total_epochs": 4}}}},
        "b",
        "updates",
        None,
        "arm b sets verl.trainer.total_epochs, but compare.match=updates makes it as long as arm a",
    ),
    (
        {"a": {}, "b": {"verl": {"trainer": {"total_training_steps": 4}}}},
        "b",
        "tokens",
        None,
        "arm b sets verl.trainer.total_training_steps, but compare.match=tokens",
    ),
    (WITH_GRPO, "grpo", "tokens", "sft", "trainer=grpo, which cannot be stopped at a number of tokens"),
    ({**WITH_GRPO, "two": {"trainer": "grpo"}}, "two", "device_seconds", None, "set compare.to=two"),
]


@pytest.mark.parametrize(("arms", "arm", "match", "to", "message"), WRONG, ids=[item[-1][:40] for item in WRONG])
def test_matching_that_cannot_be_done(arms, arm, match, to, message) -> None:
    with pytest.raises(ConfigError, match=message):
        source(arms, arm, match, to)


BAD_CONTROLS = [
    ("{control: eaft}", "control='eaft' must be {of: ARM, by: nll}"),
    ("{control: {of: eaft}}", "must be {of: ARM, by: nll}"),
    ("{control: {of: eaft, by: loss}}", "control.by='loss' is not one of nll"),
    ("{control: {of: nobody, by: nll}}", "control.of='nobody' is no other arm of the recipe; those are sft, eaft"),
    ("{control: {of: bad, by: nll}}", "control.of='bad' is no other arm"),
    ("{control: {of: slow, by: nll}}", "control.of=slow, which is a control itself"),
    ("{control: {of: rl, by: nll}}", "control.of=rl has trainer=grpo, which has no NLL of demonstrations"),
]


@pytest.mark.parametrize(("arm", "message"), BAD_CONTROLS, ids=[message[:40] for _, message in BAD_CONTROLS])
def test_a_control_that_makes_no_sense(tmp_path: Path, arm: str, message: str) -> None:
    arms = f"{ARMS}  rl: {{trainer: grpo}}\n  bad: {arm}\n"
    with pytest.raises(ConfigError, match=message):
        resolve(recipe(tmp_path, arms=arms), "bad")


def test_a_control_is_plain_sft(tmp_path: Path) -> None:
    arms = f"{ARMS}  bad: {{objective: {{name: dft}}, control: {{of: eaft, by: nll}}}}\n"
    with pytest.raises(ConfigError, match="the arm must have trainer sft and objective.name sft, not sft and dft"):
        check(resolve(recipe(tmp_path, arms=arms), "bad"))
    check(resolve(recipe(tmp_path), "slow"))


def test_one_budget_holds_for_all_arms(tmp_path: Path) -> None:
    arms = ARMS + "  own: {compare: {match: tokens}}\n"
    with pytest.raises(ConfigError, match="arms.own sets compare, which holds for all arms"):
        recipe(tmp_path, arms=arms)


def test_the_configuration_names_the_arm_that_was_chosen(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "compare: {match: tokens}")
    found = {arm: resolve(loaded, arm) for arm in loaded.arms}
    assert {config.compare.to for config in found.values()} == {"sft"}
    assert {arm: config.budget and config.budget.of for arm, config in found.items()} == {
        "sft": None,
        "eaft": "sft",
        "slow": "sft",
        "stopped": "sft",
    }
    assert resolve(loaded, "sft", ["compare.to=eaft"]).budget.of == "eaft"
    assert resolve(loaded, "eaft", ["compare.match=none"]).budget is None


def test_a_budget_of_time_needs_a_schedule_without_an_end(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "compare: {match: device_seconds}")
    check(resolve(loaded, "sft"))  # the others are matched to it
    with pytest.raises(ConfigError, match="lr_scheduler_type=cosine cut off before its end is another schedule"):
        check(resolve(loaded, "eaft"))
    check(resolve(loaded, "eaft", ["verl.optim.lr_scheduler_type=constant"]))
