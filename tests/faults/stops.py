"""Processes that are killed, told to stop, or stand still."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from .matrix import ARM, RECIPE, STEPS, Lab, Outcome, fault

SAVED, CTRL_C, ENDED, HUNG, LOST = 75, 130, 143, 6, 8


def family(process: subprocess.Popen[str], name: str = "") -> list[psutil.Process]:
    """Living processes that a command has started, those of Ray too, whose title contains `name`."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            if name in " ".join(one.cmdline()) and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except psutil.Error:
            continue
    return found


def orphans(run: Path) -> list[str]:
    """Titles of processes that work for this run though its command has ended."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get("LAB") == str(run) and one.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(one.cmdline())[:80])
        except psutil.Error:
            continue
    return found


def info(lab: Lab) -> dict[str, Any]:
    """run.json."""
    return json.loads((lab.run / "run.json").read_text(encoding="utf-8"))


def assert_one_line(said: str) -> str:
    """No traceback; the last line."""
    assert "Traceback" not in said, said
    return said.strip().splitlines()[-1]


@contextlib.contextmanager
def held(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Iterator[None]:
    """The workers stand still within the block: a quick machine makes ten steps of a tiny model in half a second."""
    workers = family(process, "ray::EaftWorker")
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                worker.resume()


class Stopped:
    """A training that was sent a signal at step 10: how it ended and how long that took."""

    def __init__(self, lab: Lab, number: int) -> None:
        with lab.started("train", lab.recipe, "--arm", ARM, LAB=str(lab.run)) as process:
            lab.wait_for_step(process, 10)
            started = time.monotonic()
            with held(process):
                os.kill(process.pid, number)
                time.sleep(0.2)
            self.code = process.wait(timeout=600)
            self.seconds = time.monotonic() - started
            self.said = lab.said(process)
            self.left = orphans(lab.run)


def goes_on(lab: Lab, at: int) -> None:
    """The same command goes on after step `at`, as if nothing had been."""
    before = [row["step"] for row in lab.rows()]
    assert before == list(range(1, at + 1)), before
    again = lab.train()
    assert again.code == 0, again.said
    lab.assert_exact()


@fault("kill -9 of the driver and its session at step 10, saves at 4 and 8", "exact from step 8", slow=True)
def _driver_killed(lab: Lab) -> Outcome:
    lab.interrupt()
    again = lab.train()
    assert again.code == 0, again.said
    lab.assert_exact()
    return Outcome("resumed, every row equal", lost=2)


@fault("SIGTERM at step 10, saves at 4 and 8", "the step is finished and saved, 75; goes on exactly", slow=True)
def _sigterm(lab: Lab) -> Outcome:
    seen = Stopped(lab, signal.SIGTERM)
    step = len(lab.rows())
    assert seen.code == SAVED and not seen.left, (seen.code, seen.said, seen.left)
    assert f"SIGTERM: {lab.run} is saved at step {step} of {STEPS}" in assert_one_line(seen.said)
    assert info(lab)["status"] == "interrupted"
    goes_on(lab, step)
    return Outcome(f"75 after {seen.seconds:.1f} s; every row equal", lost=0)


@fault("Ctrl-C at step 10 without save_freq", "saved, 130; goes on exactly", slow=True)
def _ctrl_c(lab: Lab) -> Outcome:
    lab.write_recipe(RECIPE.replace("save_freq: 4", "save_freq: -1"))
    seen = Stopped(lab, signal.SIGINT)
    step = len(lab.rows())
    assert seen.code == CTRL_C and not seen.left, (seen.code, seen.said, seen.left)
    assert f"Ctrl-C: {lab.run} is saved at step {step} of {STEPS}" in assert_one_line(seen.said)
    goes_on(lab, step)
    return Outcome(f"130 after {seen.seconds:.1f} s; every row equal", lost=0)


@fault(
    "the terminal is closed at step 10 (SIGHUP; writing fails)", "saved as on SIGTERM, 75; goes on exactly", slow=True
)
def _terminal_closed(lab: Lab) -> Outcome:
    terminal, inside = os.openpty()
    command = ["setsid", "--ctty", *lab.command("train", lab.recipe, "--arm", ARM)]
    streams = {"stdin": inside, "stdout": inside, "stderr": inside}
    process = subprocess.Popen(command, cwd=lab.folder, env=lab.environ(LAB=str(lab.run)), **streams)
    os.close(inside)
    os.set_blocking(terminal, False)
    end, said = time.monotonic() + 600, b""
    while len(lab.rows()) < 10:
        assert time.monotonic() < end and process.poll() is None, said.decode()
        with contextlib.suppress(OSError):  # nothing more is said, or nobody is there
            said += os.read(terminal, 1 << 16)
        time.sleep(0.01)
    with held(process):
        os.close(terminal)
        time.sleep(1)
    code = process.wait(timeout=600)
    left, step = orphans(lab.run), len(lab.rows())
    assert code == SAVED and not left, (code, left, info(lab))
    assert info(lab)["status"] == "interrupted" and f"is saved at step {step} of {STEPS}" in info(lab)["error"]
    goes_on(lab, step)
    return Outcome("75; every row equal", lost=0)


@fault("SIGTERM, then Ctrl-C, while a worker is stopped", "the second ends it at once, nothing is left", slow=True)
def _twice(lab: Lab) -> Outcome:
    with lab.started("train", lab.recipe, "--arm", ARM, LAB=str(lab.run)) as process:
        lab.wait_for_step(process, 5)
        (worker,) = family(process, "ray::EaftWorker")
        worker.suspend()
        process.send_signal(signal.SIGTERM)
        time.sleep(3)
        assert process.poll() is None, "the first one waits for the step"
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=600)
        seconds, said, left = time.monotonic() - started, lab.said(process), orphans(lab.run)
    assert code == CTRL_C and seconds < 60 and not left, (code, seconds, said, left)
    assert "told to stop twice" in assert_one_line(said) and info(lab)["status"] == "interrupted"
    return Outcome(f"130 after {seconds:.1f} s")


@fault("the terminal's Ctrl-C under `compare` while an arm trains", "counted once: saved, 130", slow=True)
def _ctrl_c_under_compare(lab: Lab) -> Outcome:
    with lab.started("compare", lab.recipe, LAB=str(lab.run)) as process:
        lab.wait_for_step(process, 6)
        started = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=600)
        seconds, said, left = time.monotonic() - started, lab.said(process), orphans(lab.run)
    step = len(lab.rows())
    assert code == CTRL_C and not left, (code, said, left)
    assert f"Ctrl-C: {lab.run} is saved at step {step} of {STEPS}" in said and "Traceback" not in said
    goes_on(lab, step)
    return Outcome(f"130 after {seconds:.1f} s; every row equal", lost=0)


@fault("kill -9 of the watching parent alone at step 10", "no orphan; exact from step 8", slow=True)
def _parent_killed(lab: Lab) -> Outcome:
    with lab.started("train", lab.recipe, "--arm", ARM, LAB=str(lab.run)) as process:
        lab.wait_for_step(process, 10)
        process.kill()
        end = time.monotonic() + 600
        while orphans(lab.run):
            assert time.monotonic() < end, orphans(lab.run)
            time.sleep(0.2)
    assert (seen := lab.train()).code == 0, seen.said
    lab.assert_exact()
    return Outcome("all ended with it; resumed, every row equal", lost=2)


@fault("kill -9 of a worker at step 10, --max-restarts 1", "said in one line, goes on from 8 by itself", slow=True)
def _worker_killed(lab: Lab) -> Outcome:
    with lab.started("train", lab.recipe, "--arm", ARM, "--max-restarts", "1", LAB=str(lab.run)) as process:
        lab.wait_for_step(process, 10)
        (worker,) = family(process, "ray::EaftWorker")
        worker.kill()
        code, said = process.wait(timeout=600), lab.said(process)
    assert code == 0 and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("eaft: error: a worker")]
    assert f"(pid {worker.pid}) has died" in line and str(lab.run / "failures") in line
    assert "eaft: restart 1 of 1 in 5 s: exit code 8; goes on from step 8" in said
    assert "ActorDiedError" in (lab.run / "failures" / "attempt_1.txt").read_text()
    (row,) = info(lab)["restarts"]
    assert row["from_step"] == 8 and row["code"] == LOST
    lab.assert_exact()
    return Outcome("restarted; every row equal", lost=2)


@fault("kill -9 of one of two workers", "no hang: one line with its cause, exit 8", slow=True)
def _one_of_two(lab: Lab) -> Outcome:
    words = ["train", lab.recipe, "--arm", ARM, "verl.trainer.n_gpus_per_node=2"]
    with lab.started(*words, LAB=str(lab.run)) as process:
        lab.wait_for_step(process, 5)
        family(process, "ray::EaftWorker")[0].kill()
        started = time.monotonic()
        code, said = process.wait(timeout=600), lab.said(process)
        seconds, left = time.monotonic() - started, orphans(lab.run)
    assert code == LOST and not left, (code, said, left)
    assert "has died" in assert_one_line(said) and info(lab)["status"] == "failed"
    return Outcome(f"exit 8 after {seconds:.0f} s", lost=1)


@fault("a worker dies before every save, --max-restarts 5", "given up after two fruitless failures", slow=True)
def _crash_loop(lab: Lab) -> Outcome:
    words = ["train", lab.recipe, "--arm", ARM, "--max-restarts", "5", "verl.trainer.save_freq=20"]
    with lab.started(*words, LAB=str(lab.run)) as process:
        for attempt in (1, 2):
            end = time.monotonic() + 600
            workers: list[psutil.Process] = []
            while not (workers and lab.rows() and info(lab)["attempt"] == attempt):
                assert time.monotonic() < end and process.poll() is None, lab.said(process)
                time.sleep(0.1)
                workers = family(process, "ray::EaftWorker")
            for worker in workers:
                worker.kill()
            while info(lab)["status"] == "running":
                time.sleep(0.1)
        code, said = process.wait(timeout=600), lab.said(process)
    assert code == LOST and said.count("eaft: restart ") == 1, said
    assert "no restart: 2 failures in a row brought no new saved state" in said and "Traceback" not in said
    assert "before its first state was saved: begins at step 1" in said
    assert (lab.run / "before_restart_1" / "metrics.jsonl").exists()
    return Outcome("one restart, then exit 8")


@fault("kill -9 of the raylet at step 10", "the driver dies mute: its parent says so, exit 8", slow=True)
def _raylet_killed(lab: Lab) -> Outcome:
    with lab.started("train", lab.recipe, "--arm", ARM, LAB=str(lab.run)) as process:
        lab.wait_for_step(process, 10)
        (raylet,) = family(process, "raylet/raylet")
        raylet.kill()
        code, said, left = process.wait(timeout=600), lab.said(process), orphans(lab.run)
    assert code == LOST and not left, (code, said, left)
    line = assert_one_line(said)
    assert "failures/attempt_1.txt" in line and info(lab)["status"] == "failed", line
    assert "the end of" in (lab.run / "failures" / "attempt_1.txt").read_text()
    assert (seen := lab.train()).code == 0, seen.said
    lab.assert_exact()
    return Outcome(f"exit 8: {line[:60]}...; resumed, every row equal", lost=2)


@fault("a worker stopped for ever (SIGSTOP)", "exit 6, stacks kept, the silent worker named", slow=True)
def _hung(lab: Lab) -> Outcome:
    with lab.started("train", lab.recipe, "--arm", ARM, LAB=str(lab.run), EAFT_HANG_SECONDS="60") as process:
        lab.wait_for_step(process, 5)
        (worker,) = family(process, "ray::EaftWorker")
        worker.suspend()
        started = time.monotonic()
        code = process.wait(timeout=600)
        seconds, said, left = time.monotonic() - started, lab.said(process), orphans(lab.run)
    assert code == HUNG and 55 < seconds < 300 and not left, (code, seconds, said, left)
    line = assert_one_line(said)
    assert f"(pid {worker.pid} on" in line and "without an answer" in line, line
    assert "_step" in (lab.run / "stacks" / "driver.txt").read_text()
    assert info(lab)["status"] == "failed"
    return Outcome(f"exit 6 after {seconds:.0f} s", lost=1)


@fault("two commands on one run directory", "the second is refused at once, the first is unharmed", slow=True)
def _two_at_once(lab: Lab) -> Outcome:
    with lab.started("train", lab.recipe, "--arm", ARM) as process:
        lab.wait_for_step(process, 2)
        with held(process):
            second = lab.train()
        assert second.code == 2 and "is in use by another process" in assert_one_line(second.said)
        assert process.wait(timeout=600) == 0
    lab.assert_exact()
    return Outcome(f"exit 2: {second.last_line}"[:100])


@fault("SIGTERM while Ray starts", "nothing to save: 143, not 75", slow=True)
def _before_the_first_step(lab: Lab) -> Outcome:
    with lab.started("train", lab.recipe, "--arm", ARM, LAB=str(lab.run)) as process:
        end = time.monotonic() + 600
        while not (lab.run / "run.json").exists():
            assert time.monotonic() < end and process.poll() is None, lab.said(process)
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        code, said, left = process.wait(timeout=600), lab.said(process), orphans(lab.run)
    assert code == ENDED and not left, (code, said, left)
    assert_one_line(said)
    assert info(lab)["status"] == "interrupted", info(lab)
    assert (seen := lab.train()).code == 0, seen.said
    lab.assert_exact()
    return Outcome("exit 143; the same command trains from the start", lost=0)
