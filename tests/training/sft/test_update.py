"""Around an optimizer's step: the pull towards the start and the rate that follows the loss, by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eaft_verl.recipe.objective import build_objective
from eaft_verl.training.sft.loss import TokenLoss
from eaft_verl.training.sft.update import Update

START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
GRADIENT = torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64)
RATE = 0.1


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(START.clone())


def stepped(weight: torch.nn.Parameter, update: Update, loss: Any, gradient: torch.Tensor = GRADIENT) -> None:
    update.begin(loss)
    weight.grad = gradient.clone()
    update.optimizer.step()


def sgd(weight: torch.nn.Parameter) -> Update:
    return Update(torch.optim.SGD([weight], lr=RATE), None)


def test_l2_is_decay_towards_the_start() -> None:
    """theta <- (theta - lr g), then theta <- theta - lr coef (theta - theta_0): two steps by hand."""
    weight = parameter()
    update = sgd(weight)
    update.hold(coef=4.0)
    expected = START.clone()
    for _ in range(2):
        stepped(weight, update, object())
        expected = expected - RATE * GRADIENT
        expected = expected - RATE * 4.0 * (expected - START)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)
        assert update.metrics["anchor_l2"] == pytest.approx(float((expected - START).norm()))
    assert update.metrics["lr"] == RATE and update.made


def test_l2_is_decoupled_from_adam() -> None:
    """The pull is that of the distance, not divided by the size of the gradient: a hundredfold gradient, same pull."""
    ends = []
    for scale in (1.0, 100.0):
        weight = parameter()
        update = Update(torch.optim.Adam([weight], lr=RATE, eps=0.0), None)
        update.hold(coef=2.0)
        stepped(weight, update, object(), GRADIENT * scale)
        ends.append(weight.detach().clone())
    first_step = RATE * GRADIENT.sign()
    torch.testing.assert_close(ends[0], START - (1 - 2.0 * RATE) * first_step, rtol=0, atol=1e-12)
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-12)


def test_the_whole_pull_puts_the_weights_back() -> None:
    weight = parameter()
    update = sgd(weight)
    update.hold(coef=1 / RATE)
    stepped(weight, update, object())
    torch.testing.assert_close(weight.detach(), START, rtol=0, atol=1e-15)


def test_the_start_is_what_was_held_and_not_what_was_loaded_later() -> None:
    weight = parameter()
    update = sgd(weight)
    update.hold(coef=1 / RATE)
    weight.data.fill_(9.0)  # a saved state
    stepped(weight, update, object())
    torch.testing.assert_close(weight.detach(), START, rtol=0, atol=1e-15)


def test_a_step_outside_of_training_is_left_alone() -> None:
    """torch makes one, with a rate of 0, to have a state that a saved one is loaded into."""
    weight = parameter()
    update = sgd(weight)
    update.hold(coef=5.0)
    weight.grad = GRADIENT.clone()
    update.optimizer.step()
    torch.testing.assert_close(weight.detach(), START - RATE * GRADIENT, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("nll", "factor"), [(4.0, 0.5), (1.0, 1.0), (0.25, 2.0), (1e-9, 2.0), (1e9, 0.1)])
def test_finch_scales_the_rate_of_this_step_only(nll: float, factor: float) -> None:
    weight = parameter()
    update, loss = sgd(weight), TokenLoss(build_objective("finch"))
    table = torch.zeros(3, 6, dtype=torch.float64)
    table[:, 0] = nll
    loss.table.parts = [table[:1], table[1:]]
    stepped(weight, update, loss)
    torch.testing.assert_close(weight.detach(), START - factor * RATE * GRADIENT, rtol=0, atol=1e-12)
    assert update.metrics == pytest.approx({"lr": RATE * factor, "step_factor": factor})
    assert update.optimizer.param_groups[0]["lr"] == RATE, "the schedule goes on from the recipe's rate"


def test_the_mean_is_over_all_tokens_of_all_micro_batches() -> None:
    loss = TokenLoss(build_objective("finch"))
    one, three = torch.zeros(1, 6, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64)
    one[:, 0], three[:, 0] = 8.0, 4.0
    loss.table.parts = [one, three]
    assert loss.table.mean_nll(None) == 5.0
    loss.table.parts = []
    assert math.isnan(loss.table.mean_nll(None))


def test_a_skipped_step_pulls_nothing() -> None:
    weight = parameter()
    update = sgd(weight)
    update.hold(coef=5.0)
    update.begin(SimpleNamespace())
    assert not update.made and torch.equal(weight.detach(), START) and update.metrics["lr"] == RATE


def sharded(rank: int, folder: str) -> None:
    """Two ranks, weights of five rows in shards of three and two; what each found in FOLDER/RANK.pt."""
    import os

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.update({"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"})
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = linear()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    update = Update(torch.optim.SGD(model.parameters(), lr=RATE), dist.group.WORLD)
    update.hold(coef=4.0)
    loss = TokenLoss(build_objective("finch"))
    table = torch.zeros(1 + 2 * rank, 6, dtype=torch.float64)  # one token of 10 nats here, three of 2 there
    table[:, 0] = 2.0 if rank else 10.0
    loss.table.parts = [table]
    update.begin(loss)
    model(torch.ones(1, 3)).sum().backward()
    update.optimizer.step()
    weights = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
    torch.save((weights, update.metrics), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 5)


@pytest.mark.slow
def test_shards_of_two_ranks_are_one_model(tmp_path: Any) -> None:
    import torch.multiprocessing as mp

    mp.spawn(sharded, args=(str(tmp_path),), nprocs=2)
    whole = linear()
    start = {name: weight.detach().clone() for name, weight in whole.named_parameters()}
    whole(torch.ones(1, 3)).sum().backward()
    rate, distance = RATE * math.sqrt(1.0 / 4.0), 0.0  # (10 + 3 * 2) / 4 tokens = 4 nats
    for name, weight in whole.named_parameters():
        moved = weight.detach() - rate * weight.grad
        weight.data = moved - rate * 4.0 * (moved - start[name])
        distance += float((weight.data - start[name]).square().sum())
    for rank in range(2):
        found, metrics = torch.load(tmp_path / f"{rank}.pt")
        for name, weight in whole.state_dict().items():
            torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)
        assert metrics == pytest.approx({"lr": rate, "step_factor": 0.5, "anchor_l2": math.sqrt(distance)}, rel=1e-5)
