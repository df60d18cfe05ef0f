"""The fused head against its definition in float64, for every use a loss makes of it; its products and its memory."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from eaft_verl.objectives import Deft, Eaft, Mile, Objective, Sft, weighted_nll
from eaft_verl.tokens import head as fused
from eaft_verl.tokens.chunks import head_chunk
from eaft_verl.tokens.head import Gate, Head, head_distribution, head_statistics
from eaft_verl.tokens.logits import Distribution, LogitStats, distribution_stats, reference_stats
from eaft_verl.tokens.row_kernels import CHUNKED
from eaft_verl.tokens.stats import TokenStats

T, D, V = 37, 24, 301
OBJECTIVES = [Sft(), Eaft(), Eaft(power=2, k=7), Deft(), Mile()]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks at these sizes."""
    monkeypatch.setattr(fused, "head_chunk", lambda *_, **__: 8)


class Inputs:
    """Random hidden states, head, labels and mask; every third row is not trained."""

    def __init__(self, dtype: torch.dtype, bias: bool = False, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(T, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        self.weight = torch.randn(V, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        self.bias = torch.randn(V, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
        self.labels = torch.randint(V, (T,), generator=draw)
        self.mask = torch.arange(T) % 3 != 1
        self.leaves = [part for part in (self.hidden, self.weight, self.bias) if part is not None]

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias)

    def truth(self, loss: Callable[[LogitStats], Tensor], **options: Any) -> tuple[LogitStats, list[Tensor]]:
        """Statistics and gradients by autograd over all logits in float64."""
        leaves = [part.detach().double().requires_grad_() for part in self.leaves]
        logits = leaves[0] @ leaves[1].T + (leaves[2] if self.bias is not None else 0.0)
        stats = reference_stats(logits, self.labels, **options)
        loss(stats).backward()
        return stats, [present.grad for present in leaves if present.grad is not None]


def gate_of(objective: Objective) -> Gate:
    def gate(stats: LogitStats, rows: Tensor) -> Tensor:
        return objective.weight(
            TokenStats(
                *(-stats.nll_T.detach(), stats.entropy_T.detach(), min(objective.k, V), stats.sum_p2_T),
                full_entropy_T=stats.full_entropy_T,
            )
        )

    return gate


def loss_of(objective: Objective, mask: Tensor) -> Callable[[LogitStats], Tensor]:
    every = torch.arange(T)
    return lambda stats: weighted_nll(stats.nll_T, gate_of(objective)(stats, every), mask, 5.0)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every recomputation of the logits."""
    calls: list[int] = []
    original = fused._recomputed
    monkeypatch.setattr(fused, "_recomputed", lambda *given: (calls.append(1), original(*given))[1])
    return calls


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["sft", "eaft", "k7", "deft", "mile"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("speculate", [True, False], ids=["three products", "four products"])
def test_statistics_and_gradients(
    objective: Objective, bias: bool, speculate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counting(monkeypatch)
    given = Inputs(torch.float64, bias)
    loss = loss_of(objective, given.mask)
    gate = gate_of(objective) if speculate else None
    options = {"k": objective.k}
    stats = head_statistics(
        given.hidden, given.head, given.labels, given.mask, gate=gate, sum_p2=True, full_entropy=True, **options
    )
    loss(stats).backward()
    truth, grads = given.truth(loss, **options)
    for name, ours, theirs in zip(LogitStats._fields, stats, truth, strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours[given.mask], theirs[given.mask].to(ours.dtype), rtol=1e-9, atol=1e-9, msg=name)
        assert not ours[~given.mask].any(), name
    for ours, theirs in zip(given.leaves, grads, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-9, atol=1e-9)
    assert len(calls) == (not speculate)


@pytest.mark.parametrize(
    "upstream",
    [
        lambda nll: (nll * torch.linspace(-1, 1, T)).sum(),
        lambda nll: (-nll).exp().sum(),
        lambda nll: nll[3] + 0.0 * nll.sum(),
        lambda nll: 0.0 * nll.sum(),
    ],
    ids=["any weights", "a function", "one token", "none"],
)
def test_a_loss_that_asks_for_something_else_gets_its_own_gradient(upstream: Callable[[Tensor], Tensor]) -> None:
    given = Inputs(torch.float64)
    stats = head_statistics(given.hidden, given.head, given.labels, given.mask, gate=gate_of(Eaft()))
    upstream(stats.nll_T).backward()
    _, grads = given.truth(lambda truth: upstream(truth.nll_T * given.mask))
    for ours, theirs in zip(given.leaves, grads, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, -2.5, 1e-4], ids=str)
def test_a_common_factor_is_applied_to_what_was_formed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counting(monkeypatch)
    given = Inputs(torch.float32)
    loss = loss_of(Eaft(), given.mask)
    (
        factor * loss(head_statistics(given.hidden, given.head, given.labels, given.mask, gate=gate_of(Eaft())))
    ).backward()
    _, grads = given.truth(lambda stats: factor * loss(stats))
    for ours, theirs in zip(given.leaves, grads, strict=True):
        torch.testing.assert_close(ours.grad, theirs.float(), rtol=2e-4, atol=abs(factor) * 1e-6)
    assert not calls


def relative_error(ours: Tensor | None, truth: Tensor) -> float:
    assert ours is not None
    return float((ours.double() - truth).norm() / truth.norm())


def test_half_precision_is_no_worse_than_the_logits_rounding() -> None:
    given = Inputs(torch.bfloat16)
    loss = loss_of(Eaft(), given.mask)
    loss(head_statistics(given.hidden, given.head, given.labels, given.mask, gate=gate_of(Eaft()))).backward()
    _, grads = given.truth(loss)
    eager = Inputs(torch.bfloat16)
    stats = reference_stats(eager.hidden @ eager.weight.T, eager.labels)
    loss(stats).backward()
    for ours, plain, truth in zip(given.leaves, eager.leaves, grads, strict=True):
        assert relative_error(ours.grad, truth) <= 1.2 * relative_error(plain.grad, truth) < 0.05


def test_autocast_chooses_the_dtype_of_the_products() -> None:
    given = Inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        stats = head_statistics(given.hidden, given.head, given.labels, given.mask)
    half = Inputs(torch.bfloat16)
    expected = head_statistics(half.hidden, half.head, half.labels, half.mask)
    torch.testing.assert_close(stats.nll_T, expected.nll_T, rtol=0, atol=0)
    stats.nll_T.sum().backward()
    assert given.weight.grad is not None and given.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_distribution_is_that_of_the_logits_and_says_what_training_says(dtype: torch.dtype, bias: bool) -> None:
    given = Inputs(dtype, bias)
    hidden = given.hidden.detach().clone()
    hidden[~given.mask] = torch.nan
    found = head_distribution(hidden, given.head, given.labels, given.mask, k=7)
    with torch.no_grad():
        whole = torch.nn.functional.linear(given.hidden, *given.head)
        trained = head_statistics(hidden, given.head, given.labels, given.mask, k=7, sum_p2=True, full_entropy=True)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    rounding = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else tolerance  # of a product of another shape
    for name, ours, truth in zip(
        Distribution._fields[:-1], found, distribution_stats(whole, given.labels, given.mask, k=7), strict=False
    ):
        torch.testing.assert_close(ours, truth, **rounding, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(found.nll_T, trained.nll_T) and torch.equal(found.entropy_T, trained.entropy_T)
    assert torch.equal((found.argmax_T == given.labels) & given.mask, trained.correct_T.bool())
    torch.testing.assert_close(found.sum_p2_T, trained.sum_p2_T, **tolerance)
    torch.testing.assert_close(found.full_entropy_T, trained.full_entropy_T, **tolerance)
    nothing = head_distribution(hidden, given.head, given.labels, torch.zeros_like(given.mask))
    assert all(bool((part == 0).all()) and len(part) == T for part in nothing)


def test_the_distribution_multiplies_trained_rows_alone_and_keeps_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    given, made = Inputs(torch.float32), []
    product = fused._logits

    def watched(hidden_CD: Tensor, head: Head) -> Tensor:
        alive = [len(chunk()) for chunk in made if chunk() is not None]
        assert not alive, "the chunk before is freed first"
        logits = product(hidden_CD, head)
        made.append(weakref.ref(logits))
        rows.append(len(logits))
        return logits

    rows: list[int] = []
    monkeypatch.setattr(fused, "_logits", watched)
    head_distribution(given.hidden, given.head, given.labels, given.mask)
    assert sum(rows) == int(given.mask.sum()) < T and max(rows) == 8


def test_rows_outside_the_mask_cost_nothing_and_may_hold_anything() -> None:
    given = Inputs(torch.float32)
    with torch.no_grad():
        given.hidden[~given.mask] = float("nan")
    stats = head_statistics(given.hidden, given.head, given.labels, given.mask, gate=gate_of(Eaft()))
    loss_of(Eaft(), given.mask)(stats).backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in given.leaves)
    assert given.hidden.grad is not None and not given.hidden.grad[~given.mask].any()


def test_nothing_trained_is_a_zero_that_is_connected() -> None:
    given = Inputs(torch.float32)
    none = torch.zeros_like(given.mask)
    stats = head_statistics(given.hidden, given.head, given.labels, none, gate=gate_of(Eaft()))
    loss_of(Eaft(), none)(stats).backward()
    assert all(part.grad is not None and not part.grad.any() for part in given.leaves)


def in_place_product(_sum: Any, left: torch.Size, right: torch.Size, out_shape: Any = None, **_: Any) -> int:
    """FLOPs of `addmm_` from the shapes of its arguments: the counter knows it only as `addmm`."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: in_place_product}


def products(wanted: tuple[bool, bool], gate: Gate | None, mask: Tensor) -> float:
    """Matrix products of a forward and backward pass, in units of 2 * trained tokens * V * D."""
    given = Inputs(torch.float32)
    given.hidden.requires_grad_(wanted[0])
    given.weight.requires_grad_(wanted[1])
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        stats = head_statistics(given.hidden, given.head, given.labels, mask, gate=gate)
        if any(wanted):
            loss_of(Eaft(), mask)(stats).backward()
    return counter.get_total_flops() / (2 * int(mask.sum()) * V * D)


@pytest.mark.parametrize(
    ("wanted", "speculate", "expected"),
    [((True, True), True, 3), ((True, False), True, 2), ((False, False), False, 1), ((True, True), False, 4)],
    ids=["trained", "frozen head", "no gradients", "recomputed"],
)
@pytest.mark.parametrize("share", [1, 3], ids=["all trained", "a third trained"])
def test_products(wanted: tuple[bool, bool], speculate: bool, expected: int, share: int) -> None:
    assert products(wanted, gate_of(Eaft()) if speculate else None, torch.arange(T) % share == 0) == expected


class Storages(TorchDispatchMode):
    """Bytes of the storages alive that were made within the block, and the most of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {part.untyped_storage()._cdata for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)}
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and (storage := part.untyped_storage())._cdata not in self.seen | given:
                self._enter(storage)
        return result

    def _enter(self, storage: Any) -> None:
        name, size = storage._cdata, storage.nbytes()
        self.seen.add(name)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._leave, name, size)

    def _leave(self, name: int, size: int) -> None:
        self.seen.discard(name)
        self.alive -= size


def test_memory_at_the_size_of_the_32b_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the chunk of an accelerator
    tokens, hidden_size, vocab = 16_384, 5_120, 152_064
    chunk = head_chunk(vocab, 2, "meta")
    hidden = torch.empty(tokens, hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(vocab, hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels, rows = (torch.empty(tokens, dtype=torch.long, device="meta") for _ in range(2))
    with Storages() as storages:
        fused._FusedHead.apply(hidden, weight, None, labels, rows, gate_of(Eaft()), 20, False, False, CHUNKED, True)
    result = 2 * (tokens * hidden_size + vocab * hidden_size)  # bytes of dX and dW
    assert storages.peak <= (6 * chunk * vocab + result) * 1.03
    assert storages.peak <= (2 * 4096 * vocab + result) * 1.03
    assert storages.peak <= 0.1 * 32.5 * 2**30  # of what LLaMA-Factory's way takes: fp32 logits, a copy, their gradient
