"""What stands still is ended with its stacks kept. Real processes, no Ray."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from eaft_verl.errors import HUNG, Hung
from eaft_verl.training import watchdog
from eaft_verl.training.watchdog import LIMIT, Watchdog

WORKER = """
import time
from eaft_verl.training.stacks import write_stacks_when_asked
write_stacks_when_asked()
def deep_in_a_call():
    print("there", flush=True)
    time.sleep(600)
deep_in_a_call()
"""


def worker(watch: Watchdog) -> subprocess.Popen[bytes]:
    """A process that has registered, as Ray's workers do."""
    environ = {**os.environ, **watch.variables, "RAY_RAYLET_PID": "1"}
    started = subprocess.Popen([sys.executable, "-c", WORKER], env=environ, stdout=subprocess.PIPE)
    assert started.stdout and started.stdout.readline() == b"there\n"
    return started


def test_stacks_of_all_the_silent_named_and_everything_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "1")
    watch = Watchdog(tmp_path)
    workers = [worker(watch), worker(watch)]
    workers[1].send_signal(signal.SIGSTOP)
    watch.beat(0.1)

    def driver() -> None:
        with watch:
            for one in workers:
                one.wait(60)

    with pytest.raises(Hung) as caught:
        driver()
    assert caught.value.code == HUNG
    assert [one.returncode for one in workers] == [-signal.SIGKILL] * 2
    said = str(caught.value)
    assert "after 1 step(s)" in said and "2 worker process(es)" in said and str(tmp_path / "stacks") in said
    assert f"(pid {workers[1].pid} on" in said and f"(pid {workers[0].pid} on" not in said
    stacks = [tmp_path / "stacks" / f"{socket.gethostname()}--{one.pid}.txt" for one in workers]
    assert "deep_in_a_call" in stacks[0].read_text() and stacks[1].read_text() == ""
    assert "in driver" in (tmp_path / "stacks" / "driver.txt").read_text()


SUSPENDED = """
import sys, time
from pathlib import Path
from eaft_verl.training.watchdog import Watchdog
with Watchdog(Path(sys.argv[1])) as watch:
    watch.beat()
    print("ready", flush=True)
    time.sleep(0.5)
    time.sleep(0.5)
print("done")
"""


def test_a_job_that_was_suspended_has_not_been_hanging(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUSPENDED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, LIMIT: "3"}) as job:
        assert job.stdout and job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGSTOP)
        time.sleep(4)
        job.send_signal(signal.SIGCONT)
        assert job.stdout.read() == "done\n" and job.wait() == 0


def test_a_foreign_process_that_took_over_a_pid_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "1")
    monkeypatch.setattr(watchdog, "ANSWER_S", 0.1)  # nobody is asked, so nobody answers

    def driver() -> None:
        with Watchdog(tmp_path) as watch:
            (watch.folder / f"{socket.gethostname()}--{foreign.pid}.txt").touch()
            while not watch.verdict:
                time.sleep(0.1)

    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as foreign:
        with pytest.raises(Hung):
            driver()
        assert foreign.poll() is None
        foreign.kill()


def test_progress_keeps_it_quiet_and_slow_steps_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves while it waits, and only then."""
    monkeypatch.setenv(LIMIT, "1")
    now, ended = 100.0, []

    def wait(seconds: float) -> bool:
        nonlocal now
        now += seconds
        if now < 110:
            watch.beat()
        elif not watch.steps:
            for step_s in (2.0, 3.0, 400.0):
                watch.beat(step_s)
        return now > 200

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now))
    watch = Watchdog(tmp_path)
    monkeypatch.setattr(watch, "leave", SimpleNamespace(wait=wait))
    monkeypatch.setattr(watch, "_end", lambda: ended.append(now))
    watch._watch()
    assert watch.limit == 30.0  # ten times the median
    assert ended == [pytest.approx(140, abs=0.3)]


def test_a_training_that_ends_leaves_no_stacks(tmp_path: Path) -> None:
    with Watchdog(tmp_path) as watch:
        watch.beat()
        assert watch.thread.is_alive() and (tmp_path / "stacks").exists()
    assert not watch.verdict and not (tmp_path / "stacks").exists()


def test_half_an_hour_is_always_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT, raising=False)
    watch = Watchdog(tmp_path)
    assert watch.limit == 1800
    watch.beat(3.0)
    assert watch.limit == 1800
    for _ in range(5):
        watch.beat(600.0)
    assert watch.limit == 6000
