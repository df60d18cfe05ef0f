"""Distributed checkpoints of a small sharded model on 1, 2 and 3 gloo ranks: exact, and free of the number of ranks."""

import json
import math
import os
import pickle
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn

from eaft_verl.training import dcp, states

STEPS, SAVED = 9, (3, 5, 7)
RATE, DROPOUT = 1e-2, 0.1


class Tied(nn.Module):
    """An embedding, two layers whose sizes no rank count divides, a frozen one between them, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 5)])
        self.layers[1].requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, drop: float) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + nn.functional.dropout(torch.tanh(layer(hidden)), drop)
        return self.head(hidden)


def build(
    world: int, *, background: bool = False, one_unit: bool = False
) -> tuple[nn.Module, Any, Any, dcp.DcpCheckpoints]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from verl.utils.torch_functional import get_cosine_schedule_with_warmup

    torch.manual_seed(0)
    model: Any = Tied().double()
    mesh = init_device_mesh("cpu", (world,))
    for layer in [] if one_unit else model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 20)
    return model, optimizer, schedule, dcp.DcpCheckpoints(model, optimizer, schedule, background=background)


def train(world: int, rank: int, model: Any, optimizer: Any, schedule: Any, step: int, drop: float) -> list[float]:
    """One step; loss, rate used, and a number from each random generator."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 11, (6, 4), generator=draw)[rank::world]
    loss = nn.functional.cross_entropy(model(ids, drop).flatten(0, 1), ids.roll(1, 1).flatten())
    loss.backward()
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return [total.item() / world, rate, random.random(), float(np.random.rand())]


def ranked(rank: int, world: int, port: int, folder: str, jobs: list[dict[str, Any]]) -> None:
    """Every job on these ranks; rank 0 writes what they gave."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for job in jobs:
        random.seed(rank)
        np.random.seed(rank)
        model, optimizer, schedule, checkpoints = build(
            world, background=job.get("background", False), one_unit=job.get("one_unit", False)
        )
        if job.get("poison"):
            with torch.no_grad():
                model.layers[0].weight.to_local().fill_(math.nan if rank == world - 1 else 1.0)
        start = job.get("start", 0)
        if "from" in job:
            checkpoints.load_checkpoint(f"{folder}/{job['from']}-{start}")
        rows = []
        for step in range(start, job["end"]):
            rows.append(train(world, rank, model, optimizer, schedule, step, job.get("drop", 0.0)))
            if step + 1 in job.get("saves", ()):
                checkpoints.finished(wait=True)
                checkpoints.save_checkpoint(f"{folder}/{job['name']}-{step + 1}", None, step + 1, None)
        if job["end"] == 0:
            checkpoints.save_checkpoint(f"{folder}/{job['name']}-0", None, 0, None)
        checkpoints.finished(wait=True)
        if rank == 0:
            Path(folder, f"{job['name']}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def on_ranks(world: int, folder: Path, *jobs: dict[str, Any]) -> list[list[list[float]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(ranked, (world, port, str(folder), list(jobs)), nprocs=world)
    return [json.loads((folder / f"{job['name']}.json").read_text()) for job in jobs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dcp")


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[list[list[float]]]:
    """Uninterrupted on two ranks, without and with dropout, saved three times, and every resumption of the latter."""
    plain = {"name": "plain", "end": STEPS, "saves": SAVED}
    dropped = {"name": "dropped", "end": STEPS, "saves": SAVED, "drop": DROPOUT}
    again = [
        {"name": f"again{step}", "start": step, "from": "dropped", "end": STEPS, "drop": DROPOUT} for step in SAVED
    ]
    poisoned = {"name": "poisoned", "end": 0, "poison": True}
    fresh, after = {"name": "fresh", "end": 0}, {"name": "after", "from": "fresh", "end": 4}
    behind = [job | {"name": f"behind-{job['name']}", "background": True} for job in (dropped, poisoned)]
    return on_ranks(2, folder, plain, dropped, *again, *behind, poisoned, fresh, after)


def test_the_same_ranks_go_on_bit_for_bit(whole: list[list[list[float]]]) -> None:
    """Loss under dropout, rate of the schedule, and every random generator."""
    _plain, dropped, *again = whole[: 2 + len(SAVED)]
    for step, rows in zip(SAVED, again, strict=True):
        assert rows == dropped[step:]
    assert [row[1] for row in dropped[:3]] == [0.0, RATE / 2, RATE], "the warm-up of verl's schedule"


def test_a_state_before_the_first_update_is_no_update(whole: list[list[list[float]]]) -> None:
    """torch makes a step of the optimizer to have a state to return, which would count in Adam's bias correction."""
    assert [row[:2] for row in whole[-1]] == [row[:2] for row in whole[0][:4]]


@pytest.mark.parametrize("one_unit", [False, True], ids=["layers", "one unit"])
def test_other_numbers_of_ranks_go_on_to_rounding(folder: Path, whole: list[list[list[float]]], one_unit: bool) -> None:
    """2 -> 1 -> 3 ranks against the uninterrupted run, in float64; the one may hold all layers as one unit."""
    alone = {"name": "one", "start": 3, "from": "plain", "end": 5, "saves": (5,), "one_unit": one_unit}
    (one,) = on_ranks(1, folder, alone)
    (three,) = on_ranks(3, folder, {"name": "three", "start": 5, "from": "one", "end": STEPS, "saves": (7,)})
    for mine, theirs in zip(one + three, whole[0][3:], strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-12) and mine[1] == theirs[1]
    assert len(list((folder / "three-7").glob("rank-*.json"))) == 3
    mine, theirs = (dcp.read_model(folder / name) for name in ("three-7", "plain-7"))
    for name in mine.keys() | theirs.keys():
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-12)


def test_what_is_saved(folder: Path, whole: list[list[list[float]]]) -> None:
    """Trained weights once each (a tied head is the embedding), no frozen one; nothing that pickle could read."""
    weights = dcp.read_model(folder / "plain-3")
    names = {"embed.weight", "seen", *(f"layers.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias"))}
    assert weights.keys() == names and weights["embed.weight"].shape == (11, 5)
    kept = [load_file(file) for file in sorted((folder / "plain-3").glob("*.safetensors"))]
    assert torch.equal(torch.cat([part["model.embed.weight"] for part in kept]), weights["embed.weight"])
    assert {name.rpartition(".")[2] for part in kept for name in part if name.startswith("optimizer.")} == {
        *("exp_avg", "exp_avg_sq", "step")
    }
    files = {file.name: file for file in (folder / "plain-3").iterdir()}
    assert {file.suffix for file in files.values()} == {".safetensors", ".json"}
    for file in files.values():
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError)):
            pickle.loads(file.read_bytes())
    written = json.loads(files.pop(states.SHARDS).read_text())
    assert written == {"files": {name: states.describe(file) for name, file in files.items()}, "nonfinite": None}


def test_a_weight_that_is_not_finite_on_any_rank_is_not_saved(folder: Path, whole: list[list[list[float]]]) -> None:
    assert [file.name for file in (folder / "poisoned-0").iterdir()] == [states.SHARDS]
    assert states.nonfinite_in(folder / "poisoned-0") == "model.layers.0.weight"


def test_a_state_written_while_training_goes_on_is_the_one_that_was_asked_for(folder: Path, whole: Any) -> None:
    """Every tensor and every number of both ranks; and the training beside it does not notice."""
    assert whole[2 + len(SAVED)] == whole[1]
    for step in SAVED:
        mine, theirs = folder / f"behind-dropped-{step}", folder / f"dropped-{step}"
        assert {file.name for file in mine.iterdir()} == {file.name for file in theirs.iterdir()}
        for file in theirs.glob("rank-*.json"):
            assert (mine / file.name).read_bytes() == file.read_bytes()
        for file in theirs.glob("*.safetensors"):
            written, kept = load_file(mine / file.name), load_file(file)
            assert written.keys() == kept.keys() and all(torch.equal(written[name], kept[name]) for name in kept)
    assert states.nonfinite_in(folder / "behind-poisoned-0") == "model.layers.0.weight"


def test_a_large_state_is_split_into_files_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "FILE_BYTES", 100)
    state = {name: torch.zeros(20) for name in "abcdef"}  # 80 bytes each; two ranks write 200 of all together
    assert dcp._file_indices(state, ranks=2) == {"a": 1, "b": 1, "c": 1, "d": 2, "e": 2, "f": 3}


def test_a_lower_rate_of_the_configuration_is_what_is_gone_on_with(folder: Path, whole: Any) -> None:
    """The rate is not part of the state, so a run can go on with another one; the place in the schedule is."""
    shutil.copytree(folder / "plain-5", folder / "lower-5")
    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        _model, optimizer, schedule, checkpoints = build(1)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = RATE / 10
        schedule.base_lrs = [RATE / 10]
        checkpoints.load_checkpoint(str(folder / "lower-5"))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(whole[0][5][1] / 10, rel=1e-12)
        assert schedule.last_epoch == 5
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(dtype: torch.dtype, bad: float) -> None:
    value = torch.linspace(-3, 3, 1001, dtype=dtype).view(7, 143)
    assert dcp.finite(value)
    for place in (0, 500, 1000):
        broken = value.clone()
        broken.view(-1)[place] = bad
        assert not dcp.finite(broken) and not dcp.finite(broken.t())


def test_what_cannot_be_infinite_is_finite() -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
    assert dcp.finite(largest) and dcp.finite(torch.empty(0, 3)) and dcp.finite(torch.tensor(2**62))
