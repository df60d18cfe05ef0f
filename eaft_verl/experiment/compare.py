"""`eaft compare`: base evaluated once, every arm trained and evaluated, one report. Each stage is skipped when done.

A stage is a process of its own: what it leaves is a run directory, and GPU memory is free when the next one starts.
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eaft_verl.cluster.doctor import idle_gpus
from eaft_verl.errors import ConfigError, RunError
from eaft_verl.experiment.stages import Lane, Stage, fits_beside, run
from eaft_verl.experiment.stored import require_same
from eaft_verl.experiment.use import how_to_use
from eaft_verl.planning.machine import FREED_IS_KEPT, gpus_here
from eaft_verl.recipe.chains import needed_arms
from eaft_verl.recipe.checks import check, pending, warn, warn_of
from eaft_verl.recipe.choose import Rule, rule_of
from eaft_verl.recipe.config import Config, plain
from eaft_verl.recipe.model_fit import notes_at_hand
from eaft_verl.recipe.resolve import Recipe, load_recipe, resolve
from eaft_verl.reporting.report import report
from eaft_verl.reporting.summary import models_beside, place_of, summary
from eaft_verl.runs import Run, is_run, run_name


def compare(
    recipe_path: str,
    arms: list[str] | None,
    seeds: list[int] | None,
    overrides: list[str],
    restarts: int = 0,
    *,
    dry_run: bool,
    alone: bool = False,
) -> int:
    """Run what is not done yet and report; 0 when every arm is in the report, 1 when one failed.

    restarts: of each training after the loss of a worker or node, at most; alone: no two stages at a time.
    """
    recipe = load_recipe(recipe_path)
    arms = arms or list(recipe.arms)
    if len(set(arms)) < len(arms):
        raise ConfigError(f"--arms {','.join(arms)} names an arm twice; seeds repeat an arm: --seeds 0,1")
    configs = in_order(_resolve_all(recipe, arms, seeds, overrides, dry_run=dry_run))
    base, stages = plan(recipe, configs, overrides)
    require_same(base.run, configs[0])
    for config, pair in zip(configs, stages, strict=True):
        require_same(pair[0].run, config)
    if not dry_run:  # reading the model's code takes seconds; `eaft train --dry-run` and `eaft doctor` do
        warn_of(dict.fromkeys(note for config in configs for note in _notes(config)))
    if dry_run:
        _show(configs, base, stages)
        return 0
    started = time.monotonic()
    lost = _run_arms(base, configs, stages, restarts, alone=alone)
    return 1 if lost is None else _close(base, configs, stages, lost, time.monotonic() - started)


def _close(
    base: Stage, configs: list[Config], stages: list[tuple[Stage, Stage]], lost: dict[str, str], seconds: float
) -> int:
    """The report of what did not fail, and what did; 1 where anything did."""
    failed = [
        {"arm": config.arm, "seed": config.seed, "run": pair[0].run.name, "error": lost[pair[0].run.name]}
        for config, pair in zip(configs, stages, strict=True)
        if pair[0].run.name in lost
    ]
    finished = [pair[0].run for pair in stages if pair[0].run.name not in lost]
    if finished:
        _report(base.run, finished, failed, rule_of(configs[0].choose), seconds)
    for row in failed:
        print(f"failed: {row['run']}: {row['error']}; run the same command again to go on", file=sys.stderr)
    return 1 if failed else 0


def _report(base: Path, finished: list[Path], failed: list[dict[str, Any]], rule: Rule | None, seconds: float) -> None:
    """Write the report; print its numbers, its path and how the last model is used."""
    out = place_of(base.parent, finished)
    found = report([base, *finished, *models_beside(base)], out, failed=failed, rule=rule)
    print("\n".join([*summary(found), f"report: {out / 'report.html'} ({seconds:.0f} s in all)"]), flush=True)
    with contextlib.suppress(RunError):  # its exports have been removed since
        print("\n".join(how_to_use(Run(finished[-1]))), flush=True)


def _show(configs: list[Config], base: Stage, stages: list[tuple[Stage, Stage]]) -> None:
    """What a run would do, stage by stage, and where it would stop."""
    for stage in (base, *(stage for pair in stages for stage in pair)):
        print(f"{'done' if stage.done else 'todo'}  {stage.label:32} eaft {shlex.join(stage.arguments)}")
    runs = shlex.join(str(stage.run) for stage in (base, *(pair[0] for pair in stages)))
    print(f"todo  {'report':32} eaft report {runs}")
    warn_of(idle_gpus(configs[0], len(gpus_here())))
    warn(list(dict.fromkeys(message for config in configs for message in pending(config, contents=True))))


def parse_seeds(text: str | None) -> list[int] | None:
    """The numbers of `0,1,2`; None for none. ConfigError for anything else."""
    try:
        return [int(seed) for seed in text.split(",")] if text else None
    except ValueError:
        raise ConfigError(f"--seeds {text!r} must be whole numbers separated by commas, e.g. 0,1,2") from None


def in_order(configs: list[Config]) -> list[Config]:
    """Every arm after those that it is made from or measured by, each seed for itself; otherwise as given.

    ConfigError if such an arm is neither among them with the same seed nor finished in the output folder.
    """
    among = {run_name(config.arm, config.seed) for config in configs}
    for config in configs:
        for name in sorted(needed_runs(config) - among):
            if not _finished(Path(config.output) / name):
                raise ConfigError(
                    f"arm {config.arm} seed {config.seed} needs {name}, which is neither among the arms and seeds of "
                    f"this comparison nor finished in {config.output}; add its arm and seed, or finish it first"
                )
    by_name = {run_name(config.arm, config.seed): config for config in configs}

    def depth(config: Config) -> int:
        return max((1 + depth(by_name[name]) for name in needed_runs(config) & among), default=0)

    return sorted(configs, key=lambda config: (depth(config), config.control is not None))


def needed_runs(config: Config) -> set[str]:
    """Names of the runs that must be finished before this one starts."""
    return {run_name(arm, config.seed) for arm in needed_arms(config.arm, plain(config))}


def _outdated(run: Path, config: Config) -> str | None:
    """Why a run that is there is not what would be made now: what it was made from may have been trained meanwhile."""
    try:
        require_same(run, config)
    except RunError as error:
        return str(error)
    return None


def _finished(run: Path) -> bool:
    return is_run(run) and Run(run).info["status"] == "finished"


def _run_arms(
    base: Stage, configs: list[Config], stages: list[tuple[Stage, Stage]], restarts: int, *, alone: bool
) -> dict[str, str] | None:
    """Evaluate the base, train and evaluate every arm; {name of a run: why it failed}, the others go on. None where
    the base failed.

    Evaluations go on beside the next trainings where that fits, unless all are to be alone.
    """
    failed: dict[str, str] = {}
    trainings = [*zip(configs, (pair[0] for pair in stages), strict=True)]
    lane = Lane(vital=base)

    def settle(*of_one: tuple[Stage, str | None]) -> None:
        failed.update({stage.run.name: error for stage, error in (*lane.settled(), *of_one) if error})

    def evaluate(stage: Stage, following: int) -> None:
        nexts = [] if alone or stage.done else trainings[following : following + 1]
        fits = any(not training.done and fits_beside(config) for config, training in nexts)
        if beside := not stage.done and (fits or not lane.free_soon):  # two at a time, or soon with all cores alone
            lane.add(stage)
        if not fits:
            lane.finish()
            settle()
            if not beside and base.run.name not in failed:
                settle((stage, run(stage, 0)))

    try:
        evaluate(base, 0)
        for number, (config, (training, evaluation)) in enumerate(zip(configs, stages, strict=True), 1):
            if base.run.name in failed:
                break
            error = _not_now(config, training, failed) or run(training, restarts, lane)
            settle((training, error))
            if not error and base.run.name not in failed:
                evaluate(evaluation, number)
        lane.finish()
        settle()
    finally:
        lane.close()
    return None if base.run.name in failed else failed


def _not_now(config: Config, training: Stage, failed: Mapping[str, str]) -> str | None:
    """Why an arm cannot be trained, or is not what would be trained now."""
    lost = (name for name in needed_runs(config) & failed.keys() if not _finished(training.run.parent / name))
    if missing := sorted(lost):
        return f"not started: it needs {', '.join(missing)}, which failed"
    return _outdated(training.run, config)


def plan(recipe: Recipe, configs: list[Config], overrides: list[str]) -> tuple[Stage, list[tuple[Stage, Stage]]]:
    """The base's evaluation, and training and evaluation of every arm and seed."""
    output, source = Path(configs[0].output), str(recipe.path)
    memory = FREED_IS_KEPT if configs[0].device == "cpu" else {}
    base = Stage(
        "base: evaluate",
        output / "base",
        ("evaluated", True),
        ["evaluate", configs[0].model, "--recipe", source, "--out", str(output / "base"), *overrides],
        memory,
    )
    stages = []
    for config in configs:
        label = run_name(config.arm, config.seed)
        folder = output / label
        train = ["train", source, "--arm", config.arm, *overrides, f"seed={config.seed}"]
        stages.append(
            (
                Stage(f"{label}: train", folder, ("status", "finished"), train),
                Stage(f"{label}: evaluate", folder, ("evaluated", True), ["evaluate", str(folder)], memory),
            )
        )
    return base, stages


def _resolve_all(
    recipe: Recipe, arms: list[str], seeds: list[int] | None, overrides: list[str], *, dry_run: bool = False
) -> list[Config]:
    """Every arm and seed, checked before the first one starts."""
    _check_seeds(seeds or [], overrides)
    configs = []
    for arm in arms:
        for chosen in [[f"seed={seed}"] for seed in seeds or ()] or [[]]:
            config = resolve(recipe, arm, [*overrides, *chosen])
            try:
                check(config, dry_run=dry_run)
            except ConfigError as error:
                raise ConfigError(f"arm {arm}: {error}") from None
            configs.append(config)
    if len({config.output for config in configs}) > 1 or len({config.model for config in configs}) > 1:
        raise ConfigError("arms of one comparison must share `model` and `output`; move them to the shared part")
    return configs


def _check_seeds(seeds: list[int], overrides: list[str]) -> None:
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {','.join(map(str, seeds))} names a seed twice; every seed is one run of an arm")
    if seeds and any(word.startswith("seed=") for word in overrides):
        raise ConfigError("--seeds and seed= both say which seeds; give one of them")


def _notes(config: Config) -> list[str]:
    """What the model says of an arm, before the first one starts."""
    try:
        return notes_at_hand(config)
    except ConfigError as error:
        raise ConfigError(f"arm {config.arm}: {error}") from None
