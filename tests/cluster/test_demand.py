"""What an arm asks of a cluster, against clusters made by hand."""

from pathlib import Path

import pytest
from config_fixtures import composed_once  # noqa: F401
from plan_setups import config, write_recipe

from eaft_verl.cluster.demand import Demand, Offer, demand_of


def nodes(*offers: tuple[float, float]) -> list[Offer]:
    return [Offer(f"n{index}", cpus, gpus) for index, (cpus, gpus) in enumerate(offers)]


CPU = Demand(nodes=2, devices=1, device="cpu", cpus_per_worker=1)
GPU = Demand(nodes=2, devices=8, device="cuda", cpus_per_worker=3)
GRPO = Demand(nodes=2, devices=8, device="cuda", cpus_per_worker=3, stores=8)


@pytest.mark.parametrize(
    ("demand", "offers", "fits"),
    [
        (CPU, nodes((1, 0), (1, 0)), True),
        (CPU, nodes((2, 0)), True),  # two groups may share a node
        (CPU, nodes((1, 0)), False),
        (CPU, nodes((0, 0), (1, 0)), False),  # a head without CPUs is no node
        (GPU, nodes((24, 8), (24, 8)), True),
        (GPU, nodes((64, 0), (24, 8), (24, 8)), True),  # a head without GPUs does not count
        (GPU, nodes((23, 8), (24, 8)), False),  # one logical CPU too few on one node
        (GPU, nodes((64, 8), (64, 7)), False),
        (GPU, nodes((96, 4), (96, 4), (96, 4), (96, 4)), False),  # 16 GPUs, but no node holds a whole group
        (GPU, nodes((48, 16)), True),
        (GPU, [], False),
        (GRPO, nodes((29, 8), (29, 8)), True),  # beside 24: four stores, and the controller on either
        (GRPO, nodes((28, 8), (29, 8)), False),
        (GRPO, nodes((58, 16)), True),  # beside 48: eight stores, the controller, one free to start actors on
        (GRPO, nodes((57, 16)), False),
        (GRPO, nodes((28, 8), (28, 8), (0, 0)), False),  # a head without CPUs takes no store
        (GRPO, nodes((28, 8), (28, 8), (28, 8)), True),  # three stores, two on one of them
        (GRPO, nodes((27, 8), (28, 8), (27, 8)), False),
    ],
)
def test_shortage(demand: Demand, offers: list[Offer], fits: bool) -> None:
    assert (demand.shortage(offers) is None) is fits


def test_a_shortage_says_what_was_asked_for_and_what_is_there() -> None:
    text = GPU.shortage(nodes((96, 8), (96, 4)))
    assert text == ("needs 2 node(s) with 24 CPUs and 8 GPUs; 1 of 2 found (n0: 96 CPUs, 8 GPUs, n1: 96 CPUs, 4 GPUs)")
    assert (GRPO.shortage(nodes((96, 8), (28, 8))) or "").startswith(
        "needs 2 node(s) with 24 CPUs and 8 GPUs, and 5 more CPUs on every node for verl's own actors; 1 of 2 found"
    )
    assert CPU.shortage([]) == "needs 2 node(s) with 1 CPUs; 0 of 2 found (no node)"


def test_the_demand_of_an_arm(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, grpo=True)
    placed = ("device=cuda", "verl.trainer.nnodes=4", "verl.trainer.n_gpus_per_node=8")
    found = demand_of(config(recipe, "sft", *placed))
    assert (found.nodes, found.cpus, found.gpus, found.bundle) == (4, 8, 8, {"CPU": 1, "GPU": 1})
    on_cpu = demand_of(config(recipe, "sft", "device=cpu", "verl.trainer.n_gpus_per_node=2"))
    assert (on_cpu.cpus, on_cpu.gpus, on_cpu.bundle) == (2, 0, {"CPU": 1})
    grpo = demand_of(config(recipe, "grpo"))
    assert (grpo.cpus, grpo.gpus, grpo.bundle, grpo.stores) == (24, 8, {"CPU": 3, "GPU": 1}, 8)
    on_cpu = demand_of(config(recipe, "grpo", "device=cpu", "verl.trainer.n_gpus_per_node=2"))
    assert (on_cpu.cpus, on_cpu.bundle, on_cpu.stores, on_cpu.beside(1)) == (6, {"CPU": 3}, 1, 3)
