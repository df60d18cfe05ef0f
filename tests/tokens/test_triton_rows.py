"""The Triton kernels under Triton's interpreter on the CPU, against ten lines of float64; how they are chosen."""

import importlib
import math
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from eaft_verl.objectives import Eaft, weighted_nll
from eaft_verl.tokens import row_kernels
from eaft_verl.tokens.head import Head, head_statistics
from eaft_verl.tokens.logits import reference_stats, row_distribution, row_gradient, row_statistics
from eaft_verl.tokens.row_kernels import CHUNKED, RowKernels, kernels_for, verified
from eaft_verl.tokens.stats import TokenStats

V, PADDED = 301, 7


@pytest.fixture(scope="module")
def rows() -> Iterator[ModuleType]:
    """The kernels' module, interpreted, with small blocks: several of them a row."""
    pytest.importorskip("triton")
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("with a GPU tests/gpu does this")
    module = importlib.import_module("eaft_verl.tokens.triton_rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 128)
        patch.setattr(module, "GROUP", 32)
        yield module


def logits(dtype: torch.dtype) -> Tensor:
    """Rows from flat to certain; one with many ties, one with all equal, one with two finite logits; padded columns."""
    draw = torch.Generator().manual_seed(0)
    made = torch.randn(6, V, generator=draw) * torch.tensor([0.1, 2.0, 12.0, 3.0, 0.0, 1.0])[:, None]
    made[3] = made[3].round()
    made[5, 2:] = -math.inf
    made[:, -PADDED:] = -math.inf
    return made.to(dtype)


def definition(logits_V: Tensor, label: int, k: int, weight: float) -> tuple[list[float], Tensor]:
    """(nll, H_k, H_20, label is a largest, sum p^2, full entropy) and the gradient, in float64, by the papers."""
    prob = torch.exp(logits_V - logits_V.max())
    prob = prob / prob.sum()
    entropies = []
    for size in (k, 20, V):
        best = prob.sort(descending=True).values[:size]
        best = best[best > 0] / best.sum()
        entropies.append(float(-(best * best.log()).sum()))
    onehot = torch.zeros_like(prob)
    onehot[label] = 1.0
    largest = float(logits_V[label] == logits_V.max())
    nll, squares = -math.log(float(prob[label])), float((prob**2).sum())
    return [nll, *entropies[:2], largest, squares, entropies[2]], weight * (prob - onehot)


@pytest.mark.parametrize(
    ("dtype", "k"), [(torch.float32, 1), (torch.float32, 20), (torch.float32, V), (torch.bfloat16, 20)], ids=str
)
def test_statistics_and_gradient_of_every_kind_of_row(rows: ModuleType, dtype: torch.dtype, k: int) -> None:
    given, weights = logits(dtype), torch.tensor([1.0, 0.5, 0.25, 0.0, -2.0, 1.0])
    labels = torch.tensor([0, 5, int(given[2].float().argmax()), 7, 293, 1])
    stats, held, sums = rows.triton_statistics(given.clone(), labels, k, True, True)
    gradient = rows.triton_gradient(held, sums, labels, weights, dtype)
    rounding = 1e-6 if dtype == torch.float32 else 8e-3  # the interpreter cuts to bfloat16 where a GPU rounds
    for row, label in enumerate(labels.tolist()):
        expected, slope = definition(given[row].double(), label, k, float(weights[row]))
        torch.testing.assert_close(stats[:, row].double(), torch.tensor(expected).double(), rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(gradient[row].double(), slope, rtol=rounding, atol=1e-7)
    assert gradient.data_ptr() == held.data_ptr()  # in place


@pytest.mark.parametrize(
    ("dtype", "k"), [(torch.float32, 1), (torch.float32, 20), (torch.float32, V), (torch.bfloat16, 20)], ids=str
)
def test_distribution_of_every_kind_of_row(rows: ModuleType, dtype: torch.dtype, k: int) -> None:
    given = logits(dtype)
    labels = torch.tensor([0, 5, int(given[2].float().argmax()), 7, 293, 1])
    numbers, likeliest = rows.triton_distribution(given, labels, k)
    assert torch.equal(given, logits(dtype)) and likeliest.dtype == torch.int64
    for row, label in enumerate(labels.tolist()):
        line = given[row].double()
        (nll, entropy, _, _, squares, full), _ = definition(line, label, k, 1.0)
        prob = line.softmax(dim=-1)
        expected = [nll, entropy, full, float(prob.max()), squares, float(prob.topk(k).values.sum())]
        torch.testing.assert_close(numbers[:, row].double(), torch.tensor(expected).double(), rtol=2e-5, atol=2e-6)
        assert int(likeliest[row]) == int((line == line.max()).nonzero()[0])


def test_a_row_that_is_not_finite_shows_it(rows: ModuleType) -> None:
    broken = torch.zeros(2, V)
    broken[0, 3] = math.nan
    numbers, likeliest = rows.triton_distribution(broken, torch.tensor([0, 0]), 20)
    assert numbers[0, 0].isnan() and 0 <= int(likeliest.min()) <= int(likeliest.max()) < V
    stats, _, _ = rows.triton_statistics(broken, torch.tensor([0, 0]), 20, False)
    assert stats[0, 0].isnan() and stats[0, 1] == pytest.approx(math.log(V), rel=1e-6)


def test_the_head_by_these_kernels(rows: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained rows, several chunks, EAFT's gradient: three products' worth against autograd in float64."""
    monkeypatch.setattr("eaft_verl.tokens.head.head_chunk", lambda *_, **__: 4)
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, generator=draw).requires_grad_() for n in (9, V))
    labels, mask = torch.randint(V, (9,), generator=draw), torch.arange(9) % 3 != 1
    kernels = RowKernels("triton", rows.triton_statistics, rows.triton_gradient, in_place=True)

    def loss(nll: Tensor, entropy: Tensor) -> Tensor:
        return weighted_nll(nll, Eaft().weight(TokenStats(-nll.detach(), entropy, 20)), mask, 6.0)

    def gate(made: Any, _: Tensor) -> Tensor:
        return Eaft().weight(TokenStats(-made.nll_T, made.entropy_T, 20))

    stats = head_statistics(hidden, Head(weight), labels, mask, gate=gate, kernels=kernels)
    loss(stats.nll_T, stats.entropy_T).backward()
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    truth = reference_stats(exact[0] @ exact[1].T, labels)
    loss(truth.nll_T, truth.entropy_T).backward()
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)
    assert not hidden.grad[~mask].any() and not stats.entropy_T[~mask].any()


@pytest.mark.filterwarnings("error")
def test_chosen_on_a_gpu_only_where_they_give_the_numbers_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels, "chosen", {})
    given, labels = torch.randn(4, V), torch.arange(4)
    asked: list[int] = []

    def some() -> tuple[Tensor, Tensor]:
        asked.append(1)
        return given.clone(), labels

    right = RowKernels("triton", row_statistics, row_gradient)
    monkeypatch.setattr(row_kernels, "triton_kernels", lambda: right)
    assert kernels_for("cpu", torch.float32, V, some) is CHUNKED and not asked
    assert kernels_for("cuda", torch.float64, V, some) is CHUNKED and not asked
    assert kernels_for("cuda", torch.float32, V, lambda: (given[:0], labels[:0])) is CHUNKED
    assert kernels_for("cuda", torch.float32, V, some) is right
    assert kernels_for("cuda", torch.float32, V, some) is right and len(asked) == 1
    wrong = right._replace(gradient=lambda *given: row_gradient(*given).roll(1, dims=1))
    monkeypatch.setattr(row_kernels, "triton_kernels", lambda: wrong)
    with pytest.warns(UserWarning, match="the Triton kernels give another gradient than torch; chunked torch is used"):
        assert kernels_for("cuda", torch.bfloat16, V, some) is CHUNKED
    assert kernels_for("cuda", torch.bfloat16, V, some) is CHUNKED  # said once


def _next_token(logits_RV: Tensor, labels_R: Tensor, k: int) -> tuple[Tensor, Tensor]:
    numbers_6R, likeliest_R = row_distribution(logits_RV, labels_R, k)
    return numbers_6R, (likeliest_R + 1) % V


@pytest.mark.parametrize(
    ("distribution", "said"),
    [
        (_next_token, "another likeliest token"),
        (lambda *given: (row_distribution(*given)[0].roll(1, dims=0), row_distribution(*given)[1]), "another distrib"),
    ],
    ids=["token", "numbers"],
)
def test_a_wrong_distribution_is_not_chosen(distribution: Any, said: str) -> None:
    wrong = RowKernels("triton", row_statistics, row_gradient, distribution=distribution)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_kernels, "triton_kernels", lambda: wrong)
        kernels, why = verified(torch.randn(4, V), torch.arange(4))
    assert kernels is CHUNKED and said in str(why)


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'triton'"), RuntimeError("ptxas failed\nlong"), KeyError()]
)
def test_kernels_that_do_not_run_are_not_chosen(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> RowKernels:
        raise error

    monkeypatch.setattr(row_kernels, "triton_kernels", fails)
    kernels, why = verified(torch.randn(2, V), torch.arange(2))
    assert kernels is CHUNKED and why is not None and type(error).__name__ in why and "\n" not in why


def test_entropies_that_are_slightly_off_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        stats, held, sums = row_statistics(*given)
        return stats + torch.tensor([0.0, 1e-3, 0.0, 0.0, 0.0, 0.0])[:, None], held, sums

    bad = RowKernels("triton", off, row_gradient)
    monkeypatch.setattr(row_kernels, "triton_kernels", lambda: bad)
    assert "statistics" in str(verified(torch.randn(2, V), torch.arange(2))[1])
