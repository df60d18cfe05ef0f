"""An average made for real, a start found with its cost, and both called stale when what they come from has changed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from config_fixtures import composed_once  # noqa: F401
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eaft_verl.data.prepare import template_hash
from eaft_verl.errors import RunError
from eaft_verl.experiment.chain import began_at, cost_until, start_of
from eaft_verl.experiment.stored import differences
from eaft_verl.experiment.train import train
from eaft_verl.models import load_tokenizer, model_key
from eaft_verl.recipe.config import as_yaml, changed
from eaft_verl.recipe.resolve import declared_keys, load_recipe, resolve
from eaft_verl.runs import Run, step_name
from eaft_verl.training.export import export_weights

RECIPE = """
model: {folder}/model
device: cpu
output: {folder}/out
data: {{train: {folder}/train.jsonl, heldout: {folder}/heldout.jsonl, max_length: 128}}
evaluate: {{}}
verl: {{data: {{train_batch_size: 8, max_token_len_per_gpu: 256}}}}
arms:
  sft: {{objective: {{name: sft}}}}
  next: {{objective: {{name: eaft, anchor: {{kind: forward_kl, coef: 0.1}}}}, start: {{arm: sft, step: 2}}}}
  mean: {{average: {{of: sft, weights: [0.5, 0.0, 1.0]}}}}
"""
BEFORE = {"updates": 7, "tokens": 70, "samples": 56, "device_seconds": 14.0}


@pytest.fixture
def folder(tmp_path: Path, tiny_model_path: Path) -> Path:
    (tmp_path / "model").symlink_to(tiny_model_path)
    tiny.write_sums(tmp_path / "train.jsonl", 16, seed=1)
    tiny.write_sums(tmp_path / "heldout.jsonl", 4, seed=2)
    (tmp_path / "r.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def arm(folder: Path, name: str) -> Any:
    return resolve(load_recipe(folder / "r.yaml"), name)


@pytest.fixture
def sft(folder: Path) -> Run:
    """A run as training leaves it: 4 updates on 2 devices, exports of two of them, begun at a chain of its own."""
    config = arm(folder, "sft")
    keys = {"model": model_key(config.model), "template": template_hash(load_tokenizer(folder / "model"))}
    info = {"kind": "arm", "recipe": "r", "arm": "sft", "seed": 0, "status": "finished", "total_steps": 4, "keys": keys}
    info |= {"train_seconds": 40.0, "workers": 2, "derived": {"start": {"before": BEFORE}}}
    run = Run.create(folder / "out" / "sft-seed0", info=info, config=as_yaml(config), env={})
    for step in (1, 2, 3, 4):
        run.log({"split": "train", "step": step, "tokens": 100 * step, "samples": 8 * step, "seconds": 9.0 * step})
    for step in (2, 4):
        torch.manual_seed(step)
        state = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).state_dict()
        moved = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in state.items()}
        target = run.path / "checkpoints" / step_name(step)
        export_weights(moved.items(), target, str(folder / "model"), "float32", write=True)
    return run


def test_what_a_chain_cost_until_a_step(folder: Path, sft: Run) -> None:
    assert cost_until(sft, 4) == {"updates": 11, "tokens": 470, "samples": 88, "device_seconds": 94.0}
    start = start_of(arm(folder, "next"))
    assert start is not None and start.step == 2 and start.folder == sft.checkpoints()[2]
    assert start.before == {"updates": 9, "tokens": 270, "samples": 72, "device_seconds": 50.0}
    config = arm(folder, "next")
    with pytest.raises(RunError, match="has no export of step 3, from which next is to start; it has 2, 4: set start"):
        start_of(changed(config, {"start.step": 3}))
    chosen = changed(config, {"start.step": "chosen"})
    with pytest.raises(RunError, match="no checkpoint of .*sft-seed0 is chosen"):
        start_of(chosen)
    (sft.path / "chosen").symlink_to(sft.checkpoints()[4])
    assert (found := start_of(chosen)) is not None and found.step == 4


def test_where_a_run_began_must_be_as_it_was(folder: Path, sft: Run) -> None:
    record = start_of(arm(folder, "next")).record  # type: ignore[union-attr]
    run = Run.create(folder / "out" / "next-seed0", info={"derived": {"start": record}}, config="", env={})
    assert began_at(run) == sft.checkpoints()[2]
    shutil.copy(sft.checkpoints()[4] / "model.safetensors", sft.checkpoints()[2] / "model.safetensors")
    with pytest.raises(RunError, match="which is not there any more, or is another model now"):
        began_at(run)


def test_an_average_is_trained_by_nobody(folder: Path, sft: Run) -> None:
    config = arm(folder, "mean")
    run = train(config, declared_keys(load_recipe(folder / "r.yaml"), "mean"))
    assert run.info["status"] == "finished" and run.info["total_steps"] == 3
    assert run.info["average"] == {"of": "sft", "with": "base", "weights": {"1": 0.0, "2": 0.5, "3": 1.0}}
    base, tuned, *made = (
        load_file(path / "model.safetensors")
        for path in (folder / "model", sft.checkpoints()[4], *run.checkpoints().values())
    )
    for name, weight in tuned.items():
        assert torch.equal(made[0][name], base[name]) and torch.equal(made[2][name], weight)
        torch.testing.assert_close(made[1][name], (base[name] + weight) / 2)
    assert differences(run, config) == []
    shutil.copy(sft.checkpoints()[2] / "model.safetensors", sft.checkpoints()[4] / "model.safetensors")
    (found,) = differences(run, config)
    assert found.startswith("average: the checkpoint of sft is another one (")
