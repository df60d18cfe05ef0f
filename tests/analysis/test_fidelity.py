"""Top-K against full entropy, and the closed form of the gradient."""

import math

import numpy as np
import pytest
import torch
from analysis.made_stores import random_columns, write_store

from eaft_verl.analysis.blocks import blocks
from eaft_verl.analysis.fidelity import StoredAgreement, measure
from eaft_verl.analysis.gradient import POINTS, field
from eaft_verl.objectives import weighted_nll
from eaft_verl.recipe.objective import build_objective
from eaft_verl.tokens.logits import topk_entropy
from eaft_verl.tokens.stats import TokenStats


def test_agreement_of_a_store_against_numpy(tmp_path, monkeypatch):
    monkeypatch.setattr("eaft_verl.analysis.blocks.ROWS", 97)
    columns = random_columns(10, 80, seed=4)
    part = StoredAgreement(20, 384)
    for block in blocks(write_store(tmp_path, **columns), ("entropy", "full_entropy", "top_k_mass"), {}):
        part.add(block)
    found = part.result()
    assert found["pearson"] == pytest.approx(np.corrcoef(columns["entropy"], columns["full_entropy"])[0, 1], abs=1e-6)
    gap = columns["full_entropy"] - columns["entropy"]
    assert found["max_error"] == pytest.approx(gap.max(), rel=1e-5)
    assert found["mean_error"] == pytest.approx(gap.mean(), rel=1e-5)
    assert found["mass"] == pytest.approx(columns["top_k_mass"].mean(), rel=1e-6)
    assert np.sum(found["histogram"]) == 800


def test_constant_entropies_have_no_correlation(tmp_path):
    part = StoredAgreement(20, 384)
    store = write_store(tmp_path, token=np.zeros(5), logprob=np.zeros(5), entropy=np.full(5, 0.3))
    for block in blocks(store, ("entropy", "full_entropy", "top_k_mass"), {}):
        part.add(block)
    assert part.result()["pearson"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_k_against_float64(dtype):
    logits = (torch.randn(700, 90, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    found = measure(iter(logits.split(300)), (5, 20, 90, 1000))
    assert [row["k"] for row in found["rows"]] == [5, 20, 90]  # 1000 is more than the vocabulary
    wide = logits.double()
    full = torch.special.entr(wide.softmax(-1)).sum(-1)
    for row in found["rows"]:
        topk = topk_entropy(wide.topk(row["k"]).values)
        assert row["tokens"] == 700
        assert row["pearson"] == pytest.approx(float(torch.corrcoef(torch.stack([topk, full]))[0, 1]), abs=1e-5)
        assert row["max_error"] == pytest.approx(float((full - topk).abs().max()), abs=1e-4)
        mass = wide.softmax(-1).sort(descending=True).values[:, : row["k"]].sum(-1).mean()
        assert row["mass"] == pytest.approx(float(mass), abs=1e-5)
        assert row["microseconds"] > 0
    assert found["rows"][2]["max_error"] < 1e-4


def test_memory_of_k_is_that_of_its_tensors():
    """float32 logits: at the peak values (4 bytes) and indices (8) of a token are alive, or three floats of 4."""
    rows = measure([torch.randn(64, 500)], (10, 100))["rows"]
    assert [row["bytes"] / row["k"] for row in rows] == [12.0, 12.0]


@pytest.mark.parametrize("name", ["sft", "eaft", "eaft_sigmoid", "dft", "talr"])
def test_the_field_is_the_gradient_that_autograd_finds(name):
    """At one point of the plane: a distribution with that p and that entropy, found by bisection."""
    objective, k, tau = build_objective(name), 20, 1.3
    square = field(objective, k, tau)
    assert square is not None
    checked = 0
    for i, j in ((4, 20), (20, 40), (40, 40), (60, 25), (2, 60)):
        if square[i][j] is None:
            continue
        p, entropy = (i + 0.5) / POINTS, (j + 0.5) / POINTS * math.log(k)
        logits = _with(p, entropy, k)
        logits.requires_grad_(True)
        logprob = logits.log_softmax(-1)[:, 0]
        stats = TokenStats(logprob.detach(), topk_entropy(logits.detach()), k, tau=tau)
        assert float(stats.entropy_T) == pytest.approx(entropy, abs=1e-6)
        weighted_nll(-logprob, objective.weight(stats), torch.ones(1, dtype=torch.bool), 1).backward()
        assert float(logits.grad.abs().sum()) == pytest.approx(square[i][j], rel=1e-5)
        checked += 1
    assert checked >= 3


def _with(p, entropy, k):
    """Logits [1, k] of a distribution with p for the first token and that entropy, by bisection on its sharpness."""
    low, high = 0.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        rest = torch.softmax(-middle * torch.arange(k - 1, dtype=torch.float64), -1) * (1 - p)
        full = torch.cat([torch.tensor([p], dtype=torch.float64), rest])
        found = float(torch.special.entr(full).sum())
        low, high = (middle, high) if found > entropy else (low, middle)
    return full.clamp(min=1e-300).log()[None]


def test_cells_where_no_model_can_be_are_empty():
    square = field(build_objective("sft"), 20, 1.0)
    assert square[POINTS // 2][0] is None
    assert square[POINTS - 2][POINTS - 1] is None
    assert field(build_objective("deft"), 20, 1.0) is None
    assert field(build_objective("flow"), 20, 1.0) is None
