"""Stages as child processes, which may finish their work when the whole job is told to stop and leave nothing behind.

Only the first process of a command counts signals: the first one is passed on to its stage, which saves; a second one
of either kind ends the stage at once, with everything that it started.
"""

import argparse
import contextlib
import math
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import IO, Any, Protocol

import psutil

from eaft_verl.boundary import die_with_parent
from eaft_verl.errors import CTRL_C, ENDED, EXIT_CODES, SAVED, Interrupted
from eaft_verl.training.interruption import ECHO_S, FAMILY, is_stage, stop_signals

CAUSE_FILE = "EAFT_CAUSE_FILE"  # variable: where a stage leaves the error it ends with, for the report of a comparison
LOG_FILE = "EAFT_STAGE_LOG"  # variable: where a stage's standard output goes, where somebody looks at a terminal
WATCH_S = 0.2  # between two looks at a stage that another one goes on beside
PATIENCE_S = 5.0  # for processes of Ray that are still ending when the stage has
STOPPED = (SAVED, CTRL_C, ENDED)


def begin_stage() -> None:
    """In a stage: hear Ctrl-C, which a shell has its background jobs ignore, and die with the parent; see LOG_FILE."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if path := os.environ.pop(LOG_FILE, None):
        with open(path, "ab") as log:
            os.dup2(log.fileno(), 1)
    die_with_parent()


class Ending:
    """While the block runs, SIGTERM and SIGHUP end it as Ctrl-C does: what is half made is taken away on the way out.

    Not in a stage, whose parent says how it ended. A second one does not wait for that.
    name, code: of the signal that came; of Ctrl-C where none did.
    """

    def __init__(self) -> None:
        self.name, self.code, self.at = "Ctrl-C", CTRL_C, 0.0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Ending":
        if threading.current_thread() is threading.main_thread() and not is_stage():  # no other thread can
            asked = [one for one in stop_signals() if one != signal.SIGINT]
            self.before = {one: signal.signal(one, self) for one in asked}
        return self

    def __exit__(self, *raised: object) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler: hand it to that of Ctrl-C, which asyncio and others put their own in the place of."""
        if self.code == ENDED:
            if number != signal.SIGHUP and time.monotonic() - self.at > ECHO_S:
                self._at_once()
            return
        self.name, self.code, self.at = signal.Signals(number).name, ENDED, time.monotonic()
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # ignored, as in the background jobs of a script
            raise KeyboardInterrupt
        interrupt(number, frame)

    def _at_once(self) -> None:
        with contextlib.suppress(OSError):  # nobody may be there to read it
            os.write(2, b"eaft: told to stop twice: ended at once; what was finished before is kept\n")
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        os._exit(ENDED)


class Child:
    """A stage that runs: a process of a session and a family of its own, by which all that it starts is found.

    environ: variables of its own. output: where both its streams go, ours where None.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str] | None = None, output: IO[bytes] | None = None
    ) -> None:
        self.words, self.token = " ".join(command).rpartition("eaft_verl.cli ")[2], secrets.token_hex(8)
        # a session of its own: what a terminal sends to its group on Ctrl-C comes here only, and is passed on once
        variables = {**os.environ, **(environ or {}), FAMILY: self.token}
        self.process = subprocess.Popen(command, env=variables, start_new_session=True, stdout=output, stderr=output)

    def end(self, patience: float) -> None:
        """Give it `patience` seconds to end by itself, then kill it with everything that it started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        _end_family(self.token, patience)


class Companion(Protocol):
    """What goes on beside a stage."""

    def look(self) -> bool:
        """Carry it on; false where the stage should end."""
        ...

    def tell(self, number: int) -> None:
        """Pass a signal on, and begin nothing any more."""
        ...


def run_stage(command: Sequence[str], environ: Mapping[str, str] | None = None, beside: Companion | None = None) -> int:
    """Exit code of the command, negative where a signal ended it; nothing that it started is left running.

    beside: looked after meanwhile, and told of every signal. Raises Interrupted when this process was told to stop, or
    the child says that it was.
    """
    return attend(lambda: Child(command, environ), beside)


def attend(start: Callable[[], Child], beside: Companion | None = None) -> int:
    """The same of a stage that `start` gives, called when signals are already heard."""
    told, patience, go_on = _Told(beside), 0.0, True
    before = {one: signal.signal(one, told) for one in stop_signals()}
    child: Child | None = None
    try:
        told.child = child = start()
        told.pass_on()
        while (code := child.process.poll()) is None:
            if beside and go_on and not (go_on := beside.look()):
                child.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(WATCH_S if beside else None)
        patience = PATIENCE_S
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        if child:
            child.end(patience)
    if told.number is None and (code not in STOPPED or not go_on):
        return code
    text = f"told to stop: `{child.words}` was ended; run the same command again"
    raise Interrupted(text, _final(code, told.number), said=_is_ours(code))


def _is_ours(code: int) -> bool:
    return code in EXIT_CODES and code > 1


def _final(code: int, number: int | None) -> int:
    """What a stopped stage means for the whole command: its own code, where that is one of ours."""
    if _is_ours(code):
        return code
    asked = CTRL_C if number == signal.SIGINT else ENDED
    return SAVED if code == 0 and asked == ENDED else asked  # it was done all the same, and a done stage is kept


def whole_number(text: str) -> int:
    """The value of an option that counts something; ArgumentTypeError below 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0")
    return int(text)


def amount(text: str) -> float:
    """The value of an option that measures something; ArgumentTypeError below 0, and for what is no finite number."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0")


def temperature(text: str) -> float:
    """The value of an option by which tokens are drawn: beyond these bounds logits overflow, or no longer count."""
    with contextlib.suppress(ValueError):
        if (value := float(text)) == 0 or 0.01 <= value <= 100:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} must be 0 (greedy), or a number from 0.01 to 100")


class _Told:
    """The signals that came: a handler that passes the first one on to `child`, and to what is `beside` it, and raises
    Interrupted at the next."""

    def __init__(self, beside: Companion | None) -> None:
        self.number: int | None = None
        self.at = 0.0
        self.child: Child | None = None
        self.beside = beside

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self.at = number, time.monotonic()
            if self.child:
                self.pass_on()
        elif number != signal.SIGHUP and time.monotonic() - self.at > ECHO_S and not is_stage():
            text = "told to stop twice: ended at once; the same command goes on from what was saved before"
            raise Interrupted(text, CTRL_C if number == signal.SIGINT else ENDED)

    def pass_on(self) -> None:
        """Send the child what came, if anything did; SIGHUP of a closed terminal as SIGTERM, on which a stage saves."""
        if self.number is not None and self.child:
            number = signal.SIGTERM if self.number == signal.SIGHUP else self.number
            self.child.process.send_signal(number)
            if self.beside:
                self.beside.tell(number)


def _end_family(token: str, patience: float) -> None:
    """Kill every process of the family that has not ended by itself within `patience` seconds."""
    end = time.monotonic() + patience
    while left := _family(token):
        if time.monotonic() >= end:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        time.sleep(0.05)


def _family(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(FAMILY) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
