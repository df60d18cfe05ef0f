"""The stages of a comparison: each a process, one after the other, but that an arm may be evaluated beside the next.

A stage starts, loads and saves on one core: on a CPU two at a time are quicker as long as they are short. A long one
that has all cores to itself is quicker, as its threads wait awake (`waiting_threads`). A GPU's memory is one stage's.
"""

import contextlib
import math
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from eaft_verl.boundary import python_command
from eaft_verl.errors import ConfigError, DataError, RunError
from eaft_verl.experiment.processes import CAUSE_FILE, LOG_FILE, PATIENCE_S, WATCH_S, Child, attend, run_stage
from eaft_verl.experiment.supervision import supervised
from eaft_verl.files import read_json, write_json
from eaft_verl.planning.formulas import GIB
from eaft_verl.planning.machine import AWAKE, cpus_here, machine_of, memory_here
from eaft_verl.recipe.config import Config
from eaft_verl.runs import Run, is_run

NICENESS = 15
LONG_S = 2400.0  # of a training as planned, by a speed that a recent core has several times


@dataclass(frozen=True)
class Stage:
    """One command, the run directory it leaves, and the field of run.json that says it is done.

    environ: of its process, where the user has not chosen otherwise.
    """

    label: str
    run: Path
    done_when: tuple[str, object]
    arguments: list[str]
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether an earlier call finished it."""
        field, value = self.done_when
        return is_run(self.run) and Run(self.run).info.get(field) == value

    @property
    def log(self) -> Path:
        """OUTPUT/logs/base-evaluate.log."""
        return self.run.parent / "logs" / f"{self.label.replace(': ', '-')}.log"


class Lane:
    """Evaluations that go on beside the trainings in the order they were given: one at a time, two after the last one.

    What each says is kept until `settled` shows it. vital: a stage without which nothing else is worth while.
    """

    def __init__(self, vital: Stage) -> None:
        self.vital, self.broken, self.stopped, self.width = vital, False, False, 1
        self.waiting: deque[Stage] = deque()
        self.going: list[_Going] = []
        self.ended: list[_Going] = []
        self.beside: list[str] = []  # labels of those that went on beside the training
        self.noted: Path | None = None  # where they are kept meanwhile, should this process be killed
        self.usual_s = math.inf  # what the last one took

    @property
    def free_soon(self) -> bool:
        """Whether nothing waits, and what goes on is two thirds through, judged by what the last one took."""
        passed = [(time.monotonic() - one.started) / self.usual_s for one in self.going]
        return not self.waiting and all(2 / 3 < share < 2 for share in passed)

    def add(self, stage: Stage) -> None:
        """Begin it as soon as there is room."""
        print(f"[{stage.label}] goes on beside other stages; what it says follows when it is done", flush=True)
        self.waiting.append(stage)
        self.look()

    def look(self) -> bool:
        """Begin the next one where one has ended; false where the vital one has failed."""
        for one in [one for one in self.going if one.child.process.poll() is not None]:
            self._put_aside(one)
        while self.waiting and not self.stopped and len(self.going) < self.width:
            self.going.append(_Going(self.waiting.popleft()))
            self.beside.append(self.going[-1].stage.label)
            self._note()
        return not self.broken

    def tell(self, number: int) -> None:
        """Pass a signal on to those that nobody has told, and begin nothing any more."""
        self.stopped = True
        for one in self.going:
            one.tell(number)

    def rest(self, seconds: float) -> None:
        """Look after those that go on for so long; shorter where the vital one has failed."""
        until = time.monotonic() + seconds
        while self.look() and (left := until - time.monotonic()) > 0:
            time.sleep(min(WATCH_S, left))

    def finish(self) -> None:
        """Wait for all of them. Raises Interrupted as `run_stage` does."""
        self.width = 2
        while self.look() and self.going:
            first = self.going[0]
            attend(first.attended, self)
            self._put_aside(first)
        self.width = 1

    def settled(self) -> Iterator[tuple[Stage, str | None]]:
        """Show what those said that have ended, and give why each failed, None where it is done."""
        ended, self.ended = self.ended, []
        for one in ended:
            yield one.stage, one.say()

    @contextlib.contextmanager
    def beside_of(self, training: Stage) -> Iterator[None]:
        """Keep with its run the labels of those that go on meanwhile, of every attempt: all are in its seconds.

        An attempt whose command was killed left them in a file of their own, as the training writes run.json itself.
        """
        self.noted = training.run.with_name(f".{training.run.name}.beside.json")
        killed = read_json(self.noted) if self.noted.exists() and is_run(training.run) else []
        self.beside = [*killed, *(one.stage.label for one in self.going)]
        self._note()
        try:
            yield
        finally:
            if self.beside and is_run(training.run):
                run = Run(training.run)
                run.update(beside=[*run.info.get("beside", []), *self.beside])
            self.noted.unlink(missing_ok=True)
            self.noted = None

    def _note(self) -> None:
        if self.noted and self.beside:
            write_json(self.noted, self.beside)

    def close(self) -> None:
        """End those that go on, and show what all said."""
        self.tell(signal.SIGTERM)
        for one in list(self.going):
            self._put_aside(one)
        for _ in self.settled():
            pass

    def _put_aside(self, one: "_Going") -> None:
        if one not in self.going:  # `look` was first
            return
        one.child.end(PATIENCE_S)
        one.seconds = self.usual_s = time.monotonic() - one.started
        self.broken |= one.stage is self.vital and one.child.process.poll() != 0
        self.stopped |= self.broken
        self.going.remove(one)
        self.ended.append(one)


class _Going:
    """A stage that goes on, and the folder of what it says."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.started, self.seconds, self.told = stage, time.monotonic(), 0.0, False
        self.folder = tempfile.TemporaryDirectory()
        with self.output.open("wb") as output:
            self.child = Child(_command(stage), _environ(stage, Path(self.folder.name)) | _half(), output)
        with contextlib.suppress(psutil.Error):  # as Ray's workers have, so that neither starves the other
            psutil.Process(self.child.process.pid).nice(NICENESS)

    def attended(self) -> Child:
        """Its process, for `attend`, which passes signals on to it from now on."""
        self.told = True
        return self.child

    def tell(self, number: int) -> None:
        """Pass a signal on, if it is the first."""
        if not self.told:
            self.child.process.send_signal(number)
        self.told = True

    @property
    def output(self) -> Path:
        """What it says."""
        return Path(self.folder.name) / "output"

    def say(self) -> str | None:
        """Show what it said, and give why it failed."""
        said = self.output.read_text(encoding="utf-8", errors="replace")
        print(f"[{self.stage.label}]\n{said}", end="", flush=True)
        return _outcome(self.stage, self.child.process.wait(), self.seconds, Path(self.folder.name))


def run(stage: Stage, restarts: int, lane: Lane | None = None) -> str | None:
    """Why the stage failed; None when it is done. lane: of evaluations that go on beside it."""
    if stage.done:
        print(f"[{stage.label}] done already", flush=True)
        return None
    print(f"[{stage.label}]", flush=True)
    started = time.monotonic()
    kept = lane.beside_of(stage) if lane else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder:
        environ = _environ(stage, Path(folder)) | (_asleep() if lane and (lane.going or lane.waiting) else {})

        def attempt() -> int:
            return run_stage(_command(stage), environ, lane)

        with kept:
            rest = lane.rest if lane else None
            code = supervised(attempt, stage.run, restarts, rest) if stage.arguments[0] == "train" else attempt()
        return _outcome(stage, code, time.monotonic() - started, Path(folder))


def fits_beside(config: Config) -> bool:
    """Whether the training of this arm is short, and leaves room for an evaluation, which holds less of the model."""
    if config.device != "cpu" or config.evaluate.backend != "hf" or config.compare.match == "device_seconds":
        return False
    from eaft_verl.planning.arm_plan import plan_arm

    free = min(psutil.virtual_memory().available / GIB, memory_here())
    with contextlib.suppress(ConfigError, DataError, RunError):  # what cannot be planned has the machine to itself
        plan = plan_arm(config, machine_of(config, None, None))
        short = plan.training_s is not None and plan.training_s <= LONG_S
        return short and cpus_here() > 1 and 2 * plan.needed / GIB <= free
    return False


def _asleep() -> dict[str, str]:
    """For a stage that has another beside it: threads that wait awake take a core from it. A user's choice stays."""
    return {"GOMP_SPINCOUNT": "0"} if os.environ.get("GOMP_SPINCOUNT") == AWAKE else {}


def _half() -> dict[str, str]:
    """For an evaluation that goes on beside other stages: half of the cores, and threads that sleep while they wait."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpus_here() // 2)))} | _asleep()


def _command(stage: Stage) -> list[str]:
    return python_command("eaft_verl.cli", *stage.arguments)


def _environ(stage: Stage, folder: Path) -> dict[str, str]:
    """Where the stage leaves the error that it ends with, and what it prints where somebody looks at a terminal."""
    environ = {name: os.environ.get(name, value) for name, value in stage.environ.items()}
    environ[CAUSE_FILE] = str(folder / "cause")
    if sys.stdout.isatty():  # what is left there: a line at either end, how many rows are used, and the bar
        stage.log.parent.mkdir(parents=True, exist_ok=True)
        environ[LOG_FILE] = str(stage.log)
    return environ


def _outcome(stage: Stage, code: int, seconds: float, folder: Path) -> str | None:
    """Say how the stage ended; why it failed, None when it is done."""
    how = "done" if code == 0 else f"failed with exit code {code}"
    print(f"[{stage.label}] {how}, {seconds:.0f} s", flush=True)
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
