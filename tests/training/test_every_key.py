"""Every key of a resolved configuration does something: changing it changes what a consumer is given, or is refused."""

import copy
import dataclasses
import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import verl
from config_fixtures import composed_once  # noqa: F401
from omegaconf import OmegaConf
from omegaconf.grammar_parser import parse

from eaft_verl.cluster.demand import demand_of
from eaft_verl.errors import ConfigError
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.config import plain
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.recipe.verl_keys import compose_verl, grpo_tree
from eaft_verl.recipe.views import data_spec, evaluate_settings, objective_of
from eaft_verl.reporting.comparability import flatten
from eaft_verl.training.grpo import config as grpo
from eaft_verl.training.schedule import training_plan
from eaft_verl.training.sft.trainer import total_steps
from eaft_verl.training.sft.workers import worker_config

RECIPE = """
model: {folder}/model
device: {device}
data: {{train: {folder}/train.jsonl, heldout: {folder}/heldout.jsonl, max_length: 128}}
evaluate: {{target: [sums]}}
verl: {{data: {{train_batch_size: 8, max_token_len_per_gpu: 256}}}}
arms:
  sft: {{objective: {{name: sft}}}}
  grpo: {{trainer: grpo, verl: {{data: {{max_response_length: 16}}}}}}
  probed: {own}
"""
# keys that a class of ours reads where this test has none of its objects: key -> module that names it
READ_ELSEWHERE = {
    "seed": "training/sft/trainer.py",
    "name": "experiment/train.py",
    "verl.trainer.save_freq": "training/sft/trainer.py",
    "verl.trainer.test_freq": "training/sft/trainer.py",
    "verl.trainer.max_ckpt_to_keep": "training/sft/trainer.py",
    "verl.trainer.balance_batch": "training/sft/trainer.py",
    "verl.data.train_batch_size": "training/sft/trainer.py",
    "data.leakage": "recipe/datasets.py",
    "data.max_rejected": "recipe/datasets.py",
    "evaluate.backend": "evaluation/settings.py",
    "output": "experiment/train.py",
    "save_minutes": "training/sft/trainer.py",
    "async_save": "training/sft/trainer.py",
    "resume": "training/sft/run.py",
    "evaluate.points": "experiment/evaluate.py",
    "choose": "experiment/compare.py",
    "meter": "training/sft/meter.py",
    "trackers": "training/trackers.py",
}
OTHER = {  # values that another rule of the same key allows
    "verl.optim.lr_scheduler_type": "constant",
    "verl.engine.model_dtype": "bf16",
    "verl.engine.wrap_policy.disable": True,
    "verl.trainer.save_freq": 7,
    "verl.trainer.test_freq": 7,
    "verl.trainer.max_ckpt_to_keep": 5,
    "data.over_long": "drop",
    "resume": "strict",
    "data.control_tokens": "escape",
    "data.turns": "last",
    "data.leakage": "drop",
    "compare.match": "samples",
    "evaluate.limit": 3,
    "data.rows": 3,
    "data.heldout_rows": 3,
    "verl.trainer.total_training_steps": 9,
    "verl.data.max_token_len_per_gpu": 512,
    "verl.data.train_batch_size": 16,
    "data.max_length": 96,
    "objective.name": "eaft",
    "reward.grader": "exact",
    "verl.optim.lr_warmup_steps": 3,
    "choose": {"forget_at_most": {"general": 0}},
    "meter": {"every": 3},
    "trackers": ["wandb"],
}
ENGINE_SOURCES = ("workers/engine/fsdp", "workers/config", "workers/engine_workers.py", "utils/fsdp_utils.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    made = tmp_path_factory.mktemp("keys")
    (made / "model").symlink_to(tiny_model_path)
    tiny.write_sums(made / "train.jsonl", 8, seed=1)
    tiny.write_sums(made / "heldout.jsonl", 4, seed=2)
    return made


def resolved(folder: Path, arm: str, changes: dict[str, Any]) -> Any:
    """The arm with some keys of its own, as a recipe would say them."""
    own = OmegaConf.create({"objective": {"name": "sft"}} if arm == "sft" else {"trainer": "grpo"})
    if arm == "grpo":
        OmegaConf.update(own, "verl.data.max_response_length", 16, force_add=True)
    for key, value in changes.items():
        OmegaConf.update(own, key, value, force_add=True)
    text = RECIPE.format(folder=folder, device="cpu", own="{}")
    tree = OmegaConf.merge(OmegaConf.create(text), {"arms": {"probed": own}})
    (folder / "r.yaml").write_text(OmegaConf.to_yaml(tree))
    config = resolve(load_recipe(folder / "r.yaml"), "probed")
    check(config)
    return config


def given(config: Any) -> dict[str, Any]:
    """What every consumer gets of the configuration."""
    seen: dict[str, Any] = {
        "model": config.model,
        "data": [dataclasses.asdict(data_spec(config, which)) for which in ("train", "heldout")],
        "evaluate": dataclasses.asdict(evaluate_settings(config)),
        "demand": demand_of(config),
        "compare": [plain(config.compare), plain(config.control), plain(config.budget)],
    }
    if config.trainer == "grpo":
        files, schedule = grpo.RunFiles("prompts", config.model, "run"), grpo.Schedule(4, [4], [])
        tree = flatten(plain(grpo.ppo_config(config, files, schedule, [1], "bfloat16")))
        return {**seen, "main_ppo": tree, "reward": plain(config.reward), "steps": grpo.total_ppo_steps(config, 64)}
    plan = training_plan(config, 40, 1)
    return {
        **seen,
        "engine": vars(worker_config(config, config.model, 8)),
        "objective": objective_of(config),
        "plan": sorted(map(str, vars(plan).items())),
        "steps": total_steps(config, 64),
    }


def alternatives(key: str, value: Any) -> list[Any]:
    """Other values to try, until one is accepted."""
    if key in OTHER:
        return [OTHER[key]]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2 or 2]
    if isinstance(value, float):
        return [value / 2 + 0.01]
    if isinstance(value, list):
        return [[0.5, 0.6] if value and isinstance(value[0], float) else ["products"]]
    return [3, "other", {"other": 1}] if value is None else ["other"]


def leaves(config: Any) -> dict[str, Any]:
    """Dotted keys that a recipe may set, with their values."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for name, item in value.items():
                walk(f"{prefix}.{name}".lstrip("."), item)
        elif not prefix.endswith("_target_"):
            found[prefix] = value

    walk("", plain(config))
    return {
        key: value for key, value in found.items() if key.split(".")[0] not in ("recipe", "arm", "budget", "trainer")
    }


def without_effect(folder: Path, arm: str) -> list[str]:
    """Keys that are accepted with another value and change nothing."""
    base = resolved(folder, arm, {})
    before, idle = given(base), []
    for key, value in leaves(base).items():
        for other in alternatives(key, value):
            try:
                changed = given(resolved(folder, arm, {key: other}))
            except (ConfigError, ValueError, TypeError, AttributeError, AssertionError):
                continue  # refused, by us or by verl's own dataclasses
            if changed == before and not read_elsewhere(key):
                idle.append(f"{key}={other!r}")
            break
    return idle


def read_elsewhere(key: str) -> bool:
    module = READ_ELSEWHERE.get(key)
    if module is None:
        return False
    text = (Path(grpo.__file__).parents[2] / module).read_text()
    return re.search(rf"\b{key.rpartition('.')[2]}\b", text) is not None


class ReadOnly(OmegaConf):
    """What has no references left is only read here, so a plain tree will do: nodes are most of this test's time."""

    @staticmethod
    def create(tree: Any) -> Any:
        return OmegaConf.create(tree) if "${" in repr(tree) else tree


@pytest.mark.parametrize("arm", ["sft", "grpo"])
def test_no_key_is_accepted_and_ignored(folder: Path, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.utils.config.omega_conf_to_dataclass", plain)  # as given: verl's would load the model
    monkeypatch.setattr("verl.workers.config.TrainingWorkerConfig", lambda **parts: SimpleNamespace(**parts))
    ppo = OmegaConf.create(plain(compose_verl("ppo_trainer")))
    monkeypatch.setattr(grpo, "compose_verl", lambda name: ppo)
    monkeypatch.setattr(grpo, "OmegaConf", ReadOnly)
    extension = grpo_tree("cpu")
    monkeypatch.setattr("eaft_verl.recipe.resolve.grpo_tree", lambda device: copy.deepcopy(extension))
    monkeypatch.setattr("omegaconf.base.parse", functools.cache(parse))  # the same references for every key
    assert without_effect(folder, arm) == []


def test_every_key_of_verls_engine_is_read_by_it(folder: Path) -> None:
    """A field of verl's dataclass that its FSDP engine never looks at would reach the engine and do nothing."""
    root = Path(verl.__file__).parent
    files = [
        file
        for part in ENGINE_SOURCES
        for file in ((root / part).rglob("*.py") if (root / part).is_dir() else [root / part])
    ]
    text = "\n".join(re.sub(r"^    [a-z_]+: .*$", "", file.read_text(), flags=re.M) for file in files)
    tree = plain(resolved(folder, "sft", {}))["verl"]
    for part in ("model", "engine", "optim"):
        for key in tree[part].keys() - {"_target_"}:
            assert re.search(rf"""\.{key}\b|["']{key}["']""", text), f"verl.{part}.{key}"
