"""Distance and ranks of a weight change against numpy's singular values, of full, sharded and low-rank changes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eaft_verl.analysis.weight_change import spectrum_ranks, weight_change
from eaft_verl.errors import RunError


def folder(path: Path, weights: dict[str, torch.Tensor], shards: int = 1) -> Path:
    path.mkdir()
    names = sorted(weights)
    if shards == 1:
        save_file(weights, path / "model.safetensors")
        return path
    places = {}
    for shard in range(shards):
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, path / f"model-{shard}.safetensors")
        places |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    layers = {f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(24, 40) for layer in (0, 1, 10)}
    return {**layers, "model.layers.0.norm.weight": torch.randn(40), "model.embed_tokens.weight": torch.randn(60, 40)}


@pytest.mark.parametrize("shards", [1, 3])
def test_distance_and_ranks_are_those_of_numpy(tmp_path: Path, shards: int) -> None:
    before, after = weights(0), weights(1)
    after["model.layers.1.mlp.up_proj.weight"] = before["model.layers.1.mlp.up_proj.weight"].clone()
    found = weight_change(folder(tmp_path / "a", before), folder(tmp_path / "b", after, shards))
    squared = sum(float((after[name] - before[name]).double().square().sum()) for name in before)
    norm = math.sqrt(sum(float(weight.double().square().sum()) for weight in before.values()))
    assert (found["distance"], found["relative"]) == pytest.approx((math.sqrt(squared), math.sqrt(squared) / norm))
    layers = {row["layer"]: row for row in found["layers"]}
    assert list(layers) == [0, 1, 10, None] and found["missing"] == []
    change = (after["model.layers.10.mlp.up_proj.weight"] - before["model.layers.10.mlp.up_proj.weight"]).numpy()
    values = np.linalg.svd(change.astype(float), compute_uv=False)
    share = values / values.sum()
    assert layers[10]["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-6)
    assert layers[10]["effective_rank"] == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-6)
    assert layers[1] == {"layer": 1, "relative": 0.0, "stable_rank": None, "effective_rank": None}


def test_a_merged_adapter_has_the_rank_of_the_adapter(tmp_path: Path) -> None:
    before = weights(0)
    name = "model.layers.0.mlp.up_proj.weight"
    left, right = torch.linalg.qr(torch.randn(24, 4))[0], torch.linalg.qr(torch.randn(40, 4))[0]
    after = {**before, name: before[name] + 5 * left @ right.T}
    found = weight_change(folder(tmp_path / "a", before), folder(tmp_path / "b", after))
    assert found["layers"][0]["stable_rank"] == pytest.approx(4, rel=1e-4)
    assert found["layers"][0]["effective_rank"] == pytest.approx(4, rel=1e-3)
    assert found["distance"] == pytest.approx(10, rel=1e-5)


def test_ranks_of_known_matrices() -> None:
    assert spectrum_ranks(torch.eye(7)) == pytest.approx((7, 7))
    assert spectrum_ranks(torch.ones(5, 9) * 1e-30) == pytest.approx((1, 1), abs=1e-6)
    assert spectrum_ranks(torch.diag(torch.tensor([2.0, 1.0, 1.0])))[0] == pytest.approx(6 / 4)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    before = weights(0)
    other = {**before, "model.embed_tokens.weight": torch.zeros(61, 40)}
    with pytest.raises(RunError, match=r"embed_tokens.weight is \(60, 40\) in the base and \(61, 40\)"):
        weight_change(folder(tmp_path / "a", before), folder(tmp_path / "b", other))
    tied = {name: weight for name, weight in before.items() if "embed" not in name} | {
        "lm_head.weight": torch.ones(2, 2)
    }
    found = weight_change(tmp_path / "a", folder(tmp_path / "c", tied))
    assert found["missing"] == ["lm_head.weight", "model.embed_tokens.weight"]
