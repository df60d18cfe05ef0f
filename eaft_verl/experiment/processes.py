"""Stages as child processes that may finish their work when the whole job is told to stop."""

import signal
import subprocess
from collections.abc import Sequence
from types import FrameType

from eaft_verl.errors import Interrupted

CAUSE_FILE = "EAFT_CAUSE_FILE"  # variable: where a stage leaves the error it ends with, for the report of a comparison
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command, run again, goes on


def run_stage(command: Sequence[str]) -> int:
    """Exit code of the command. SIGTERM is passed on and the child waited for, because it may still be saving.

    Raises Interrupted when this process was told to stop, or the child says that it was.
    """
    stopped = False
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if child is not None:
            child.terminate()

    before = signal.signal(signal.SIGTERM, forward)
    try:
        child = subprocess.Popen(command)
        if stopped:  # told while the child was being started
            child.terminate()
        code = child.wait()
    except BaseException:
        if child is not None:
            child.terminate()
            child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped or code == INTERRUPTED:
        raise Interrupted(f"SIGTERM ended `{' '.join(command[3:])}`; run the same command again to go on")
    return code
