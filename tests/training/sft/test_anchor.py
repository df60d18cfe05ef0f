"""Arms with a reference: live through Ray, and stored, of another model, adapter off and old policy in this process."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from one_worker import without_ray

from eaft_verl.errors import ConfigError, RunError
from eaft_verl.experiment.train import train
from eaft_verl.files import read_json, write_json
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import declared_keys, load_recipe, resolve
from eaft_verl.runs import Run

RECIPE = """
model: {folder}/model
device: cpu
output: {folder}/out
data: {{train: {folder}/train.jsonl, max_length: 128}}
evaluate: {{target: [sums], points: 1}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  optim: {{lr: 1.0e-3, lr_scheduler_type: constant, lr_warmup_steps_ratio: 0.0}}
  data: {{train_batch_size: 8, max_token_len_per_gpu: 256}}
  trainer: {{total_training_steps: 3}}
arms:
  live: {{objective: {{name: sft_kl}}}}
  stored: {{objective: {{name: sft, anchor: {{kind: forward_kl_topk, coef: 0.5, k: 384}}}}}}
  adapter: {{objective: {{name: sft_kl}}, verl: {{model: {{lora_rank: 4}}}}}}
  trusted: {{objective: {{name: psft, updates_per_refresh: 2}}}}
  other: {{objective: {{name: sft, anchor: {{kind: forward_kl_topk, reference: {folder}/other}}}}}}
  foreign: {{objective: {{name: sft_kl, anchor: {{kind: forward_kl, reference: {folder}/foreign}}}}}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("anchoring")
    tiny.tiny_model(folder / "model")
    tiny.tiny_model(folder / "other", seed=3)
    tiny.write_sums(folder / "train.jsonl", 16, 1)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return load_recipe(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def live(recipe: Any) -> list[dict[str, Any]]:
    """The arm that has its reference beside the trained model, in a worker of Ray's."""
    import ray

    before = dict(os.environ)
    rows = trained(recipe, "live")[1]
    assert not ray.is_initialized()
    os.environ.clear()
    os.environ.update(before)
    return rows


@pytest.fixture(scope="module")
def here(recipe: Any) -> Iterator[None]:
    """What is trained from now on is trained in this process."""
    with without_ray(recipe.path.parent):
        yield


def trained(recipe: Any, arm: str) -> tuple[Run, list[dict[str, Any]]]:
    config = resolve(recipe, arm)
    check(config)
    run = train(config, declared_keys(recipe, arm))
    assert run.info["status"] == "finished" and run.info["memory_gib_per_worker"][0] > 0
    return run, run.metrics()


def test_live_and_stored_reference_train_alike(recipe: Any, live: list[dict[str, Any]], here: None) -> None:
    """K = V makes the stored reference the full one."""
    run, stored = trained(recipe, "stored")
    assert live[0]["anchor_kl"] == 0.0 and live[0]["loss"] == pytest.approx(live[0]["nll"], rel=1e-6)
    assert live[-1]["anchor_kl"] > 1e-3
    for name in ("loss", "nll", "anchor_kl", "grad_norm"):
        assert [row[name] for row in stored] == pytest.approx([row[name] for row in live], rel=1e-4, abs=1e-6), name
    assert live[2]["loss"] == pytest.approx(live[2]["nll"] + 0.5 * live[2]["anchor_kl"], rel=1e-5)
    folder = run.path.parent / "data" / "reference_k384"
    ids = np.load(folder / "ids.npy", mmap_mode="r")
    assert run.info["reference_cache"]["bytes"] == sum(part.stat().st_size for part in folder.glob("*.npy"))
    assert len(ids) == sum(row["step_tokens"] for row in stored if row["epoch"] <= 1)


def test_a_stored_reference_is_reused_and_never_when_stale(recipe: Any, here: None) -> None:
    output = Path(resolve(recipe, "stored").output)
    folder = output / "data" / "reference_k384"
    made = (folder / "ids.npy").stat().st_mtime_ns
    shutil.rmtree(output / "stored-seed0")
    trained(recipe, "stored")
    assert (folder / "ids.npy").stat().st_mtime_ns == made
    write_json(folder / "meta.json", {**read_json(folder / "meta.json"), "key": "of another model"})
    shutil.rmtree(output / "stored-seed0")
    with pytest.raises(RunError, match="stale; delete it"):
        trained(recipe, "stored")
    assert "stale" in Run(output / "stored-seed0").info["error"]


def test_without_its_adapter_the_model_is_its_own_reference(recipe: Any, here: None) -> None:
    rows = trained(recipe, "adapter")[1]
    assert rows[0]["anchor_kl"] == 0.0 and 0 < rows[-1]["anchor_kl"] < 0.1


def test_psft_starts_each_refresh_at_ratio_one(recipe: Any, here: None) -> None:
    rows = trained(recipe, "trusted")[1]
    assert [rows[step]["loss"] for step in (0, 2)] == pytest.approx([-1.0, -1.0], abs=1e-5)
    assert [rows[step]["weight_mean"] for step in (0, 2)] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert rows[1]["weight_mean"] != pytest.approx(1.0, abs=1e-3)


def test_another_reference_diverges_from_the_start(recipe: Any, here: None) -> None:
    assert trained(recipe, "other")[1][0]["anchor_kl"] > 0.1


def test_another_vocabulary_is_refused_before_work_starts(recipe: Any, here: None) -> None:
    folder = recipe.path.parent
    shutil.copytree(folder / "other", folder / "foreign", dirs_exist_ok=True)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "other")
    model.resize_token_embeddings(400)
    model.save_pretrained(folder / "foreign")
    with pytest.raises(ConfigError, match="400 logits per token and the model 384"):
        trained(recipe, "foreign")
    assert not (Path(resolve(recipe, "foreign").output) / "foreign-seed0").exists()


def test_an_adapter_is_no_model(recipe: Any) -> None:
    folder = recipe.path.parent / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    config = resolve(recipe, "other", [f"objective.anchor.reference={folder}"])
    with pytest.raises(ConfigError, match="LoRA adapter without its base"):
        check(config)
