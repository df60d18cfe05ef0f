"""A model trained as one FSDP unit and layer by layer: the same numbers, and states that either goes on from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine_cases import ALL_ROWS, examples
from one_worker import start_worker, without_ray

LAYERS = 2  # of the tiny model
SETUPS = {
    "float32": ["verl.engine.mixed_precision={param_dtype: fp32, reduce_dtype: fp32}"],
    "bfloat16": ["verl.engine.mixed_precision={param_dtype: bf16, reduce_dtype: fp32}"],
    "checkpointing": ["verl.model.enable_gradient_checkpointing=true"],
    "whole logits": ["fused_head=false"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("units")
    for name, tied in (("tied", True), ("untied", False)):
        tiny.tiny_model(folder / name, tied=tied)
    (folder / "recipe.yaml").write_text(
        "device: cpu\ndata: {train: x, max_length: 64}\narms: {sft: {objective: {name: sft}}}\n"
        "verl: {optim: {lr: 1.0e-3}, data: {train_batch_size: 8, max_token_len_per_gpu: 64}}\n"
    )
    with without_ray(folder):
        yield folder


def worker_of(folder: Path, model: str, one_unit: bool, words: list[str]) -> Any:
    from eaft_verl.recipe.objective import build_objective
    from eaft_verl.recipe.resolve import load_recipe, resolve
    from eaft_verl.training.sft.loss import TokenLoss

    said = f"verl.engine.wrap_policy.disable={str(one_unit).lower()}"
    config = resolve(load_recipe(folder / "recipe.yaml"), "sft", [f"model={folder / model}", said, *words])
    return start_worker(config, str(folder / model), 10, TokenLoss(build_objective("eaft")), None)


def units(group: Any) -> int:
    from torch.distributed.fsdp import FSDPModule

    return sum(isinstance(module, FSDPModule) for module in group._worker.engine.module.modules())


def updates(group: Any, count: int) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of so many updates, each of several micro-batches."""
    from verl.utils import tensordict_utils as tu

    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.loss import BATCH_FLAGS

    found = []
    for _ in range(count):
        batch = make_batch(examples(), list(ALL_ROWS), {**BATCH_FLAGS, "update_lr_scheduler": True})
        metrics = tu.get(group.train_batch(batch).get(), "metrics")
        found.append((metrics["loss"], metrics["grad_norm"]))
    return found


def weights(group: Any) -> dict[str, torch.Tensor]:
    found = group._worker.engine.module.state_dict()
    return {name: weight.full_tensor().clone() for name, weight in found.items()}


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("setup", SETUPS)
def test_the_numbers_are_the_same(folder: Path, model: str, setup: str) -> None:
    """To the last bit: the same operations on the same parameters, only the hooks are fewer."""
    layers, whole = (worker_of(folder, model, one, SETUPS[setup]) for one in (False, True))
    own = 0 if model == "tied" else 2  # embedding and head
    assert (units(layers), units(whole)) == (1 + own + LAYERS, 1 + own)
    assert layers._worker.unfused == whole._worker.unfused
    start = weights(whole)
    assert updates(layers, 2) == updates(whole, 2)
    one, other = weights(layers), weights(whole)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(start["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("first", [True, False], ids=["one unit, then layers", "layers, then one unit"])
def test_a_state_of_either_is_gone_on_from_as_the_other(folder: Path, tmp_path: Path, first: bool) -> None:
    before, after = (worker_of(folder, "tied", one, []) for one in (first, not first))
    updates(before, 2)
    before.save_checkpoint(str(tmp_path / "state"), None, 2, None)
    after.load_checkpoint(str(tmp_path / "state"))
    assert updates(before, 1) == updates(after, 1)
    one, other = weights(before), weights(after)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_frozen_part_stays_as_it_is(folder: Path) -> None:
    """Frozen and trained weights share the unit: only the trained ones have gradients to reduce."""
    found = []
    for one in (False, True):
        group = worker_of(folder, "tied", one, [])
        named = dict(group._worker.engine.module.named_parameters())
        frozen = [name for name in named if "layers.0" in name]
        for name in frozen:
            named[name].requires_grad_(False)
        start = weights(group)
        losses = updates(group, 2)
        end = weights(group)
        assert all(torch.equal(start[name], end[name]) for name in frozen)
        found.append((losses, end["model.layers.1.mlp.up_proj.weight"]))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_a_frozen_reference_is_taken_layer_by_layer(folder: Path) -> None:
    """It may be a larger model than the trained one."""
    from eaft_verl.recipe.resolve import load_recipe, resolve
    from eaft_verl.training.sft.workers import worker_config

    words = [f"model={folder / 'tied'}", "verl.engine.wrap_policy.disable=true"]
    config = resolve(load_recipe(folder / "recipe.yaml"), "sft", words)
    settings = worker_config(config, str(folder / "tied"), 10, str(folder / "untied"))
    assert settings.engine_config.wrap_policy["disable"]
    assert settings.extra_context["reference"]["engine_config"].wrap_policy == {}
