"""What an arm asks of a machine or a cluster, in the units of Ray's placement groups, and whether that is on offer."""

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from eaft_verl.errors import ConfigError

CPUS_PER_WORKER = {  # logical CPUs in a worker's bundle
    "sft": 1,  # ours; verl's own SFT pool asks for 10 and waits for ever where a node has fewer
    "grpo": 3,  # verl 0.9.1 single_controller/ray/base.py: ResourcePoolManager.max_colocate_count
}
HELPERS = {"sft": 0, "grpo": 16}  # CPUs for the trainer, queue, storage, reward, agent-loop and server actors


@dataclass(frozen=True)
class Offer:
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
        return {"CPU": self.cpus_per_worker, **({"GPU": 1} if self.device == "cuda" else {})}

    def shortage(self, offers: Sequence[Offer]) -> str | None:
        """Why these nodes cannot hold the placement groups; None when they can."""
        places = sum(self._groups(offer) for offer in offers)
        if places >= self.nodes:
            return None
        wanted = f"{self.nodes} node(s) with {self.cpus} CPUs" + (f" and {self.gpus} GPUs" if self.gpus else "")
        offered = ", ".join(f"{o.name}: {o.cpus:g} CPUs, {o.gpus:g} GPUs" for o in offers) or "no node"
        return f"needs {wanted}; {places} of {self.nodes} found ({offered})"

    def _groups(self, offer: Offer) -> int:
        """Placement groups that fit on one node: verl packs a group strictly, and two may share a node."""
        by_cpu = int(offer.cpus // self.cpus)
        return min(by_cpu, int(offer.gpus // self.gpus)) if self.gpus else by_cpu


def demand_of(config: DictConfig) -> Demand:
    """The demand of a resolved configuration."""
    trainer = config.verl.trainer
    if config.trainer not in CPUS_PER_WORKER:
        raise ConfigError(f"trainer={config.trainer!r} is not one of {', '.join(CPUS_PER_WORKER)}")
    cpus = CPUS_PER_WORKER[config.trainer] if config.device == "cuda" else 1  # on CPU the device itself is the CPU
    return Demand(trainer.nnodes, trainer.n_gpus_per_node, config.device, cpus)
