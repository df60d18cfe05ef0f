"""Arms made from other arms, and arms with rows of their own: what they resolve to, and all that makes no sense."""

import json
from pathlib import Path
from typing import Any

import pytest
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.errors import ConfigError, RunError
from eaft_verl.experiment.chain import start_of
from eaft_verl.experiment.compare import in_order
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.config import plain
from eaft_verl.recipe.datasets import prepared_path
from eaft_verl.recipe.resolve import declared_keys, load_recipe, resolve
from eaft_verl.recipe.views import anchor_reference, data_spec

SHARED = """
model: {folder}
output: {folder}/out
device: cpu
data: {{train: generate:sums_train, max_length: 64, columns: {{prompt: prompt}}}}
evaluate: {{target: [sums]}}
verl: {{data: {{max_token_len_per_gpu: 64}}}}
"""


def recipe(folder: Path, arms: dict[str, Any], *lines: str) -> Any:
    (folder / "config.json").write_text("{}")
    text = SHARED.format(folder=folder) + "\n".join(lines) + "\narms: " + json.dumps(arms)
    (folder / "r.yaml").write_text(text)
    return load_recipe(folder / "r.yaml")


SFT, GRPO = {"objective": {"name": "sft"}}, {"trainer": "grpo", "verl": {"data": {"max_response_length": 8}}}
CHAIN = {"sft": SFT, "rl": {**GRPO, "start": "sft"}, "end": {**SFT, "start": {"arm": "rl", "step": 4}}}


def test_a_chain_is_resolved_and_ordered(tmp_path: Path) -> None:
    average = {"mean": {"average": {"of": "end", "weights": [0.5]}}}
    loaded = recipe(tmp_path, {**average, **dict(reversed(CHAIN.items()))}, "compare: {match: none}")
    configs = [resolve(loaded, arm) for arm in loaded.arms]
    for config in configs:
        check(config)
    assert [config.arm for config in in_order(configs)] == ["sft", "rl", "end", "mean"]
    by_arm = {config.arm: config for config in configs}
    assert plain(by_arm["rl"].start) == {"arm": "sft", "step": "last"}
    assert plain(by_arm["end"].start) == {"arm": "rl", "step": 4} and by_arm["sft"].start is None
    assert plain(by_arm["mean"].average) == {"of": "end", "with": "base", "weights": [0.5]}
    assert {"start", "start.arm", "start.step"} <= set(declared_keys(loaded, "end"))
    with pytest.raises(
        RunError, match=r"arm rl starts from sft, and .*sft-seed0 does not exist; first run `eaft train"
    ):
        start_of(by_arm["rl"])


def test_rows_of_its_own(tmp_path: Path) -> None:
    arms = {"sft": SFT, "mixed": {**SFT, "replay": {"data": "generate:sums_heldout", "share": 0.2}}}
    arms["own"] = {**SFT, "self_sft": "generate:sums_heldout"}
    loaded = recipe(tmp_path, arms)
    mixed, own = resolve(loaded, "mixed"), resolve(loaded, "own")
    shares = {source.name: (source.source, source.share, source.columns) for source in data_spec(mixed).sources}
    assert shares == {
        "data": ("generate:sums_train", None, {"prompt": "prompt"}),
        "replay": ("generate:sums_heldout", 0.2, None),
    }
    assert [(one.source, one.columns) for one in data_spec(own).sources] == [("generate:sums_heldout", None)]
    assert plain(mixed.budget) == plain(own.budget) == {"of": "sft"}  # as many updates, whatever the number of rows
    assert prepared_path(mixed, "train").name == "train_mixed.parquet"
    fixed = recipe(tmp_path, arms, "  # fixed", "compare: {match: updates}")
    assert resolve(fixed, "own", ["verl.trainer.total_training_steps=5"]).budget is None


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"a": {"source": "a.jsonl", "share": 0.75}, "b": {"source": "b.jsonl", "share": 0.25}}, [0.6, 0.2, 0.2]),
        ({"a": "a.jsonl", "b": {"source": "b.jsonl", "share": 0.5}}, [None, 0.4, 0.2]),
        ({"source": "a.jsonl", "cap": 9}, [None, 0.2]),
        (["x/a.jsonl", "y/b.jsonl"], [None, None, 0.2]),
    ],
)
def test_replay_leaves_the_shares_among_the_other_rows(tmp_path: Path, train: Any, expected: list[Any]) -> None:
    arms = {"sft": {**SFT, "data": {"train": train}, "replay": {"data": "c.jsonl", "share": 0.2}}}
    sources = data_spec(resolve(recipe(tmp_path, arms), "sft")).sources
    assert [one.share if one.share is None else pytest.approx(one.share) for one in sources] == expected


def test_an_anchor_is_to_the_recipes_model_unless_it_says_start(tmp_path: Path) -> None:
    anchor = {"kind": "forward_kl", "coef": 0.1, "reference": "start"}
    arms = {"sft": SFT, "next": {"start": "sft", "objective": {"name": "sft", "anchor": anchor}}}
    config = resolve(recipe(tmp_path, arms), "next")
    check(config)
    assert anchor_reference(config) is None
    del arms["next"]["start"]
    with pytest.raises(ConfigError, match="objective.anchor.reference=start is the model that an arm with `start`"):
        check(resolve(recipe(tmp_path, arms), "next"))


def own(**blocks: Any) -> dict[str, Any]:
    return {"sft": SFT, "x": {**SFT, **blocks}}


def averaged(**block: Any) -> dict[str, Any]:
    return {"sft": SFT, "eaft": SFT, "x": {"average": {"of": "sft", "weights": [0.5], **block}}}


BAD = [
    (own(start="sfr"), "start.arm='sfr' is no other arm of the recipe; did you mean sft?"),
    (own(start="nothing"), "start.arm='nothing' is no other arm of the recipe; those are sft"),
    (own(start="x"), "arms x -> x form a circle"),
    (own(start={"arm": "sft", "step": 0}), "start.step=0 must be last, chosen or the number of an evaluated step"),
    (own(start={"arm": "sft", "at": 4}), "start.at is unknown; it has arm, step"),
    (own(start=["sft"]), r"start=\['sft'\] must be a mapping, e.g. start: sft, or"),
    (own(start="sft", model="other/model"), "start=sft and model='other/model' both say where training begins"),
    ({"sft": {**SFT, "model": "other/model"}, "x": {**SFT, "start": "sft"}}, "trains model 'other/model' of its own"),
    (own(start="sft", verl={"model": {"lora_rank": 4, "lora_adapter_path": "a"}}), "lora_adapter_path='a' belongs to"),
    (
        {"a": {**SFT, "start": "x"}, "b": {**SFT, "start": "a"}, "x": {**SFT, "start": "b"}},
        "arms x -> b -> a -> x form a circle, in which each waits for the next: x starts from b; b starts from a; a ",
    ),
    ({"sft": SFT, "m": averaged()["x"], "x": {**SFT, "start": "m"}}, "start.arm=m is an average, several models"),
    (averaged(of="sfd"), "average.of='sfd' is no other arm of the recipe; did you mean sft?"),
    (averaged(**{"with": "bas"}), "average.with='bas' is no other arm of the recipe; those are base, sft, eaft"),
    (averaged(**{"with": "sft"}), "average.of and average.with are both sft"),
    (averaged(weights=[]), r"average.weights=\[\] must be different numbers from 0 \(average.with\) to 1"),
    (averaged(weights=[0.5, 1.5]), r"average.weights=\[0.5, 1.5\] must be different numbers"),
    (averaged(weights=[0.5, 0.5]), r"average.weights=\[0.5, 0.5\] must be different numbers"),
    (averaged(weights=["half"]), "must be different numbers"),
    (averaged(weights=0.5), "average.weights=0.5 must be different numbers"),
    ({"sft": SFT, "x": {"average": {"of": "sft"}}}, "average.weights is missing, e.g. average: {of: sft"),
    ({"sft": SFT, "x": {**SFT, "average": {"of": "sft", "weights": [0.5]}}}, "objective has no effect beside average"),
    (
        {"sft": {**SFT, "model": "o/m"}, "x": {"average": {"of": "sft", "weights": [0.5]}}},
        "average.of=sft trains model",
    ),
    (own(replay={"data": "a.jsonl", "share": 0}), "replay.share=0 must be above 0 and below 1"),
    (own(replay={"data": "a.jsonl", "share": 1.0}), "replay.share=1.0 must be above 0 and below 1"),
    (own(replay={"data": "a.jsonl", "share": "a fifth"}), "replay.share='a fifth' must be above 0"),
    (own(replay="a.jsonl"), "replay='a.jsonl' must be a mapping, e.g. replay: {data"),
    (own(self_sft={"data": 3}), "self_sft.data=3 must name a file"),
    ({"sft": SFT, "x": {**GRPO, "replay": {"data": "a", "share": 0.5}}}, "replay has no effect with trainer: grpo"),
    (
        {"sft": SFT, "x": {**SFT, "start": "sft", "control": {"of": "sft", "by": "nll"}}},
        "it is a control of sft, which",
    ),
    ({"m": averaged()["x"] | {}, "sft": SFT, "x": {**SFT, "control": {"of": "m", "by": "nll"}}}, "which is an average"),
]


@pytest.mark.parametrize(("arms", "found"), BAD)
def test_what_makes_no_sense_is_refused(tmp_path: Path, arms: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        check(resolve(recipe(tmp_path, arms), "x"), dry_run=True)


def test_a_budget_that_closes_a_circle_is_named(tmp_path: Path) -> None:
    arms = {"sft": SFT, "x": {**GRPO, "start": "sft"}}
    with pytest.raises(ConfigError, match=r"arms x -> sft -> x form a circle.*compare.match=samples; compare.to names"):
        resolve(recipe(tmp_path, arms, "compare: {match: samples}"), "x")
    resolve(recipe(tmp_path, arms, "compare: {match: samples, to: sft}"), "x")


@pytest.mark.parametrize("key", ["start", "average", "replay", "self_sft"])
def test_keys_of_arms_stand_in_arms(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is what makes an arm another one; write it under arms.NAME"):
        resolve(recipe(tmp_path, {"sft": SFT}, f"{key}: sft"), "sft")
    with pytest.raises(ConfigError, match=f"command line: {key} is what makes"):
        resolve(recipe(tmp_path, {"sft": SFT}), "sft", [f"{key}=sft"])


def test_replayed_rows_that_hold_a_benchmark_are_refused_before_anything_runs(tmp_path: Path) -> None:
    arms = own(replay={"data": "generate:sums_heldout", "share": 0.2})
    loaded = recipe(tmp_path, arms)
    with pytest.raises(
        ConfigError, match=r"replay.data='generate:sums_heldout' holds what is evaluated: \d+ rows, the fir"
    ):
        check(resolve(loaded, "x"), dry_run=True)
    check(resolve(loaded, "x", ["data.leakage=drop"]), dry_run=True)
