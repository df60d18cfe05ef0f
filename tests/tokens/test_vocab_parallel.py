"""Two ranks with half of the vocabulary each against the definition over all of it, in float64."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from eaft_verl.objectives import Eaft, Objective, Sft, weighted_nll
from eaft_verl.tokens.head import Head
from eaft_verl.tokens.logits import LogitStats, reference_stats
from eaft_verl.tokens.stats import TokenStats
from eaft_verl.tokens.vocab_parallel import vocab_parallel_statistics

T, D, RANKS = 150, 16, 2  # three chunks of 64 rows at this size
CASES = {  # objective, vocabulary, slice, bias
    "sft": (Sft(), 90, 45, False),
    "eaft": (Eaft(), 90, 45, True),
    "k above a slice": (Eaft(k=30), 48, 24, False),
    "k of two": (Eaft(k=2, power=2), 90, 45, False),
    "padded": (Eaft(), 83, 45, True),
    "padded slice": (Eaft(), 40, 45, False),
    "fewer than k": (Eaft(), 12, 6, False),
}


def made(vocab: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the padded weight and bias, labels on both slices, mask."""
    draw = torch.Generator().manual_seed(vocab)
    hidden, weight, bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((T, D), (RANKS * size, D), (RANKS * size,))
    )
    return hidden, weight, bias, torch.randint(vocab, (T,), generator=draw), torch.arange(T) % 5 != 1


def loss(stats: LogitStats, objective: Objective, mask: Tensor, vocab: int) -> Tensor:
    known = TokenStats(-stats.nll_T.detach(), stats.entropy_T.detach(), min(objective.k, vocab))
    return weighted_nll(stats.nll_T, objective.weight(known), mask, mask.sum())


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = {}
    for name, (objective, vocab, size, with_bias) in CASES.items():
        for speculate in (True, False):
            hidden, weight, bias, labels, mask = made(vocab, size)
            mine = slice(rank * size, (rank + 1) * size)
            leaves = [part.requires_grad_() for part in (hidden, weight[mine].clone(), bias[mine].clone())]

            def gate(stats: LogitStats, _: Tensor, objective: Objective = objective, vocab: int = vocab) -> Tensor:
                return objective.weight(TokenStats(-stats.nll_T, stats.entropy_T, min(objective.k, vocab)))

            stats = vocab_parallel_statistics(
                *(leaves[0], Head(leaves[1], leaves[2] if with_bias else None), labels, mask),
                group=dist.group.WORLD,
                vocab=vocab,
                gate=gate if speculate else None,
                k=objective.k,
                sum_p2=True,
                full_entropy=True,
            )
            loss(stats, objective, mask, vocab).backward()
            found[name, speculate] = ([part.detach() for part in stats], [leaf.grad for leaf in leaves])
    try:
        uneven = Head(torch.zeros(3 + rank, D))
        vocab_parallel_statistics(torch.zeros(1, D), uneven, torch.zeros(1).long(), mask[:1], group=dist.group.WORLD)
    except ValueError as error:
        found["uneven", True] = str(error)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("speculate", [True, False], ids=["three products", "four products"])
@pytest.mark.parametrize("case", CASES)
def test_two_slices_are_one_vocabulary(case: str, speculate: bool, ranks: list[dict]) -> None:
    objective, vocab, size, with_bias = CASES[case]
    hidden, weight, bias, labels, mask = made(vocab, size)
    leaves = [part.requires_grad_() for part in (hidden, weight, bias)]
    logits = hidden @ weight[:vocab].T + (bias[:vocab] if with_bias else 0.0)
    truth = reference_stats(logits, labels, k=objective.k)
    loss(truth, objective, mask, vocab).backward()
    for rank, found in enumerate(ranks):
        stats, grads = found[case, speculate]
        for name, ours, theirs in zip(LogitStats._fields, stats, truth, strict=True):
            assert torch.allclose(ours[mask], theirs.detach()[mask].to(ours.dtype), rtol=1e-9, atol=1e-9), name
            assert not ours[~mask].any(), name
        mine = slice(rank * size, (rank + 1) * size)
        torch.testing.assert_close(grads[0], leaves[0].grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grads[1], leaves[1].grad[mine], rtol=1e-9, atol=1e-12)
        if with_bias:
            torch.testing.assert_close(grads[2], leaves[2].grad[mine], rtol=1e-9, atol=1e-12)


def test_slices_of_two_sizes_are_refused_on_every_rank(ranks: list[dict]) -> None:
    for found in ranks:
        assert found["uneven", True] == "slices of the vocabulary have [3, 4] rows; pad it so that all have as many"
