"""The process in which a grader runs: one JSON request, one JSON reply, over a pipe that `process` hands it.

Started as `python -m eaft_verl.grading.worker PIPE GRADER SECONDS`. It may be killed at any time. It imports the
standard library and the grader, nothing else, so that it is there in a tenth of a second.
"""

import json
import math
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from eaft_verl.errors import ConfigError
from eaft_verl.grading.graders import Grader, build_grader, checked_score, ends_in_format

_MEMORY = 4 << 30  # bytes of data: sympy on a hostile expression must not take the machine with it
_GRACE = 5  # seconds after which a hung grader dies by itself, should the parent be gone


def main(pipe: int, name: str, seconds: float) -> None:
    """Serve requests until the other end is closed."""
    channel = Connection(pipe)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard), hard))
    try:
        grader = build_grader(name)
        grader.fault("\\pi")  # the first call of math-verify takes seconds
        channel.send_bytes(b'{"ready": true}')
    except ConfigError as error:
        channel.send_bytes(json.dumps({"refused": str(error)}).encode())
        return
    while True:
        try:
            request = json.loads(channel.recv_bytes())
        except EOFError:
            return
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(seconds) + _GRACE)
        reply = _reply(grader, request)
        signal.alarm(0)
        channel.send_bytes(json.dumps(reply).encode())


def _reply(grader: Grader, request: dict[str, str]) -> dict[str, Any]:
    try:
        if "response" not in request:
            return {"fault": grader.fault(request["answer"])}
        score = checked_score(grader.score(request["response"], request["answer"]))
        return {"score": score, "format": ends_in_format(request["response"])}
    except Exception as error:  # a grader may raise anything: the parent counts it
        return {"error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
