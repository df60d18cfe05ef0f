"""The stages of a comparison: each a process, one after the other, but that an arm may be evaluated beside the next.

On a CPU an evaluation leaves a third of two cores idle, and a training too: together they take two thirds of the time.
A GPU's memory is one stage's alone.
"""

import contextlib
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from eaft_verl.boundary import python_command
from eaft_verl.errors import ConfigError, DataError, RunError
from eaft_verl.experiment.processes import CAUSE_FILE, LOG_FILE, PATIENCE_S, Child, attend, run_stage
from eaft_verl.experiment.supervision import supervised
from eaft_verl.planning.formulas import GIB
from eaft_verl.planning.machine import cpus_here, machine_of, memory_here
from eaft_verl.recipe.config import Config
from eaft_verl.runs import Run, is_run


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
        return is_run(self.run) and Run(self.run).info.get(field) == value

    @property
    def log(self) -> Path:
        """OUTPUT/logs/base-evaluate.log."""
        return self.run.parent / "logs" / f"{self.label.replace(': ', '-')}.log"


class Beside:
    """A stage that goes on while others run; what it says is kept until somebody waits for it."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.started = stage, time.monotonic()
        self.folder = tempfile.TemporaryDirectory()
        print(f"[{stage.label}] goes on beside the next training; what it says follows when it is done", flush=True)
        with (Path(self.folder.name) / "output").open("wb") as output:
            self.child = Child(_command(stage), _environ(stage, Path(self.folder.name)), output)

    def result(self) -> str | None:
        """Why it failed, once it has ended; None when it is done. Raises Interrupted as `run_stage` does."""
        try:
            code = attend(lambda: self.child)
        finally:
            self.close()
        return _outcome(self.stage, code, self.started, Path(self.folder.name))

    def close(self) -> None:
        """End it, if it goes on, and show what it said."""
        self.child.end(PATIENCE_S)
        output = Path(self.folder.name) / "output"
        if output.exists():
            said = output.read_text(encoding="utf-8", errors="replace")
            print(f"[{self.stage.label}]\n{said}", end="", flush=True)
            output.unlink()


def run(stage: Stage, restarts: int, beside: Beside | None = None, *, vital: bool = False) -> str | None:
    """Why the stage failed; None when it is done. beside, vital: as of `run_stage`."""
    if stage.done:
        print(f"[{stage.label}] done already", flush=True)
        return None
    print(f"[{stage.label}]", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        environ = _environ(stage, Path(folder))

        def attempt() -> int:
            return run_stage(_command(stage), environ, beside.child if beside else None, vital=vital)

        code = supervised(attempt, stage.run, restarts) if stage.arguments[0] == "train" else attempt()
        if beside and code == 0:
            Run(stage.run).update(beside=beside.stage.label)
        return _outcome(stage, code, started, Path(folder))


def fits_beside(config: Config) -> bool:
    """Whether the training of this arm leaves room for an evaluation, which holds less of the same model."""
    if config.device != "cpu" or config.evaluate.backend != "hf" or config.compare.match == "device_seconds":
        return False
    from eaft_verl.planning.arm_plan import plan_arm

    free = min(psutil.virtual_memory().available / GIB, memory_here())
    with contextlib.suppress(ConfigError, DataError, RunError):  # what cannot be planned has the machine to itself
        return cpus_here() > 1 and 2 * plan_arm(config, machine_of(config, None, None)).needed / GIB <= free
    return False


def _command(stage: Stage) -> list[str]:
    return python_command("eaft_verl.cli", *stage.arguments)


def _environ(stage: Stage, folder: Path) -> dict[str, str]:
    """Where the stage leaves the error that it ends with, and what it prints where somebody looks at a terminal."""
    environ = {CAUSE_FILE: str(folder / "cause")}
    if sys.stdout.isatty():  # what is left there: a line at either end, how many rows are used, and the bar
        stage.log.parent.mkdir(parents=True, exist_ok=True)
        environ[LOG_FILE] = str(stage.log)
    return environ


def _outcome(stage: Stage, code: int, started: float, folder: Path) -> str | None:
    """Say how the stage ended; why it failed, None when it is done."""
    how = "done" if code == 0 else f"failed with exit code {code}"
    print(f"[{stage.label}] {how}, {time.monotonic() - started:.0f} s", flush=True)
    left = folder / "cause"
    cause = left.read_text(encoding="utf-8") if left.exists() else ""
    return None if code == 0 else cause or _cause(stage, code)


def _cause(stage: Stage, code: int) -> str:
    """What a stage that left no cause wrote into run.json before it ended, else all that is known from outside."""
    info = Run(stage.run).info if is_run(stage.run) else {}
    if info.get("error"):
        return str(info["error"])
    where = f"with status {info['status']!r}" if info else "before it had a run directory"
    return f"{stage.label} ended {where}, exit code {code}; see its messages"
