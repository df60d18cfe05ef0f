"""Run directories read once into plain objects: runs, and arms as groups of runs that differ by seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.runs import Run, step_name

BASE, MODEL = "base", "model"
REFERENCE = "sft"
Record = dict[str, Any]
Point = tuple[int, ...]  # one evaluation of an arm: a step per run, in the order of the runs


@dataclass
class RunData:
    """One run directory. `step` is that of the evaluation the report takes as final (base: 0)."""

    run: Run
    info: Record
    evals: dict[int, dict[str, Record]]
    _samples: dict[tuple[int, str], dict[str, Record]] = field(default_factory=dict)

    @property
    def arm(self) -> str:
        """Name of the arm; 'base' for the base run, the folder's of a model that was not trained here."""
        if self.info["kind"] == MODEL:
            return self.run.path.name
        return BASE if self.info["kind"] == BASE else str(self.info["arm"])

    @property
    def label(self) -> str:
        """What tables and messages call this run."""
        return f"{self.arm} seed {self.info['seed']}" if self.info["kind"] == "arm" else self.arm

    @cached_property
    def rows(self) -> list[Record]:
        """Rows of training, in order of step."""
        return self.run.metrics("train")

    @property
    def step(self) -> int:
        """The last planned step; of an unfinished run the last one evaluated."""
        planned = int(self.info["total_steps"]) if self.arm != BASE else 0
        return planned if planned in self.evals or not self.evals else max(self.evals)

    def samples(self, step: int, name: str) -> dict[str, Record]:
        """{example id: row} of one benchmark. RunError if an id occurs twice."""
        if (step, name) not in self._samples:
            rows = self.run.samples(step, name)
            if not all(isinstance(row, dict) and "id" in row and isinstance(row.get("scores"), dict) for row in rows):
                raise RunError(
                    f"{self.run.path}: the samples of {name}, step {step} are damaged; {_again(self.run, step)}"
                )
            found = {str(row["id"]): row for row in rows}
            if len(found) != len(rows):
                raise RunError(f"{self.run.path}: benchmark {name}, step {step} has repeated example ids")
            self._samples[step, name] = found
        return self._samples[step, name]


@dataclass(frozen=True)
class Arm:
    """Runs of one arm, ordered by seed. The base model is an arm of one run."""

    name: str
    runs: tuple[RunData, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds."""
        return tuple(int(run.info["seed"]) for run in self.runs)

    @property
    def control(self) -> Record | None:
        """What the runs say of the arm they are a control of: {of, by, ...}; None for other arms."""
        return self.runs[0].info.get("derived", {}).get("control")

    @property
    def average(self) -> Record | None:
        """{of, with, weights: {step: weight}} of an arm that was not trained, but averaged; None for other arms."""
        return self.runs[0].info.get("average")

    @property
    def end(self) -> Point:
        """The last step of every seed; they differ where time or the NLL ended training."""
        return tuple(run.step for run in self.runs)

    def points(self) -> list[Point]:
        """Evaluations along training that every seed has, ascending, the last at each seed's own end.

        Seeds with equally many evaluations are paired in order, which are the same shares of a budget; otherwise only
        the steps they share and their ends are left.
        """
        steps = [sorted(step for step in run.evals if 0 < step <= run.step) for run in self.runs]
        if len({len(own) for own in steps}) == 1:
            return list(zip(*steps, strict=True))
        shared = set.intersection(*map(set, steps))
        return [(step,) * len(steps) for step in sorted(shared) if step < min(self.end)] + [self.end]


def shared_seeds(*arms: Arm) -> list[int]:
    """The seeds that all these arms have, ascending."""
    return sorted(set.intersection(*(set(arm.seeds) for arm in arms)))


def load(paths: Sequence[Path]) -> tuple[Arm, list[Arm]]:
    """(base, arms): the reference arm first, then in the order given, controls last; models aside (`load_models`).

    Raises RunError unless there is exactly one base run, at least one arm run, and each (arm, seed) once.
    """
    runs = [_read(path) for path in paths if not _is_model(path)]
    bases = [run for run in runs if run.arm == BASE]
    if len(bases) != 1:
        raise RunError(
            f"a report needs exactly one base run (kind 'base' in run.json), found {len(bases)} of {len(runs)}; "
            "evaluate the base model once and pass its run directory"
        )
    groups: dict[str, dict[int, RunData]] = {}
    for run in runs:
        if run.arm == BASE:
            continue
        seeds = groups.setdefault(run.arm, {})
        if (seed := int(run.info["seed"])) in seeds:
            first = seeds[seed].run.path
            raise RunError(f"arm {run.arm!r} seed {seed} is given twice: {first} and {run.run.path}; pass one of them")
        seeds[seed] = run
    if not groups:
        raise RunError("a report needs at least one arm run (kind 'arm' in run.json), found only the base run")
    arms = [Arm(name, tuple(seeds[seed] for seed in sorted(seeds))) for name, seeds in groups.items()]
    return Arm(BASE, (bases[0],)), sorted(arms, key=lambda arm: (arm.control is not None, arm.name != REFERENCE))


def load_models(paths: Sequence[Path], taken: Sequence[str]) -> list[Arm]:
    """The models among the runs that were evaluated and not trained here, each as an arm of one run.

    RunError for one whose folder has the name of another, of an arm or of the base (`taken`).
    """
    runs = [_read(path) for path in paths if _is_model(path)]
    names = [*taken, *(run.arm for run in runs)]
    if twice := [run for run in runs if names.count(run.arm) > 1]:
        raise RunError(f"{twice[0].run.path}: {twice[0].arm!r} is already a row of this report; rename the folder")
    return [Arm(run.arm, (run,)) for run in runs]


def _is_model(path: Path) -> bool:
    """By run.json alone: the evaluations of a run are read once."""
    return bool(Run(path).info.get("kind") == MODEL)


def _again(run: Run, step: int) -> str:
    return f"delete eval/{step_name(step)} there and run `eaft evaluate {run.path}`"


def _check_records(run: Run, evals: dict[int, dict[str, Any]]) -> None:
    """RunError for a record of a benchmark that does not hold what the report reads."""
    for step, records in evals.items():
        for name, record in records.items():
            metrics = record.get("metrics") if isinstance(record, dict) else None
            sound = isinstance(metrics, dict) and all(
                isinstance(one, dict) and _is_number(one.get("score")) and "higher_is_better" in one
                for one in metrics.values()
            )
            if not sound or record["metrics"].get(record.get("metric")) is None or not {"side", "n"} <= record.keys():
                raise RunError(f"{run.path}/eval/{step_name(step)}/{name}.json is no record; {_again(run, step)}")


def _is_number(value: Any) -> bool:
    """Whether the value is a number, or a text such as 'nan' that stands for one in JSON."""
    try:
        return value is not None and math.isfinite(float(value)) in (True, False)
    except (TypeError, ValueError):
        return False


def _read(path: Path) -> RunData:
    run = Run(path)
    info, evals = run.info, run.evals()
    _check_records(run, evals)
    if info.get("kind") not in (BASE, "arm", MODEL):
        raise RunError(f"{run.path}/run.json: kind={info.get('kind')!r}; it must be 'base', 'arm' or 'model'")
    if info.get("status") != "finished":  # the number of steps is known only once training has begun
        info.setdefault("total_steps", max(evals, default=0))
    needed = (
        ["arm", "seed", "total_steps", "model", "recipe", "status"] if info["kind"] == "arm" else ["model", "status"]
    )
    if missing := [key for key in needed if key not in info]:
        raise RunError(f"{run.path}/run.json lacks {', '.join(missing)}; it was not written by this version")
    info.setdefault("seed", 0)
    return RunData(run, info, evals)
