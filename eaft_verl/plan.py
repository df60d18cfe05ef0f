"""`eaft plan`: what every arm of a recipe needs on each device, host and disk, how long it takes, and what would fit.

Planning loads no model. Verdicts are given on numbers that are right to about five percent, so an arm that fills the
last five percent of a device is called marginal and counts as not fitting.
"""

import argparse
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from eaft_verl.errors import ConfigError
from eaft_verl.plan_formulas import (
    CONTEXT,
    FRAGMENTATION,
    GIB,
    PROCESS,
    cache_bytes,
    checkpoint_bytes,
    export_bytes,
    host_bytes,
    kv_bytes,
    rollout_phase,
    training_phases,
)
from eaft_verl.plan_settings import Arm, arm_of
from eaft_verl.plan_time import SPEED, Speed, concurrent, forward_flops, speed_of, update_seconds
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import load_recipe, resolve

NOT_FITTING = 3  # exit code
MARGIN = 0.05  # of a device that must stay free
EXPORT_BYTES = 2  # per parameter: bfloat16, the dtype of every model planned so far
ASLEEP = 2 * GIB  # a sleeping vLLM: its CUDA context, graphs and buffers; an assumption
_GPUS = re.compile(r"^(\d+)x(?:([A-Za-z]+\d+)-)?(\d+(?:\.\d+)?)$")


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
        """Assumed speed of a device."""
        return SPEED[self.kind]


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
    reasons: list[str] = field(default_factory=list)  # for the verdict, and what `eaft train` would refuse
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


def machine_of(config: DictConfig, gpus: str | None, host_gib: float | None) -> Machine:
    """The machine of --gpus, else this one; ConfigError where this one has no GPU and the recipe wants one."""
    trainer = config.verl.trainer
    if gpus:
        _, kind, gib = parse_gpus(gpus)
        speed_of(kind)
        return Machine(trainer.nnodes, trainer.n_gpus_per_node, gib, kind, host_gib)
    here = host_gib or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if config.device == "cpu":
        return Machine(1, trainer.n_gpus_per_node, here / trainer.n_gpus_per_node, "CPU", here)
    found = _nvidia()
    if found is None:
        raise ConfigError("device=cuda and no GPU is visible here: say what to plan for, e.g. --gpus 8x80 --nodes 2")
    kind = next((name for name in SPEED if name in found[0].upper()), "A100")
    return Machine(trainer.nnodes, trainer.n_gpus_per_node, found[1], kind, here)


def parse_gpus(text: str) -> tuple[int, str, float]:
    """(GPUs per node, kind, GiB of each) of '8x80' or '8xH100-80'; ConfigError otherwise."""
    match = _GPUS.match(text)
    if not match or int(match[1]) < 1 or float(match[3]) <= 0:
        raise ConfigError(
            f"--gpus {text!r} must be GPUs per node x GiB of each, e.g. 8x80 or, with the kind, 8xH100-80 "
            f"(kinds: {', '.join(name for name in SPEED if name != 'CPU')})"
        )
    return int(match[1]), (match[2] or "A100").upper(), float(match[3])


def plan_arm(config: DictConfig, machine: Machine, measured: dict[str, Any] | None = None) -> ArmPlan:
    """The plan of one resolved configuration. measured: what a probe found, whose speed replaces the assumption."""
    arm = arm_of(config)
    setup, capacity = arm.setup, machine.gib * GIB
    phases = training_phases(setup)
    if setup.rollout and setup.cuda:
        rollout = rollout_phase(setup, capacity)
        for parts in phases.values():
            awake = 0.0 if setup.rollout.frees_cache else rollout["vLLM weights"] + rollout["vLLM KV cache"]
            parts.update({"vLLM": awake + ASLEEP})
        phases["rollout"] = rollout
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    device = {name: size for name, size in phases[phase].items() if size}
    device |= {"context": CONTEXT[True], "fragmentation": FRAGMENTATION * _moving(device)} if setup.cuda else {}
    if not setup.cuda:
        device["process"] = PROCESS
    speed = _speed(arm, machine, measured)
    seconds = update_seconds(setup, speed)
    host = host_bytes(setup, EXPORT_BYTES, arm.reference_tokens)
    if not setup.cuda:
        host["all processes"] = sum(device.values()) * setup.devices
        host.pop("processes")
        if setup.rollout:
            host["rollout servers"] = (PROCESS + setup.compute * setup.model.parameters) * setup.devices
    plan = ArmPlan(arm, phase, device, host, _disk(arm), seconds, _before(arm, speed), "fits", measured=measured)
    _judge(plan, machine, phases)
    return plan


def _moving(parts: Mapping[str, float]) -> float:
    """Bytes that torch's allocator handles; vLLM's share is one claim."""
    return sum(size for name, size in parts.items() if not name.startswith("vLLM"))


def _speed(arm: Arm, machine: Machine, measured: dict[str, Any] | None) -> Speed:
    if not measured:
        return machine.speed
    known = machine.speed
    return Speed(measured["flops"], 1.0, known.memory, known.link, "measured by --probe")


def _disk(arm: Arm) -> dict[str, float]:
    """Bytes of one of each, and of all that are on disk at once."""
    trainer, setup = arm.config.verl.trainer, arm.setup
    one, export = checkpoint_bytes(setup), export_bytes(setup.model, EXPORT_BYTES)
    kept = 0 if trainer.save_freq == -1 else (trainer.max_ckpt_to_keep or arm.updates or 1) + 1
    cache = cache_bytes(arm.reference_tokens, setup.cache_k)
    exports = min(arm.config.evaluate.points, arm.updates or arm.config.evaluate.points)
    parts = {"resumable checkpoint": one, "export": export, "reference cache": cache}
    return {**parts, "at once": one * max(kept, 1) + export * exports + cache}


def disk_at_once(config: DictConfig) -> float:
    """Bytes an arm has on disk at its peak: exports, resumable checkpoints with the one being written, caches."""
    return _disk(arm_of(config))["at once"]


def _before(arm: Arm, speed: Speed) -> float:
    """Seconds of forward passes over all data before the first update."""
    if not arm.passes or arm.amount.examples is None:
        return 0.0
    tokens = arm.amount.examples * arm.amount.mean
    return (
        arm.passes
        * sum(forward_flops(arm.setup.model, tokens, arm.amount.attended))
        / (arm.setup.devices * speed.flops)
    )


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


def configs_of(options: argparse.Namespace, path: str, overrides: list[str]) -> list[DictConfig]:
    """The configuration of every planned arm, on the machine of --gpus and --nodes."""
    recipe = load_recipe(path)
    asked = [options.arm] if options.arm else list(recipe.arms)
    placed: list[str] = []
    if options.gpus:
        placed += ["device=cuda", f"verl.trainer.n_gpus_per_node={parse_gpus(options.gpus)[0]}"]
    if options.nodes:
        placed.append(f"verl.trainer.nnodes={options.nodes}")
    return [resolve(recipe, arm, [*placed, *overrides]) for arm in asked]


def plan_command(options: argparse.Namespace, path: str, overrides: list[str]) -> int:
    """Plan every arm and print it; 0 when all fit, NOT_FITTING when one does not."""
    from eaft_verl.plan_search import remedies
    from eaft_verl.plan_text import as_json, print_plans

    if options.nodes is not None and options.nodes < 1:
        raise ConfigError(f"--nodes {options.nodes} must be at least 1")
    configs = configs_of(options, path, overrides)
    machine = machine_of(configs[0], options.gpus, options.host)
    plans = []
    for config in configs:
        measured = None
        if options.probe:
            from eaft_verl.plan_probe import probe

            measured = probe(config)
        plan = plan_arm(config, machine, measured)
        if problem := start_problem(config, elsewhere=options.gpus is not None):
            plan.reasons.append(f"would not start: {problem}")
        if plan.verdict != "fits":
            plan.remedies = remedies(config, machine)
        plans.append(plan)
    if options.json:
        print(as_json(plans, machine))
    else:
        print_plans(plans, machine)
    return 0 if all(plan.verdict == "fits" for plan in plans) else NOT_FITTING


def start_problem(config: DictConfig, *, elsewhere: bool) -> str | None:
    """What `eaft train` would say of the configuration; a plan is made all the same."""
    try:
        check(config, elsewhere=elsewhere)
    except ConfigError as error:
        return str(error)
    return None


def _nvidia() -> tuple[str, float] | None:
    """(name, GiB) of the first visible GPU."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode or not done.stdout.strip():
        return None
    name, mib = done.stdout.splitlines()[0].rsplit(",", 1)
    return name, float(mib) / 1024
