"""The plan of one arm on one machine: bytes per device, host and disk, seconds of an update, and the verdict.

Verdicts are given on numbers that are right to about five percent, so an arm that fills the last five percent of a
device is called marginal and counts as not fitting.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from eaft_verl.planning.formulas import (
    CONTEXT,
    FRAGMENTATION,
    GIB,
    PROCESS,
    Setup,
    kv_bytes,
    rollout_phase,
    training_phases,
)
from eaft_verl.planning.machine import Machine
from eaft_verl.planning.setup import Arm, arm_of
from eaft_verl.planning.speed import concurrent, forward_flops, update_seconds
from eaft_verl.planning.storage import cache_bytes, checkpoint_bytes, export_bytes, host_bytes
from eaft_verl.recipe.budgets import evaluation_points
from eaft_verl.recipe.config import Config

MARGIN = 0.05  # of a device that must stay free
EXPORT_BYTES = 2  # per parameter: bfloat16, the dtype of every model planned so far
UNKNOWN_UPDATES = 4096  # taken for the number of exports where the number of examples is not known: 13 of them
ASLEEP = 2 * GIB  # a sleeping vLLM: its CUDA context, graphs and buffers; an assumption


@dataclass
class ArmPlan:
    """The plan of one arm. Bytes; seconds."""

    arm: Arm
    phase: str
    device: dict[str, float]
    host: dict[str, float]
    disk: dict[str, float]
    seconds: dict[str, float]
    before_s: float  # passes over the data before the first step
    verdict: str  # fits | marginal | no
    reasons: list[str] = field(default_factory=list)  # for the verdict
    problem: str | None = None  # what `eaft train` would say
    facts: list[str] = field(default_factory=list)
    measured: dict[str, Any] | None = None
    remedies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def peak(self) -> float:
        """Bytes on a device."""
        return sum(self.device.values())

    @property
    def needed(self) -> float:
        """Bytes on the fullest host that the system cannot take back, as it can a page cache."""
        return sum(self.host.values()) - self.host.get("reference cache", 0.0)

    @property
    def step_s(self) -> float:
        """Seconds of an update."""
        return sum(self.seconds.values())

    @property
    def training_s(self) -> float | None:
        """Seconds of all updates and of the passes before them; None where nobody knows how many updates there are."""
        return None if self.arm.updates is None else self.before_s + self.step_s * self.arm.updates


def plan_arm(config: Config, machine: Machine, measured: dict[str, Any] | None = None) -> ArmPlan:
    """The plan of one resolved configuration. measured: what a probe found, whose speed replaces the assumption."""
    arm, speed = arm_of(config), machine.speed
    if measured:
        speed = replace(speed, peak=measured["flops"], share=1.0, source="measured by --probe")
    phases = _phases(arm.setup, machine.gib * GIB)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    device = {name: size for name, size in phases[phase].items() if size}
    if arm.setup.cuda:
        moving = sum(size for name, size in device.items() if not name.startswith("vLLM"))  # vLLM's share is one claim
        device |= {"context": CONTEXT[True], "fragmentation": FRAGMENTATION * moving}
    else:
        device["process"] = PROCESS
    tokens = (arm.amount.examples or 0) * arm.amount.mean
    before = arm.passes * sum(forward_flops(arm.setup.model, tokens, arm.amount.attended))
    before /= arm.setup.devices * speed.flops
    host = _host(arm, sum(device.values()))
    plan = ArmPlan(
        arm, phase, device, host, _disk(arm), update_seconds(arm.setup, speed), before, "fits", measured=measured
    )
    _judge(plan, machine, phases)
    return plan


def _phases(setup: Setup, capacity: float) -> dict[str, dict[str, float]]:
    """Parts on a device in every phase of an update, generation included."""
    phases = training_phases(setup)
    if setup.rollout and setup.cuda:
        rollout = rollout_phase(setup, capacity)
        awake = 0.0 if setup.rollout.frees_cache else rollout["vLLM weights"] + rollout["vLLM KV cache"]
        phases = {name: {**parts, "vLLM": awake + ASLEEP} for name, parts in phases.items()} | {"rollout": rollout}
    return phases


def _host(arm: Arm, process: float) -> dict[str, float]:
    """Parts on the fullest host; on a CPU it holds the devices too, each one process of that many bytes."""
    setup = arm.setup
    host = host_bytes(setup, EXPORT_BYTES, arm.reference_tokens)
    if arm.config.async_save:
        host["state being saved"] = checkpoint_bytes(setup) / setup.nodes
    if not setup.cuda:
        del host["processes"]
        host["all processes"] = process * setup.devices
        if setup.rollout:
            host["rollout servers"] = (PROCESS + setup.compute * setup.model.parameters) * setup.devices
    return host


def _disk(arm: Arm) -> dict[str, float]:
    """Bytes of one of each, and of all that are on disk at once."""
    trainer, setup = arm.config.verl.trainer, arm.setup
    one, export = checkpoint_bytes(setup), export_bytes(setup.model, EXPORT_BYTES)
    kept = (trainer.max_ckpt_to_keep or arm.updates or 1) + 1  # with the one being written
    cache = cache_bytes(arm.reference_tokens, setup.cache_k)
    exports = len(evaluation_points(arm.updates or UNKNOWN_UPDATES))
    parts = {"resumable checkpoint": one, "export": export, "reference cache": cache}
    return {**parts, "at once": one * kept + export * exports + cache}


def disk_at_once(config: Config) -> float:
    """Bytes an arm has on disk at its peak: exports, resumable checkpoints with the one being written, caches."""
    return _disk(arm_of(config))["at once"]


def _judge(plan: ArmPlan, machine: Machine, phases: Mapping[str, Mapping[str, float]]) -> None:
    """Fill in verdict and reasons."""
    capacity, setup = machine.gib * GIB, plan.arm.setup
    if plan.peak > capacity * (1 - MARGIN):
        plan.verdict = "no" if plan.peak > capacity else "marginal"
        plan.reasons.append(f"{plan.peak / GIB:.1f} of {machine.gib:g} GiB on a device ({plan.phase})")
    if machine.host_gib is not None and plan.needed > machine.host_gib * GIB:
        plan.verdict = "no"
        plan.reasons.append(f"{plan.needed / GIB:.0f} of {machine.host_gib:.0f} GiB on a host")
    if setup.rollout and setup.cuda:
        cache = phases["rollout"]["vLLM KV cache"]
        one = kv_bytes(setup.model, setup.rollout.prompt + setup.rollout.response, setup.rollout.tensor_parallel)
        if cache < one:
            plan.verdict = "no"
            plan.reasons.append("vLLM's share holds its weights but not the cache of one response")
        else:
            plan.facts.append(f"vLLM holds {concurrent(setup, setup.rollout, cache)} responses at once per replica")
