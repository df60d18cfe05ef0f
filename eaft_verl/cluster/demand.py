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
HELPERS = {"sft": 0, "grpo": 16}  # CPUs for the trainer, queue, storage, reward, agent-loop and server actors


class Offer(NamedTuple):
    """One node of a cluster: its name and its logical resources."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Demand:
    """Placement groups of an arm: `nodes` groups of `devices` bundles, each `cpus_per_worker` CPUs and one device."""

    nodes: int
    devices: int
    device: str
    cpus_per_worker: int

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

    def shortage(self, offers: Sequence[Offer]) -> str | None:
        """Why these nodes cannot hold the placement groups; None when they can. verl packs a group strictly, and two
        may share a node."""
        places = sum(int(min(o.cpus // self.cpus, o.gpus // self.gpus if self.gpus else math.inf)) for o in offers)
        if places >= self.nodes:
            return None
        wanted = f"{self.nodes} node(s) with {self.cpus} CPUs" + (f" and {self.gpus} GPUs" if self.gpus else "")
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
    cpus = CPUS_PER_WORKER[config.trainer] if config.device == "cuda" else 1  # on CPU the device itself is the CPU
    return Demand(trainer.nnodes, trainer.n_gpus_per_node, config.device, cpus)
