"""What an arm asks of a machine or a cluster, in the units of Ray's placement groups, and whether that is on offer."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from eaft_verl.errors import ConfigError
from eaft_verl.recipe.config import Config

WAIT = "EAFT_WAIT"  # variable: seconds that nodes which have yet to join, or to come back, are given
CPUS_PER_WORKER = {  # logical CPUs in a worker's bundle
    "sft": 1,  # ours; verl's own SFT pool asks for 10 and waits for ever where a node has fewer
    "grpo": 3,  # verl 0.9.1 single_controller/ray/base.py: ResourcePoolManager.max_colocate_count
}
STORES = {
    ("grpo", "cpu"): 1,
    ("grpo", "cuda"): 8,
}  # actors of verl's queue that hold the rollouts, by trainer and device


class Offer(NamedTuple):
    """One node of a cluster: its name and its logical resources."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Demand:
    """Placement groups of an arm: `nodes` groups of `devices` bundles, each `cpus_per_worker` CPUs and one device.

    stores: actors outside the groups that hold a CPU each, on the nodes by turns (transfer_queue 0.1.11).
    """

    nodes: int
    devices: int
    device: str
    cpus_per_worker: int
    stores: int = 0

    @property
    def cpus(self) -> int:
        """Logical CPUs a node must have."""
        return self.devices * self.cpus_per_worker

    @property
    def gpus(self) -> int:
        """GPUs a node must have."""
        return self.devices if self.device == "cuda" else 0

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one worker."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1} if self.gpus else {})}

    def beside(self, nodes: int) -> int:
        """CPUs of each of so many nodes that the groups must leave to verl's own actors: its share of the stores, one
        for the controller of the queue, wherever that is, and one somewhere on which all others start, which hold none.
        """
        return math.ceil(self.stores / nodes) + 1 + (nodes == 1) if self.stores and nodes else 0

    def shortage(self, offers: Sequence[Offer]) -> str | None:
        """Why these nodes cannot hold the placement groups; None when they can. verl packs a group strictly, and two
        may share a node."""
        beside = self.beside(sum(offer.cpus > 0 for offer in offers))
        left = [(max(0.0, offer.cpus - beside), offer.gpus) for offer in offers]
        places = sum(int(min(cpus // self.cpus, gpus // self.gpus if self.gpus else math.inf)) for cpus, gpus in left)
        if places >= self.nodes:
            return None
        wanted = f"{self.nodes} node(s) with {self.cpus} CPUs" + (f" and {self.gpus} GPUs" if self.gpus else "")
        if beside:
            wanted += f", and {beside} more CPUs on every node for verl's own actors"
        offered = ", ".join(f"{o.name}: {o.cpus:g} CPUs, {o.gpus:g} GPUs" for o in offers) or "no node"
        return f"needs {wanted}; {places} of {self.nodes} found ({offered})"

    def shortage_after(self, seconds: float, offers: Callable[[], Sequence[Offer]]) -> str | None:
        """The shortage once nodes had that many seconds to join; None as soon as there is none."""
        until = time.monotonic() + seconds
        while (shortage := self.shortage(offers())) and time.monotonic() < until:
            time.sleep(1)
        return shortage


def demand_of(config: Config) -> Demand:
    """The demand of a resolved configuration."""
    trainer = config.verl.trainer
    if config.trainer not in CPUS_PER_WORKER:
        raise ConfigError(f"trainer={config.trainer!r} is not one of {', '.join(CPUS_PER_WORKER)}")
    held = CPUS_PER_WORKER[config.trainer], STORES.get((config.trainer, config.device), 0)
    return Demand(trainer.nnodes, trainer.n_gpus_per_node, config.device, *held)
