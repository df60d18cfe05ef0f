"""What a run takes from a finished run of its comparison: its budget, and what makes it a control. No engine."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from eaft_verl.data.parquet import Example, trained_of
from eaft_verl.errors import RunError
from eaft_verl.experiment.chain import Checkpoint, finished_run
from eaft_verl.recipe import budgets
from eaft_verl.recipe.chains import START
from eaft_verl.recipe.config import Config, Control, changed, value_of
from eaft_verl.recipe.matching import GRPO
from eaft_verl.runs import Run
from eaft_verl.training.grpo.config import updates_per_step
from eaft_verl.training.sft.order import PADDING, batch_indices

SAME_FOR_CONTROL = ("model", "data", "template", "start")


class Derived(NamedTuple):
    """The configuration with what was derived written into it, all keys that may differ, and run.json's `derived`."""

    config: Config
    declared: list[str]
    record: dict[str, Any]


def derive(
    config: Config,
    declared: list[str],
    keys: dict[str, str],
    examples: Sequence[Example],
    start: Checkpoint | None = None,
    made_of: Sequence[Checkpoint] = (),
) -> Derived:
    """Budget, control, start and parts of the arm, read from the finished runs it names; nothing changes for others.

    An anchor without a reference is to the recipe's model, wherever the arm starts: what is kept is what the base can.

    RunError if such a run is missing or not finished, lacks what is needed, or was made from another model or data.
    """
    changes: dict[str, Any] = {}
    record: dict[str, Any] = {}
    if config.budget:
        record["budget"] = _budget(config, config.budget.of, keys, examples, changes)
    if config.control:
        record["control"] = _control(config, config.control, keys, changes)
    if start:
        _same(Run(start.run), keys, ("model", "template"))
        record["start"] = start.record
        changes.update(_reference(config))
    for part in made_of:
        _same(Run(part.run), keys, ("model", "template"))
    if made_of:
        record["average"] = [part.record for part in made_of]
    if not changes:
        return Derived(config, declared, record)
    record["asked"] = {key: value_of(config, key) for key in changes}
    return Derived(changed(config, changes), sorted({*declared, *changes} - {"budget"}), record)


def _reference(config: Config) -> dict[str, Any]:
    """The anchor's reference of an arm with a start, as the workers take it: null is the model that they train from."""
    key = "objective.anchor.reference"
    if config.trainer == GRPO or not value_of(config, "objective.anchor"):
        return {}
    asked = value_of(config, key)
    return {key: config.model if asked is None else None} if asked in (None, START) else {}


def _grpo_costs(unit: str, config: Config) -> Iterator[float]:
    """What every step of verl's main_ppo costs in updates or samples: one batch of rollouts."""
    samples = config.verl.data.train_batch_size * config.verl.actor_rollout_ref.rollout.n
    return itertools.repeat({"updates": updates_per_step(config), "samples": samples}[unit])


def _sft_costs(unit: str, config: Config, examples: Sequence[Example]) -> Iterator[float]:
    """What update 1, 2, ... costs in updates, samples or tokens, in the order of the data; never ends."""
    trained, size = trained_of(examples), config.verl.data.train_batch_size
    for step in itertools.count(1):
        rows = [index for index in batch_indices(step, len(examples), size, config.seed) if index != PADDING]
        yield {"updates": 1, "samples": len(rows), "tokens": int(trained[rows].sum())}[unit]


def _budget(
    config: Config, of: str, keys: dict[str, str], examples: Sequence[Example], changes: dict[str, Any]
) -> dict[str, Any]:
    unit = config.compare.match
    otherwise = "; compare.match=none trains the arm on its own"
    run = finished_run(config, of, f"compare.match={unit} gives {config.arm} the budget of {of}", otherwise)
    _same(run, keys, ("model",))
    amount = budgets.spent(run.info, run.metrics())[unit]
    if not amount:
        raise RunError(f"{run.path} has not logged its {unit}; train it again with this version, or match updates")
    found = {"of": of, "unit": unit, "amount": amount}
    changes["budget"] = found
    if unit != "device_seconds":
        costs = _grpo_costs(unit, config) if config.trainer == GRPO else _sft_costs(unit, config, examples)
        changes["verl.trainer.total_training_steps"] = budgets.steps_for(amount, costs)
    return {**found, "run": run.path.name}


def _control(config: Config, control: Control, keys: dict[str, str], changes: dict[str, Any]) -> dict[str, Any]:
    run = finished_run(config, control.of, f"{config.arm} is a control of {control.of}")
    _same(run, keys, SAME_FOR_CONTROL)
    rows, found = run.metrics(), {"of": control.of, "by": control.by, "run": run.path.name}
    window = budgets.nll_window(len(rows))
    level = budgets.smoothed_nll(rows, window)
    if not abs(level) < float("inf"):
        raise RunError(f"{run.path}: its last training NLL is {level}; no other run can be stopped there")
    changes["control"] = {"of": control.of, "by": control.by, "level": level, "window": window}
    return {**found, "level": level, "window": window}


def _same(run: Run, keys: dict[str, str], names: tuple[str, ...]) -> None:
    stored = run.info["keys"]
    if differs := [name for name in names if stored.get(name) != keys.get(name)]:
        raise RunError(
            f"{run.path} was trained from another {differs[0]} ({stored.get(differs[0])}, now {keys.get(differs[0])}); "
            "choose another output= or remove it"
        )
