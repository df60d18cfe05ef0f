"""Where a run happened: code, versions, hardware. Written into every run, so that a number can be traced."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eaft_verl.cluster.node_probe import version_of
from eaft_verl.experiment.source import code_hash, commit
from eaft_verl.planning.machine import cpus_here, gpus_here, memory_here
from eaft_verl.reporting.comparability import ABSENT, flatten
from eaft_verl.runs import Run

PACKAGES = ("eaft-verl", "verl", "torch", "transformers", "ray", "tensordict", "vllm", "lm_eval", "peft", "flash-attn")
GROUPS = {  # keys of env.json that may make another number, by what kind of difference they are
    "code": ("code", "commit", "dirty"),
    "versions": ("python", "packages"),
    "other packages": ("installed",),
    "hardware": ("platform", "cpu", "cpus", "gpus", "threads"),
}


def describe() -> dict[str, Any]:
    """Commit and hash of the code, Python, package versions, CPU, memory, GPUs, the command and where it was given.

    packages: those that decide a number; installed: every other one.
    """
    packages = {name: version for name in PACKAGES if (version := version_of(name))}
    return {
        "python": platform.python_version(),
        "packages": packages,
        "installed": {name: version for name, version in _installed().items() if name not in packages},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": cpus_here(),
        "memory_gib": round(memory_here(), 1),
        "gpus": [str(gpu) for gpu in gpus_here()],
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "folder": str(Path.cwd()),
        "code": code_hash(),
        **commit(),
    }


def environment_differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """{group of GROUPS: ['packages.torch=2.13.0 (now 2.14.0)', ...]}; equal code is equal under any commit.

    Keys that `stored`, of an earlier version, does not have are left out.
    """
    found: dict[str, list[str]] = {}
    for group, keys in GROUPS.items():
        before = {key: stored[key] for key in keys if key in stored}
        if group == "code" and before.get("code", ABSENT) == now["code"]:
            continue
        old, new = flatten(before), flatten({key: now.get(key) for key in before})
        lines = [
            f"{key}={old.get(key, ABSENT)} (now {new.get(key, ABSENT)})".replace('"', "")
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if lines:
            found[group] = lines
    return found


def note_change(run: Run, stage: str) -> None:
    """Add to run.json's `environments` what is not as env.json says: [{stage, attempt, found: {group: [..]}}].

    A run may be gone on with, or evaluated, with other code or elsewhere than it was begun.
    """
    if found := environment_differences(run.env, describe()):
        entry = {"stage": stage, "attempt": run.info.get("attempt", 0), "found": found}
        if entry not in (known := run.info.get("environments", [])):
            run.update(environments=[*known, entry])


def _installed() -> dict[str, str]:
    """{name: version} of every installed distribution."""
    found = {one.name: one.version for one in importlib.metadata.distributions() if one.metadata["Name"]}
    return dict(sorted(found.items()))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
