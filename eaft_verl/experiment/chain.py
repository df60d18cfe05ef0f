"""The run that an arm begins at or is made of, what it had cost until there, and whether it is still the same."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from eaft_verl.errors import RunError
from eaft_verl.models import model_key
from eaft_verl.recipe.budgets import UNITS, spent
from eaft_verl.recipe.chains import BASE, CHOSEN, LAST, needed_arms
from eaft_verl.recipe.config import Config, plain
from eaft_verl.runs import Run, is_run, run_name, step_name


class Checkpoint(NamedTuple):
    """An export of a finished run of the comparison: its place, its identity, and what the whole chain cost to it."""

    arm: str
    run: Path
    step: int
    folder: Path
    key: str
    before: dict[str, float | None]

    @property
    def record(self) -> dict[str, Any]:
        """What run.json keeps of it."""
        return {"arm": self.arm, "run": self.run.name, "step": self.step, "key": self.key, "before": self.before}


def finished_run(config: Config, arm: str, why: str, otherwise: str = "") -> Run:
    """That arm's run with this seed; RunError with the command that makes it where it is not there or not finished."""
    folder = Path(config.output) / run_name(arm, config.seed)
    status = Run(folder).info["status"] if is_run(folder) else None
    if status != "finished":
        found = "does not exist" if status is None else f"has status {status!r}"
        command = f"eaft train {quote(config.recipe)} --arm {arm} seed={config.seed}"
        raise RunError(
            f"{why}, and {folder} {found}; first run `{command}` with the same overrides, or "
            f"`eaft compare`, which keeps the order{otherwise}"
        )
    return Run(folder)


def start_of(config: Config) -> Checkpoint | None:
    """Where an arm with `start` begins; None for the others."""
    if not config.start:
        return None
    arm, step = config.start.arm, config.start.step
    return _checkpoint(config, finished_run(config, arm, f"arm {config.arm} starts from {arm}"), arm, step)


def began_at(run: Run) -> Path | None:
    """The export that a run with a start was trained from; None for others, RunError where it is not there as it was.

    An adapter is worth nothing without the weights that it was trained on.
    """
    start = (run.info.get("derived") or {}).get("start")
    if not start:
        return None
    folder = run.path.parent / start["run"] / "checkpoints" / step_name(start["step"])
    if not (folder / "config.json").exists() or model_key(folder) != start["key"]:
        raise RunError(f"{run.path} began at {folder}, which is not there any more, or is another model now")
    return folder


def missing_before(config: Config) -> list[str]:
    """What must be run before this arm can be, as `eaft train` would say it."""
    found = []
    for arm, why in needed_arms(config.arm, plain(config)).items():
        try:
            finished_run(config, arm, why)
        except RunError as error:
            found.append(str(error))
    return found


def averaged_of(config: Config) -> list[Checkpoint]:
    """The last exports that an average is made of: `of`, and `with` unless that is the base."""
    arms = [config.average["of"], config.average["with"]] if config.average else []
    found = []
    for arm in arms:
        if arm != BASE:
            run = finished_run(config, arm, f"arm {config.arm} is an average of {arm}")
            found.append(_checkpoint(config, run, arm, LAST))
    return found


def chain_keys(start: Checkpoint | None, made_of: Sequence[Checkpoint]) -> dict[str, str]:
    """Identities of the checkpoints that an arm is made from, by the key of the recipe that names them."""
    found = {"start": start.key} if start else {}
    return {**found, "average": "+".join(one.key for one in made_of)} if made_of else found


def stale(run: Run, config: Config) -> list[str]:
    """Which of these a run was made from as they no longer are; nothing where they are not to be had."""
    try:
        now = chain_keys(start_of(config), averaged_of(config))
    except RunError:
        return []
    before = run.info.get("keys", {})
    named = {"start": config.start and config.start.arm, "average": config.average and config.average["of"]}
    return [
        f"{key}: the checkpoint of {named[key]} is another one ({before.get(key)}, now {value})"
        for key, value in now.items()
        if before.get(key) != value
    ]


def _checkpoint(config: Config, run: Run, arm: str, step: str | int) -> Checkpoint:
    exports, last = run.checkpoints(), int(run.info["total_steps"])
    number = last if step == LAST else _chosen(run, exports) if step == CHOSEN else int(step)
    if number not in exports:
        raise RunError(
            f"{run.path} has no export of step {number}, from which {config.arm} is to start; it has "
            f"{', '.join(map(str, exports)) or 'none'}: set start.step to one of these, or last"
        )
    folder = exports[number]
    return Checkpoint(arm, run.path, number, folder, model_key(folder), cost_until(run, number))


def _chosen(run: Run, exports: dict[int, Path]) -> int:
    """The step that `chosen` in the run or beside it leads to."""
    for link in (run.path / CHOSEN, run.path.parent / CHOSEN):
        if found := [step for step, folder in exports.items() if link.exists() and link.resolve() == folder.resolve()]:
            return found[0]
    raise RunError(
        f"no checkpoint of {run.path} is chosen, and start.step={CHOSEN}: choose one with `eaft choose`, or set "
        "start.step to last or to a number"
    )


def cost_until(run: Run, step: int) -> dict[str, float | None]:
    """{unit of budgets: amount} of the run up to this step and of all that came before it in its chain."""
    info, rows = run.info, [row for row in run.metrics() if row["step"] <= step]
    if rows and step < info["total_steps"]:
        info = {**info, "train_seconds": rows[-1]["seconds"]}
    own, before = spent(info, rows), (info.get("derived") or {}).get("start", {}).get("before", {})
    return {unit: None if (cost := own[unit]) is None else cost + (before.get(unit) or 0) for unit in UNITS}
