"""What a row is, and the laboratory it breaks things in: a tiny model, a recipe, the real command line."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import warm

RECIPE = """
model: {model}
output: {folder}/out
data: {{train: {folder}/train.jsonl, heldout: {folder}/heldout.jsonl, max_length: 256}}
evaluate: {{drift: {{data: generate:neutral_prompts, rows: 4, new_tokens: 8}}}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  optim: {{lr: 1.0e-3}}
  data: {{train_batch_size: 4, max_token_len_per_gpu: 256}}
  trainer: {{total_epochs: 5, save_freq: 4}}
arms:
  eaft: {{objective: {{name: eaft}}}}
"""
STEPS, ROWS = 20, 16  # 4 steps an epoch
ARM = "eaft"


@dataclass(frozen=True)
class Seen:
    """How a command ended and what it printed (both streams)."""

    code: int
    said: str

    @property
    def last_line(self) -> str:
        """The line a user reads last."""
        return self.said.strip().splitlines()[-1] if self.said.strip() else ""

    def refused(self, *words: str) -> str:
        """The error line of a command that exits 2 without a traceback, before Ray, and says all these words in it."""
        assert self.code == 2 and "Traceback" not in self.said and "local Ray" not in self.said, self.said
        error = self.said[self.said.index("eaft: error: ") :].strip()
        assert not [word for word in words if word not in error], error
        return error.splitlines()[0]


@dataclass(frozen=True)
class Outcome:
    """What a row saw, in a few words, and how many steps of training the fault cost (None: not about steps)."""

    seen: str
    lost: int | None = None


@dataclass(frozen=True)
class Fault:
    """One row: `drive` breaks something in the laboratory, asserts, and says what was seen."""

    name: str
    expected: str
    drive: "Callable[[Lab], Outcome]"
    slow: bool


FAULTS: list[Fault] = []


def fault(
    name: str, expected: str, *, slow: bool = False
) -> "Callable[[Callable[[Lab], Outcome]], Callable[[Lab], Outcome]]":
    """Register a row. Rows that train (start Ray, about 15 s) are slow unless CI cannot do without them."""

    def register(drive: "Callable[[Lab], Outcome]") -> "Callable[[Lab], Outcome]":
        FAULTS.append(Fault(name, expected, drive, slow))
        return drive

    return register


def read_rows(run: Path) -> list[dict[str, float]]:
    """Training rows of metrics.jsonl; a torn last line is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["split"] == "train"]


class Lab:
    """One folder with data, a recipe and `out`; the same path for every row, so that snapshots fit in again.

    fork: whether `eaft` forks from a process that has the imports already; otherwise every command is a fresh start.
    """

    fork = True

    def __init__(self, folder: Path, model: Path, snapshots: Path) -> None:
        self.folder, self.model, self.snapshots = folder, model, snapshots
        self.out = folder / "out"
        self.run = self.out / f"{ARM}-seed0"
        self.recipe = folder / "recipe.yaml"
        self.write_recipe()

    def write_recipe(self, text: str = RECIPE) -> Path:
        """The recipe, filled in; RECIPE where none is given."""
        self.recipe.write_text(text.format(model=self.model, folder=self.folder), encoding="utf-8")
        return self.recipe

    def command(self, *words: str | Path) -> list[str]:
        """`eaft WORDS`."""
        return [sys.executable, "-P", "-m", "eaft_verl.cli", *map(str, words)]

    def environ(self, **env: str) -> dict[str, str]:
        """Variables of a command."""
        return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **env}

    def eaft(self, *words: str | Path, timeout: float = 600.0, **env: str) -> Seen:
        """Run a command to its end; again, as it says, where a busy machine has not let Ray start within its 30 s."""
        if self.fork and not env:
            told = self.folder / "said.txt"
            code = warm.eaft(words, self.folder, told, timeout=timeout)
            printed = told.read_text(encoding="utf-8", errors="replace")
            told.unlink()
        else:
            with self.started(*words, **env) as process:
                code = process.wait(timeout=timeout)
            printed = self.said(process)
        if "error: Ray did not start" in printed:
            again = self.eaft(*words, timeout=timeout, **env)
            return Seen(again.code, printed + again.said)
        return Seen(code, printed)

    def said(self, process: subprocess.Popen[str]) -> str:
        """What a command has printed so far."""
        return (self.folder / f"said-{process.pid}.txt").read_text(encoding="utf-8", errors="replace")

    def train(self, *overrides: str, timeout: float = 600.0, **env: str) -> Seen:
        """`eaft train` of the recipe's arm."""
        return self.eaft("train", self.recipe, "--arm", ARM, *overrides, timeout=timeout, **env)

    @contextlib.contextmanager
    def started(self, *words: str | Path, **env: str) -> Iterator[subprocess.Popen[str]]:
        """A command in a session of its own, whatever is left of it killed in the end."""
        said = self.folder / "said.txt"  # a file: a pipe stays open as long as any process of Ray's lives
        with said.open("w") as stream:
            process = subprocess.Popen(
                self.command(*words),
                cwd=self.folder,
                env=self.environ(**env),
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        said.rename(self.folder / f"said-{process.pid}.txt")
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def interrupt(self) -> None:
        """Make `out` that of an arm killed with all its processes after step 10; it saved at steps 4 and 8."""
        kept = self.snapshots / "interrupted"
        if not kept.exists():
            for _ in range(5):
                shutil.rmtree(self.out, ignore_errors=True)
                with self.started("train", self.recipe, "--arm", ARM) as process:
                    self.wait_for_step(process, 10)
                    os.killpg(process.pid, signal.SIGKILL)
                if self.saved() == [4, 8]:  # else a busy machine has killed it too late
                    break
            shutil.copytree(self.out, kept)
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(kept, self.out)

    def whole(self) -> list[dict[str, float]]:
        """Training rows of an uninterrupted run: a resumed one must equal them bit for bit (times aside)."""
        kept = self.snapshots / "whole"
        if not kept.exists():
            aside = self.out.rename(self.folder / "aside") if self.out.exists() else None
            seen = self.train()
            assert seen.code == 0, seen.said
            shutil.copytree(self.out, kept)
            shutil.rmtree(self.out)
            if aside:
                aside.rename(self.out)
        return read_rows(kept / self.run.name)

    def saved(self) -> list[int]:
        """Steps of the arm that can be gone on from."""
        return sorted(int(file.parent.name.rpartition("_")[2]) for file in self.run.glob("resume/step_*/manifest.json"))

    def rows(self) -> list[dict[str, float]]:
        """Training rows of the arm so far."""
        return read_rows(self.run)

    def assert_exact(self) -> None:
        """The arm is finished and every row equals the uninterrupted run's."""
        names = ("step", "loss", "nll", "grad_norm", "lr", "tokens", "samples")
        mine, theirs = ([[row[name] for name in names] for row in rows] for rows in (self.rows(), self.whole()))
        assert mine == theirs and len(mine) == STEPS, "not the uninterrupted run"

    def wait_for_step(self, process: subprocess.Popen[str], step: int, timeout: float = 600.0) -> None:
        """Return as soon as this many steps are logged; the command must still run then."""
        end = time.monotonic() + timeout
        while process.poll() is None and len(self.rows()) < step:
            assert time.monotonic() < end, f"step {step} was not reached in {timeout} s"
            time.sleep(0.01)
        assert process.poll() is None, f"ended with {process.returncode} before step {step}: {self.said(process)}"
