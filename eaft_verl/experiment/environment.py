"""Where a run happened: versions, hardware, commit. Written into every run, so that a number can be traced."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from eaft_verl.cluster.node_probe import version_of
from eaft_verl.planning.machine import cpus_here, gpus_here, memory_here

PACKAGES = ("eaft-verl", "verl", "torch", "transformers", "ray", "tensordict", "vllm", "lm_eval", "peft", "flash-attn")


def describe() -> dict[str, Any]:
    """Python, package versions, CPU, memory, GPUs, the commit and whether the working tree differs from it."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": cpus_here(),
        "memory_gib": round(memory_here(), 1),
        "gpus": [str(gpu) for gpu in gpus_here()],
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **commit(),
    }


def commit() -> dict[str, Any]:
    """Commit of the package's checkout and its uncommitted changes; empty outside a checkout."""
    folder = Path(__file__).resolve().parent
    head = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if not head:
        return {"commit": None, "dirty": None}
    diff = _output("git", "-C", str(folder), "diff", "HEAD", "--stat") or ""
    return {"commit": head, "dirty": bool(diff), "diff": diff[:4000]}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
