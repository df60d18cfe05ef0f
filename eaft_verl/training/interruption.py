"""SIGTERM, Ctrl-C and a closed terminal as a request: the trainer finishes its step, saves, and only then ends."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from eaft_verl.errors import CTRL_C, ENDED, SAVED, Interrupted

FAMILY = "EAFT_FAMILY"  # variable that a stage and all that it starts inherit, by which they are found
ECHO_S = 0.5  # a second signal within this time is the same one: a launcher may send it to a shell and to its children


def is_stage() -> bool:
    """Whether this process was started by `experiment.processes.run_stage`, which counts the signals."""
    return FAMILY in os.environ


def stop_signals() -> list[signal.Signals]:
    """Those that ask a command to end. SIGHUP, of a terminal that was closed, not where `nohup` has it ignored."""
    told = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *[signal.SIGHUP] * told]


class StopRequest:
    """Whether somebody asked this process to end, and by which signal."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.at = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. In a stage, asked twice is asked once: whoever means it twice is heard by
        `experiment.processes`, which ends the stage with all that it started. Elsewhere the second one interrupts."""
        if self.number is None:
            self.number, self.at = number, time.monotonic()
        elif not is_stage() and time.monotonic() - self.at > ECHO_S:
            raise KeyboardInterrupt

    @property
    def requested(self) -> bool:
        """Whether it was asked."""
        return self.number is not None

    def outcome(self, saved: str | None, where: str) -> Interrupted:
        """What a stopped run ends with. saved: what can be gone on from, None where nothing can."""
        ctrl_c = self.number == signal.SIGINT
        name = "Ctrl-C" if ctrl_c else signal.Signals(self.number or signal.SIGTERM).name
        if saved:
            text = f"{name}: {where} is saved at {saved}; run the same command again"
            return Interrupted(text, CTRL_C if ctrl_c else SAVED)
        text = f"{name}: {where} was stopped before its first step was saved; the same command starts it again"
        return Interrupted(text, CTRL_C if ctrl_c else ENDED)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """A StopRequest that `stop_signals` set while the block runs; enter it after `ray.init`, which installs a
    handler of its own.

    Raises ValueError outside the main thread, where no handler can be installed.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in stop_signals()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
