"""Every process of a training can write the stacks of its threads, even while it waits in C or for a lock.

Each leaves a file HOST--PID.txt in the folder that the variable STACKS names: the list of whom to ask.
"""

import contextlib
import faulthandler
import os
import signal
import socket
from pathlib import Path
from typing import NamedTuple, TextIO

import psutil

STACKS = "EAFT_STACKS"
_OPEN: list[TextIO] = []  # faulthandler needs the file for as long as the process lives


class Process(NamedTuple):
    """One process of a training."""

    file: Path
    host: str
    pid: int

    @property
    def here(self) -> bool:
        """Whether it runs on this machine."""
        return self.host == socket.gethostname()

    @property
    def answered(self) -> bool:
        """Whether its stacks are written."""
        return self.file.stat().st_size > 0

    @property
    def title(self) -> str:
        """What it does, as Ray names it: 'ray::EaftWorker.train_batch'."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid).cmdline()[0] if self.here else "worker"
        return "worker that is gone"


def write_stacks_when_asked() -> None:
    """Have this process write its stacks on SIGUSR1, where the training said in which folder."""
    folder = os.environ.get(STACKS)
    if folder and not _OPEN:
        file = Path(folder) / f"{socket.gethostname()}--{os.getpid()}.txt"
        _OPEN.append(file.open("w", encoding="utf-8"))
        faulthandler.register(signal.SIGUSR1, file=_OPEN[0], all_threads=True)


def processes(folder: Path) -> list[Process]:
    """All others that have been registered in the folder."""
    found = []
    for file in sorted(folder.glob("*--*.txt")):
        host, _, pid = file.stem.rpartition("--")
        found.append(Process(file, host, int(pid)))
    return [one for one in found if not (one.here and one.pid == os.getpid())]


def send(number: int, pids: list[int]) -> None:
    """Send a signal to processes of this machine; those that are gone, or are somebody else's by now, are left out."""
    for pid in pids:
        with contextlib.suppress(psutil.Error, OSError):
            if psutil.Process(pid).environ().get("RAY_RAYLET_PID"):
                os.kill(pid, number)
