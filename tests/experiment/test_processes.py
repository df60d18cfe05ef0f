"""Signals on their way to a stage, what is left of it, and when a training is begun again. Real processes, no Ray."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eaft_verl.cli import main
from eaft_verl.errors import EXIT_CODES
from eaft_verl.experiment import supervision
from eaft_verl.experiment.supervision import supervised
from eaft_verl.launch.request import Launch
from eaft_verl.runs import Run
from eaft_verl.training.states import MANIFEST

# a stage that says what reached it, and ends one second after the first signal with the code it was given
STAGE = """
import signal, subprocess, sys, time
seen = []
for one in (signal.SIGTERM, signal.SIGINT):
    signal.signal(one, lambda number, frame: seen.append(number))
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", sys.argv[1]], start_new_session=True)
open(sys.argv[1] + "/ready", "w").close()
while not seen: time.sleep(0.01)
open(sys.argv[1] + "/told", "w").close()
time.sleep(float(sys.argv[3]))
open(sys.argv[1] + "/seen", "w").write(" ".join(map(str, map(int, seen))))
sys.exit(int(sys.argv[2]))
"""
PARENT = """
import sys
from eaft_verl.errors import Interrupted
from eaft_verl.experiment import processes
processes.PATIENCE_S, processes.ECHO_S = 0.5, float(sys.argv.pop())
try:
    code = processes.run_stage([sys.executable, "-c", STAGE, *sys.argv[1:]])
except Interrupted as told:
    print(told)
    code = told.code
sys.exit(code)
""".replace("STAGE", repr(STAGE))


# what ends a command that does not end as it should; the commands would go on for twice as long
LATE_S = 30.0
# seconds within which a second signal is the same one: far more than a busy machine takes to send it, and next to none
ECHO, NO_ECHO = "60", "0.01"


def wait_for(file: Path, started: subprocess.Popen[Any]) -> None:
    while not file.exists():
        assert started.poll() is None
        time.sleep(0.01)


def parent(folder: Path, code: int, seconds: float = 1.0, echo: str = ECHO) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PARENT, str(folder), str(code), str(seconds), echo]
    # as a shell starts a background job, which is to hear a signal that is meant for it all the same
    ignoring = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    started = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=ignoring)
    wait_for(folder / "ready", started)
    return started


@pytest.fixture(autouse=True)
def _hang_up_is_heard() -> Iterator[None]:
    """Under nohup the commands of these tests would inherit that it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def living(folder: Path) -> int:
    """Processes that the stage started and that are still there."""
    found = subprocess.run(["pgrep", "-f", f"sleep.60. {folder}$"], capture_output=True, text=True, check=False)
    return len(found.stdout.split())


@pytest.mark.parametrize(
    ("number", "code", "expected"),
    [
        (signal.SIGTERM, 75, 75),  # saved
        (signal.SIGINT, 130, 130),
        (signal.SIGTERM, 143, 143),  # nothing to save
        (signal.SIGTERM, 5, 5),  # could not save
        (signal.SIGTERM, 15, 143),  # as Ray ends a driver that is told while it connects
        (signal.SIGTERM, 0, 75),  # was done all the same
        (signal.SIGINT, 0, 130),
        (signal.SIGHUP, 75, 75),  # the terminal was closed: the stage is asked to save
    ],
)
def test_a_stage_is_told_once_and_its_code_kept(tmp_path: Path, number: int, code: int, expected: int) -> None:
    started = parent(tmp_path, code)
    os.killpg(started.pid, number)  # as the terminal does, and ray job stop
    wait_for(tmp_path / "told", started)
    os.kill(started.pid, number)  # a launcher's trap sends it again within moments
    assert started.wait(LATE_S) == expected
    asked = signal.SIGTERM if number == signal.SIGHUP else number
    assert (tmp_path / "seen").read_text() == str(int(asked)), "neither the terminal's nor the second one reached it"
    assert not living(tmp_path)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_one_of_either_kind_ends_it_at_once(tmp_path: Path, second: int) -> None:
    started = parent(tmp_path, 75, 2 * LATE_S, NO_ECHO)
    started.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "told", started)
    time.sleep(2 * float(NO_ECHO))
    started.send_signal(second)
    assert started.wait(LATE_S) == 128 + second
    assert "told to stop twice" in started.stdout.read() and not living(tmp_path)


# a command with a process of its own that takes `argv[2]` seconds to clean up after what interrupts it
COMMAND = """
import subprocess, sys, time
from eaft_verl import cli
from eaft_verl.experiment import processes
processes.ECHO_S = float(sys.argv[3])
def verb(options):
    try:
        words = [sys.executable, "-c", "import time; time.sleep(60)", sys.argv[1]]
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        open(sys.argv[1] + "/ready", "w").close()
        time.sleep(60)
    finally:
        open(sys.argv[1] + "/told", "w").close()
        time.sleep(float(sys.argv[2]))
        open(sys.argv[1] + "/clean", "w").close()
cli.VERBS["tasks"] = verb
sys.exit(cli.main(["tasks"]))
"""


@pytest.mark.parametrize("ignored", [None, signal.SIGINT])  # as in the background jobs of a script
def test_sigterm_lets_a_command_clean_up(tmp_path: Path, ignored: int | None) -> None:
    started = command(tmp_path, 1, ignored=ignored)
    started.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "told", started)
    started.send_signal(signal.SIGTERM)  # sent again within moments: the same one
    assert started.wait(LATE_S) == 143 and (tmp_path / "clean").exists()
    assert (
        started.stdout.read() == "eaft: SIGTERM: ended; what was finished before is kept; run the same command again\n"
    )


def test_the_second_sigterm_does_not_wait_for_that(tmp_path: Path) -> None:
    started = command(tmp_path, 2 * LATE_S, echo=NO_ECHO)
    started.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "told", started)
    assert living(tmp_path)
    time.sleep(2 * float(NO_ECHO))
    started.send_signal(signal.SIGTERM)
    assert started.wait(LATE_S) == 143
    assert "told to stop twice" in started.stdout.read() and not living(tmp_path)


def test_nohup_is_heeded_and_a_closed_terminal_says_it_often(tmp_path: Path) -> None:
    started = command(tmp_path, 1, echo=NO_ECHO)
    started.send_signal(signal.SIGHUP)  # the kernel, then the shell, which may be slow
    wait_for(tmp_path / "told", started)
    time.sleep(2 * float(NO_ECHO))
    started.send_signal(signal.SIGHUP)
    assert started.wait(LATE_S) == 143 and (tmp_path / "clean").exists()
    assert started.stdout.read().startswith("eaft: SIGHUP: ended; ")
    (tmp_path / "ready").unlink()
    started = command(tmp_path, 0, ignored=signal.SIGHUP)
    started.send_signal(signal.SIGHUP)
    started.send_signal(signal.SIGTERM)
    assert started.wait(LATE_S) == 143 and started.stdout.read().startswith("eaft: SIGTERM: ended; ")


def command(folder: Path, seconds: float, *, ignored: int | None = None, echo: str = ECHO) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", COMMAND, str(folder), str(seconds), echo]
    ignoring = functools.partial(signal.signal, ignored, signal.SIG_IGN) if ignored else None
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = subprocess.Popen(words, start_new_session=True, preexec_fn=ignoring, **piped)
    wait_for(folder / "ready", started)
    return started


def test_a_killed_parent_takes_its_stage_with_it(tmp_path: Path) -> None:
    """The command line's own stages, which ask the kernel for it."""
    code = "import sys, time; from eaft_verl.experiment.processes import begin_stage; begin_stage(); "
    code += "open(sys.argv[1], 'w').close(); time.sleep(60)"
    words = ["from eaft_verl.experiment.processes import run_stage", "import sys", "run_stage(sys.argv[1:])"]
    command = [sys.executable, "-c", "; ".join(words), sys.executable, "-c", code, str(tmp_path / "ready")]
    with subprocess.Popen(command, start_new_session=True) as started:
        wait_for(tmp_path / "ready", started)
        started.kill()
    latest = time.monotonic() + LATE_S  # the stage would go on for twice as long
    while not subprocess.run(["pgrep", "-f", str(tmp_path / "ready")], capture_output=True, check=False).returncode:
        assert time.monotonic() < latest, "still there"
        time.sleep(0.05)


class Attempts:
    """Attempts that end with these codes; each leaves its saved step first."""

    def __init__(self, folder: Path, *ends: tuple[int, int]) -> None:
        self.folder, self.ends = folder, list(ends)

    def __call__(self) -> int:
        code, saved = self.ends.pop(0)
        if not (self.folder / "run.json").exists():
            Run.create(self.folder, info={"kind": "arm"}, config="a: 1\n", env={})
        Run(self.folder).update(status="failed" if code else "finished", error=f"end {code}")
        state = self.folder / "resume" / f"global_step_{saved}"
        state.mkdir(parents=True, exist_ok=True)
        (state / MANIFEST).write_text("{}")
        return code


@pytest.mark.parametrize(
    ("ends", "restarts", "code", "made"),
    [
        ([(0, 4)], 3, 0, 0),
        ([(8, 4), (0, 8)], 3, 0, 1),
        ([(8, 4), (6, 8), (8, 12), (0, 16)], 3, 0, 3),
        ([(8, 4), (8, 8), (8, 12)], 2, 8, 2),  # no more are allowed
        ([(8, 4), (8, 4), (8, 4)], 9, 8, 2),  # two in a row without progress
        ([(8, 4), (8, 4), (8, 5), (8, 5), (0, 6)], 9, 0, 4),  # one without, then progress again
        ([(8, 4), (7, 8)], 9, 7, 1),  # diverging is not mended by another attempt
        ([(2, 0)], 9, 2, 0),
    ],
)
def test_restarts_need_progress(
    ends: list[tuple[int, int]], restarts: int, code: int, made: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(supervision.time, "sleep", pauses.append)
    monkeypatch.setenv("EAFT_WAIT", "0")
    attempts = Attempts(tmp_path / "run", *ends)
    assert supervised(attempts, tmp_path / "run", restarts) == code
    assert pauses == [5.0 * 2**number for number in range(made)] and len(attempts.ends) == len(ends) - made - 1
    rows = Run(tmp_path / "run").info.get("restarts", [])
    assert [row["code"] for row in rows] == [end[0] for end in ends[:made]]
    assert [row["from_step"] for row in rows] == [end[1] for end in ends[:made]]


def test_a_training_that_dies_without_a_word_is_spoken_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(tmp_path / "run", info={"kind": "arm", "attempt": 1}, config="a: 1\n", env={})
    run.update(status="running")
    assert supervised(lambda: -signal.SIGKILL, run.path, 0) == 8
    assert run.info["status"] == "failed" and "killed by SIGKILL" in run.info["error"]
    assert str(run.path / "failures" / "attempt_1.txt") in capsys.readouterr().err
    assert supervised(lambda: -signal.SIGBUS, tmp_path / "none", 0) == 8  # before there was a run
    assert "killed by SIGBUS" in capsys.readouterr().err
    run.update(status="failed", error="KeyError: told")
    assert supervised(lambda: 1, run.path, 0) == 1 and run.info["error"] == "KeyError: told"
    run.update(status="running")
    assert supervised(lambda: 5, run.path, 0) == 5 and "no space left" in run.info["error"]
    run.update(status="running")
    with run.locked():  # by another command: that one speaks for itself
        code = "import sys; from eaft_verl.experiment.supervision import supervised; from pathlib import Path; "
        code += "sys.exit(supervised(lambda: 1, Path(sys.argv[1]), 0))"
        done = subprocess.run([sys.executable, "-c", code, str(run.path)], check=False)
    assert done.returncode == 1 and run.info["status"] == "running"


def test_the_number_of_restarts_travels_with_a_launch(capsys: pytest.CaptureFixture[str]) -> None:
    words = Launch("q.yaml", "eaft", restarts=2).words()
    assert words == ["q.yaml", "--arm", "eaft", "--max-restarts", "2"]
    with pytest.raises(SystemExit):
        main(["launch", *words[:-1], "-1", "--on", "local"])
    assert "must be a whole number from 0" in capsys.readouterr().err


def test_every_error_has_a_documented_code() -> None:
    from eaft_verl import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RunError)]
    assert len(kinds) >= 8 and {kind("x").code for kind in kinds} <= EXIT_CODES.keys()
