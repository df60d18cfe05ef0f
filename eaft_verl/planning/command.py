"""`eaft plan`: what every arm of a recipe needs on each device, host and disk, how long it takes, and what would fit.

Planning loads no model.
"""

import argparse
import os
import re
import subprocess

from omegaconf import DictConfig

from eaft_verl.errors import ConfigError
from eaft_verl.planning.arm_plan import Machine, plan_arm
from eaft_verl.planning.formulas import GIB
from eaft_verl.planning.probe import probe
from eaft_verl.planning.remedies import remedies
from eaft_verl.planning.speed import SPEED, speed_of
from eaft_verl.planning.text import as_json, print_plans
from eaft_verl.recipe.checks import start_problem
from eaft_verl.recipe.resolve import load_recipe, resolve

NOT_FITTING = 3  # exit code
_GPUS = re.compile(r"^(\d+)x(?:([A-Za-z]+\d+)-)?(\d+(?:\.\d+)?)$")


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
    if options.nodes is not None and options.nodes < 1:
        raise ConfigError(f"--nodes {options.nodes} must be at least 1")
    configs = configs_of(options, path, overrides)
    machine = machine_of(configs[0], options.gpus, options.host)
    plans = []
    for config in configs:
        measured = None
        if options.probe:
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
