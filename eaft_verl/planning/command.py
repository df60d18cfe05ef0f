"""`eaft plan`: what every arm of a recipe needs on each device, host and disk, how long it takes, and what would fit.

Planning loads no model.
"""

import argparse

from eaft_verl.errors import ConfigError
from eaft_verl.planning.arm_plan import ArmPlan, plan_arm
from eaft_verl.planning.machine import Machine, machine_of, parse_gpus
from eaft_verl.planning.probe import probe
from eaft_verl.planning.remedies import remedies
from eaft_verl.planning.text import as_json, print_plans
from eaft_verl.recipe.checks import start_problem
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.resolve import load_recipe, resolve

NOT_FITTING = 3  # exit code


def plan_command(options: argparse.Namespace, path: str, overrides: list[str]) -> int:
    """Plan every arm and print it; 0 when all fit, NOT_FITTING when one does not."""
    placed: list[str] = []
    if options.gpus:
        placed += ["device=cuda", f"verl.trainer.n_gpus_per_node={parse_gpus(options.gpus)[0]}"]
    if options.nodes is not None:
        if options.nodes < 1:
            raise ConfigError(f"--nodes {options.nodes} must be at least 1")
        placed.append(f"verl.trainer.nnodes={options.nodes}")
    recipe = load_recipe(path)
    arms = [options.arm] if options.arm else list(recipe.arms)
    resolved = [resolve(recipe, arm, [*placed, *overrides]) for arm in arms]
    configs = [config for config in resolved if not config.average]  # one tensor in memory at a time, no device
    if not configs:
        raise ConfigError(f"arm {arms[0]} is an average, for which nothing is trained; plan the arm it is made of")
    machine = machine_of(configs[0], options.gpus, options.host)
    plans = [_plan(config, machine, options) for config in configs]
    if options.json:
        print(as_json(plans, machine))
    else:
        print_plans(plans, machine)
    return 0 if all(plan.verdict == "fits" for plan in plans) else NOT_FITTING


def _plan(config: Config, machine: Machine, options: argparse.Namespace) -> ArmPlan:
    """The plan with what would fit, and what would stop the arm all the same."""
    plan = plan_arm(config, machine, probe(config) if options.probe else None)
    plan.problem = start_problem(config, elsewhere=options.gpus is not None)
    if plan.verdict != "fits":
        plan.remedies = remedies(config, machine)
    return plan
