"""A training that is looked after from outside: spoken for when it dies without a word, begun again after a loss."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from eaft_verl.cluster.demand import WAIT
from eaft_verl.cluster.ray_logs import details_kept
from eaft_verl.errors import EXIT_CODES, HUNG, LOST, Interrupted, RunError
from eaft_verl.runs import Run
from eaft_verl.training import states

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0  # before a restart; doubled every time
NODES_S = 900  # that a restarted training waits for nodes to come back
WORTH_ANOTHER = (LOST, HUNG)
MOST_FRUITLESS = 2  # failures in a row without a new saved state: the next one would be the same


def supervised(
    attempt: Callable[[], int], folder: Path, restarts: int, rest: Callable[[float], None] | None = None
) -> int:
    """Exit code of the last attempt; after the loss of a worker or node it is made again, at most `restarts` times.

    folder: of the run. rest: what to do for so many seconds before a restart, not only sleep. Raises Interrupted as
    `run_stage` does.
    """
    made, fruitless = 0, 0
    while True:
        before = saved_step(folder)
        try:
            code = attempt()
        except Interrupted as error:
            _note(folder, "interrupted", f"Interrupted: {error}")
            raise
        code = _spoken_for(folder, code)
        fruitless = 0 if saved_step(folder) > before else fruitless + 1
        if code not in WORTH_ANOTHER or made == restarts:
            return code
        if fruitless == MOST_FRUITLESS:
            print(f"eaft: no restart: {fruitless} failures in a row brought no new saved state", file=sys.stderr)
            return code
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**made)
        made += 1
        _restart(folder, f"restart {made} of {restarts} in {pause:.0f} s", saved_step(folder), code)
        (rest or time.sleep)(pause)
        os.environ[WAIT] = str(NODES_S)


def saved_step(folder: Path) -> int:
    """Step of the newest state that a run of any trainer can be gone on from; 0 where there is none."""
    return max(states.whole(folder), default=0)


def _restart(folder: Path, what: str, step: int, code: int) -> None:
    """Say it, and keep it in run.json."""
    print(f"eaft: {what}: exit code {code}; goes on from step {step}", file=sys.stderr, flush=True)
    if (folder / "run.json").exists():
        run = Run(folder)
        row = {"time": time.time(), "from_step": step, "code": code, "error": run.info.get("error")}
        run.update(restarts=[*run.info.get("restarts", []), row])


def _spoken_for(folder: Path, code: int) -> int:
    """The code of an attempt; LOST, with the words that it could not say, where it ended below Python."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    cause = f"the training process ended without a word ({how}): Ray's raylet has died, or the system killed it"
    mute = code < 0 or code == 1
    told = f"Lost: {cause}" if mute else f"exit code {code}: {EXIT_CODES.get(code)}"
    noted = bool(code) and _note(folder, "failed", told)
    if not ((noted and mute) or code < 0):
        return code
    where = details_kept(Run(folder), cause) if noted else ""
    print(f"eaft: error: {cause}{where}; run the same command again", file=sys.stderr)
    return LOST


def _note(folder: Path, status: str, error: str) -> bool:
    """Whether run.json still said that the training runs; then it says this instead."""
    with contextlib.suppress(RunError, OSError):
        run = Run(folder)
        with run.locked():
            if run.info["status"] == "running":
                run.update(status=status, error=error)
                return True
    return False
