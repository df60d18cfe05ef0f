"""A grader in a process of its own that is kept between answers, and killed and replaced when one takes too long.

Not pebble's ProcessPool: spawned, it wants a __main__ guard in the user's script; forked, it copies torch and locks.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

from eaft_verl.boundary import python_command
from eaft_verl.errors import ConfigError, RunError
from eaft_verl.grading.graders import MAX_ANSWER

_START_SECONDS = 120.0  # a grader of one's own may import much


@dataclass(frozen=True)
class Grade:
    """What became of one answer. outcome: 'graded', 'timeout' (hung or crashed; score 0) or 'error' (raised; score 0).

    score: 0..1. formatted: the response ends in the taught format. error: what was raised.
    """

    score: float
    outcome: str = "graded"
    formatted: bool = False
    error: str = ""


class GradingProcess:
    """One child process with one grader. Thread-safe: calls wait for each other, their waiting is not timed."""

    def __init__(self, grader: str, seconds: float = 10.0) -> None:
        """Start nothing yet. seconds: wall time that one answer may take."""
        self.grader, self.seconds = grader, seconds
        self._lock = threading.Lock()
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def grade(self, response: str, answer: str) -> Grade:
        """The grade of a response. Raises ConfigError if the grader cannot be built, RunError if it does not start."""
        reply = self._ask({"response": response, "answer": answer[:MAX_ANSWER]})
        if reply is None:
            return Grade(0.0, "timeout")
        if "error" in reply:
            return Grade(0.0, "error", error=reply["error"])
        return Grade(reply["score"], formatted=reply["format"])

    def answer_fault(self, answer: str) -> str:
        """Why the grader cannot grade against this reference answer; '' if it can."""
        if len(answer) > MAX_ANSWER:
            return f"it has {len(answer)} characters, at most {MAX_ANSWER} are allowed"
        reply = self._ask({"answer": answer})
        if reply is None:
            return f"the grader does not finish reading it within {self.seconds} s"
        return reply["fault"] if "fault" in reply else reply["error"]

    def close(self) -> None:
        """End the child; the next call starts a new one."""
        with self._lock:
            self._kill()

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        return self._child[0].pid if self._child else None

    def _ask(self, request: dict[str, str]) -> dict[str, Any] | None:
        """The child's reply; None, and no child any more, if it hung or died over the request."""
        message = json.dumps(request).encode()
        with self._lock:
            # A child that died while idle is found when it is written to: only then is a second one asked.
            for _ in range(2):
                channel = self._child[1] if self._child else self._start()
                try:
                    channel.send_bytes(message)
                    break
                except OSError:
                    self._kill()
            else:
                raise RunError(f"the process of grader {self.grader!r} ends as soon as it has started")
            reply = _reply(channel, self.seconds)
            if reply is None:
                self._kill()
            return reply

    def _start(self) -> Connection:
        # The child must find what this process finds: Ray workers have paths of their driver that no variable holds.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        ours, theirs = Pipe()
        child = subprocess.Popen(
            python_command("eaft_verl.grading.worker", str(theirs.fileno()), self.grader, str(self.seconds)),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a grader prints is a message, and no reply
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # so that what a grader starts ends with it
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self._child = child, ours
        reply = _reply(ours, _START_SECONDS)
        if reply is None or "refused" in reply:
            self._kill()
            if reply:
                raise ConfigError(reply["refused"])
            raise RunError(
                f"the process of grader {self.grader!r} did not start within {_START_SECONDS:.0f} s, or ended at once; "
                "its messages are above"
            )
        return ours

    def _kill(self) -> None:
        if self._child:
            child, channel = self._child
            self._child = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            channel.close()


def _reply(channel: Connection, seconds: float) -> dict[str, Any] | None:
    """One message of the child, or None if it does not come in time or at all."""
    try:
        return json.loads(channel.recv_bytes()) if channel.poll(seconds) else None
    except (EOFError, OSError):
        return None
