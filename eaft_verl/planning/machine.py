"""What is planned for: the machine of --gpus, or this one. nvidia-smi is asked here and nowhere else."""

import contextlib
import math
import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from eaft_verl.errors import ConfigError
from eaft_verl.planning.formulas import GIB
from eaft_verl.planning.speed import DEFAULT, SPEED, Speed, speed_of
from eaft_verl.recipe.config import Config

_GPUS = re.compile(r"^(\d+)x(?:([A-Za-z]+\d+[A-Za-z]*)-)?(\d+(?:\.\d+)?)$")
CGROUP = Path("/sys/fs/cgroup")
AWAKE = "20000"  # rounds of libgomp, torch's
# For a process that computes on a CPU. glibc gives every freed tensor back to the system, and a step of SmolLM2 then
# takes 240,000 page faults to get its memory again: 14 to 19 % of its CPU time was measured. One arena, as the others
# cannot grow to the size of a tensor. Huge pages, where the system allows them on demand: a matrix of weights spans a
# thousand small ones, whose addresses a core cannot keep (a bf16 product with 32 rows 0.55 -> 0.34 ms).
FREED_IS_KEPT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class Gpu(NamedTuple):
    """A GPU of this machine. gib: its memory, 0 where the driver does not say (those that share the host's)."""

    name: str
    gib: float
    driver: str

    def __str__(self) -> str:
        return f"{self.name}, {self.gib * 1024:.0f} MiB, {self.driver}"


@dataclass(frozen=True)
class Machine:
    """What is planned for. gib: memory of one device; host_gib: of one host, None where unknown."""

    nodes: int
    devices: int  # per node
    gib: float
    kind: str
    host_gib: float | None

    @property
    def speed(self) -> Speed:
        """Assumed speed of a device; the A100's, and it is said, for one of which no speed is known."""
        if self.kind in SPEED:
            return SPEED[self.kind]
        taken = SPEED[DEFAULT]
        return replace(taken, source=f"{self.kind} is not known here and taken for an {taken.source}; --probe measures")


def gpus_here() -> list[Gpu]:
    """Every GPU that nvidia-smi names; none where there is no driver or it does not answer within 20 s."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(", ", 2) for line in done.stdout.splitlines()]
    return [Gpu(name, int(mib) / 1024 if mib.isdigit() else 0.0, driver) for name, mib, driver in rows]


def cpus_here() -> int:
    """Processors that this process may use: those it is bound to, and no more than its container's quota.

    The quota is cpu.max of cgroup v2, or cfs_quota_us and cfs_period_us of v1; half a processor counts as one.
    """
    bound = _bound()
    quota, period = _read("cpu.max", "max 1").split()[:2]
    if quota == "max":
        quota, period = _read("cpu/cpu.cfs_quota_us", "-1"), _read("cpu/cpu.cfs_period_us", "1")
    allowed = math.ceil(int(quota) / int(period)) if quota.isdecimal() else bound
    return max(1, min(bound, allowed))


def _bound() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def waiting_threads() -> dict[str, str]:
    """How the threads of one operation wait for the next: awake for about 0.5 ms, then asleep. The user's choice wins.

    Asleep at once, a step of SmolLM2 on two cores took 1.83 s, and 1.36 s so: waking them takes longer than many of a
    small model's operations. Awake for ever, they starve whoever they wait for; under a container's quota, of which
    torch knows nothing, so do more threads than processors: there they sleep at once.
    """
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    chosen = {name: os.environ[name] for name in names if name in os.environ}
    return chosen or {"GOMP_SPINCOUNT": AWAKE if cpus_here() == _bound() else "0"}


def memory_here() -> float:
    """GiB of this machine, and no more than its container may hold (memory.max, or v1's limit_in_bytes)."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_read("memory.max", "max"), _read("memory/memory.limit_in_bytes", "max")]
    return min([physical, *(int(limit) for limit in limits if limit.isdecimal())]) / GIB


def _read(name: str, otherwise: str) -> str:
    with contextlib.suppress(OSError):
        return (CGROUP / name).read_text(encoding="ascii").strip() or otherwise
    return otherwise


def machine_of(config: Config, gpus: str | None, host_gib: float | None) -> Machine:
    """The machine of --gpus, else this one; ConfigError where this one has no GPU and the recipe wants one."""
    trainer = config.verl.trainer
    if gpus:
        _, kind, gib = parse_gpus(gpus)
        speed_of(kind)
        return Machine(trainer.nnodes, trainer.n_gpus_per_node, gib, kind, host_gib)
    here = host_gib or memory_here()
    if config.device == "cpu":
        return Machine(1, trainer.n_gpus_per_node, here / trainer.n_gpus_per_node, "CPU", here)
    found = gpus_here()
    if not found or not found[0].gib:
        raise ConfigError("device=cuda and no GPU is visible here: say what to plan for, e.g. --gpus 8x80 --nodes 2")
    return Machine(trainer.nnodes, trainer.n_gpus_per_node, found[0].gib, kind_of(found[0].name), here)


def kind_of(name: str) -> str:
    """What nvidia-smi calls 'NVIDIA GeForce RTX 4090' as --gpus has it, 'RTX4090'; the name itself if it is unknown."""
    words = re.split(r"[\s-]+", re.sub(r"\bRTX\s+", "RTX", name.upper()))
    return next((word for word in words if word in SPEED), name)


def parse_gpus(text: str) -> tuple[int, str, float]:
    """(GPUs per node, kind, GiB of each) of '8x80', '8xH100-80' or '2xRTX4090-24'; ConfigError otherwise."""
    match = _GPUS.fullmatch(text)
    if not match or int(match[1]) < 1 or float(match[3]) <= 0:
        raise ConfigError(
            f"--gpus {text!r} must be GPUs per node x GiB of each, e.g. 8x80 or, with the kind, 8xH100-80 "
            f"(kinds: {', '.join(name for name in SPEED if name != 'CPU')})"
        )
    return int(match[1]), (match[2] or DEFAULT).upper(), float(match[3])
