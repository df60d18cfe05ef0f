"""A training that stands still is ended: the stacks of all its processes are kept, and nothing is left running."""

import faulthandler
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eaft_verl.errors import HUNG, Hung
from eaft_verl.training.stacks import STACKS, Process, processes, send

LIMIT = "EAFT_HANG_SECONDS"  # variable: seconds without progress that are always allowed
LEAST_S = 1800.0
TIMES = 10  # the median step, where that is longer
RECENT = 101  # steps whose median counts
ANSWER_S = 5.0  # for the stacks of a process; Python is not needed for them
REMOTE_S = 30.0  # for a task on another node
LEAVE_S = 30.0  # for the main thread, whose call ends with the workers


class Watchdog:
    """Within the block `beat` must come at least every max(10 x median step, 30 min); else the workers are killed and
    the block ends with Hung.

    In the run's folder `stacks` it leaves those of the processes that were started with `variables` and registered.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "stacks"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.variables = {STACKS: str(self.folder)}
        self.least = float(os.environ.get(LIMIT, LEAST_S))
        self.steps: list[float] = []
        self.last, self.done = time.monotonic(), 0
        self.verdict = ""
        self.leave = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, seconds: float | None = None) -> None:
        """Something has been finished; `seconds`: it was a training step and took so long."""
        self.last = time.monotonic()
        if seconds is not None:
            self.done += 1
            self.steps = [*self.steps[1 - RECENT :], seconds]

    @property
    def limit(self) -> float:
        """Seconds without a beat that are allowed now."""
        return max(self.least, TIMES * statistics.median(self.steps)) if self.steps else self.least

    def __enter__(self) -> "Watchdog":
        self.beat()
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leave.set()
        if self.verdict:
            raise Hung(self.verdict) from None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _watch(self) -> None:
        pause, seen = min(1.0, self.least / 10), time.monotonic()
        while not self.leave.wait(pause):
            now = time.monotonic()
            # a job suspended for an hour (`scontrol suspend`, SIGSTOP) has not been hanging: we stood still too
            self.last, seen = min(now, self.last + now - seen - pause), now
            if now - self.last > self.limit:
                self._end()
                return

    def _end(self) -> None:
        """Keep all stacks, kill the workers, which ends what the main thread waits for, and see that it leaves."""
        waited = time.monotonic() - self.last
        with (self.folder / "driver.txt").open("w", encoding="utf-8") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        asked = processes(self.folder)
        signal_all(asked, signal.SIGUSR1)
        end = time.monotonic() + ANSWER_S
        while not all(one.answered for one in asked) and time.monotonic() < end:
            time.sleep(0.1)
        silent = [f"{one.title} (pid {one.pid} on {one.host})" for one in asked if not one.answered]
        self.verdict = (
            f"no progress for {waited:.0f} s after {self.done} step(s) of this attempt (allowed: {self.limit:.0f} s, "
            f"see {LIMIT}); the stacks of {len(asked)} worker process(es) are in {self.folder}"
            + (f"; without an answer, so stopped or stuck in the kernel: {', '.join(silent)}" if silent else "")
            + "; run the same command again"
        )
        signal_all(asked, signal.SIGKILL)
        if not self.leave.wait(LEAVE_S):
            print(f"eaft: error: {self.verdict}", file=sys.stderr, flush=True)
            os._exit(HUNG)


def signal_all(chosen: list[Process], number: int) -> None:
    """Send a signal to these processes, on other nodes by a task there."""
    send(number, [one.pid for one in chosen if one.here])
    elsewhere: dict[str, list[int]] = defaultdict(list)
    for one in chosen:
        if not one.here:
            elsewhere[one.host].append(one.pid)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(send)
    tasks = []
    for node in ray.nodes() if elsewhere else []:
        if node["Alive"] and (pids := elsewhere.get(node["NodeManagerHostname"])):
            spot = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            tasks.append(task.options(scheduling_strategy=spot).remote(number, pids))
    if tasks:
        ray.wait(tasks, num_returns=len(tasks), timeout=REMOTE_S)
