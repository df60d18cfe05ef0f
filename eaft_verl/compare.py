"""`eaft compare`: base evaluated once, every arm trained and evaluated, one report. Each stage is skipped when done.

A stage is a process of its own: what it leaves is a run directory, and GPU memory is free when the next one starts.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from eaft_verl.checks import check
from eaft_verl.config import Recipe, load_recipe, resolve
from eaft_verl.errors import ConfigError
from eaft_verl.report import report
from eaft_verl.runs import Run


@dataclass(frozen=True)
class Stage:
    """One command, the run directory it leaves, and the field of run.json that says it is done."""

    label: str
    run: Path
    done_when: tuple[str, object]
    arguments: list[str]

    @property
    def done(self) -> bool:
        """Whether an earlier call finished it."""
        field, value = self.done_when
        return (self.run / "run.json").exists() and Run(self.run).info.get(field) == value


def compare(
    recipe_path: str, arms: list[str] | None, seeds: list[int] | None, overrides: list[str], *, dry_run: bool
) -> int:
    """Run what is not done yet and report; 0 when every arm is in the report, 1 when one failed."""
    recipe = load_recipe(recipe_path)
    arms = arms or list(recipe.arms)
    configs = _resolve_all(recipe, arms, seeds, overrides)
    output = Path(configs[0].output)
    base, stages = plan(recipe, configs, overrides)
    if dry_run:
        for stage in (base, *(stage for pair in stages for stage in pair)):
            print(f"{'done' if stage.done else 'todo'}  {stage.label:32} eaft {' '.join(stage.arguments)}")
        runs = " ".join(str(stage.run) for stage in (base, *(pair[0] for pair in stages)))
        print(f"todo  {'report':32} eaft report {runs}")
        return 0
    started = time.monotonic()
    if not _run(base):
        return 1
    finished, failed = [base.run], []
    for pair in stages:
        good = all(_run(stage) for stage in pair)
        (finished if good else failed).append(pair[0].run)
    if len(finished) > 1:
        report(finished, output / "report")
        print(f"report: {output / 'report' / 'report.html'} ({time.monotonic() - started:.0f} s in all)", flush=True)
    for run in failed:
        print(f"failed: {run} (see the messages above; run the same command again to go on)", file=sys.stderr)
    return 1 if failed else 0


def plan(recipe: Recipe, configs: list[DictConfig], overrides: list[str]) -> tuple[Stage, list[tuple[Stage, Stage]]]:
    """The base's evaluation, and training and evaluation of every arm and seed."""
    output, source = Path(configs[0].output), str(recipe.path)
    base = Stage(
        "base: evaluate",
        output / "base",
        ("evaluated", True),
        ["evaluate", configs[0].model, "--recipe", source, "--out", str(output / "base"), *overrides],
    )
    stages = []
    for config in configs:
        label = f"{config.arm}-seed{config.seed}"
        folder = output / label
        train = ["train", source, "--arm", config.arm, *overrides, f"seed={config.seed}"]
        stages.append(
            (
                Stage(f"{label}: train", folder, ("status", "finished"), train),
                Stage(f"{label}: evaluate", folder, ("evaluated", True), ["evaluate", str(folder)]),
            )
        )
    return base, stages


def _resolve_all(recipe: Recipe, arms: list[str], seeds: list[int] | None, overrides: list[str]) -> list[DictConfig]:
    """Every arm and seed, checked before the first one starts."""
    configs = []
    for arm in arms:
        for seed in seeds or [None]:
            config = resolve(recipe, arm, [*overrides, *([] if seed is None else [f"seed={seed}"])])
            try:
                check(config)
            except ConfigError as error:
                raise ConfigError(f"arm {arm}: {error}") from None
            configs.append(config)
    if len({config.output for config in configs}) > 1 or len({config.model for config in configs}) > 1:
        raise ConfigError("arms of one comparison must share `model` and `output`; move them to the shared part")
    return configs


def _run(stage: Stage) -> bool:
    if stage.done:
        print(f"[{stage.label}] done already", flush=True)
        return True
    print(f"[{stage.label}]", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "eaft_verl.cli", *stage.arguments], check=False).returncode
    print(
        f"[{stage.label}] {'done' if code == 0 else f'failed with exit code {code}'}, "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )
    return code == 0
