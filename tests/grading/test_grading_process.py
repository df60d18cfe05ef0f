"""The grader's process: kept, cut off, replaced, and light."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eaft_verl.errors import ConfigError, RunError
from eaft_verl.grading.graders import MAX_CHARACTERS
from eaft_verl.grading.process import Grade, GradingProcess

GRADERS = """
import os, signal, sys, time

def grade(response, answer):
    print("noise on stdout")
    if response == "hang":
        while True:
            pass
    if response == "sleep through alarms":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(600)
    if response == "crash":
        os._exit(1)
    if response == "raise":
        raise RuntimeError("broken")
    if response.startswith("leave"):
        import subprocess
        child = subprocess.Popen(["sleep", "600"])
        open(response.split()[1], "w").write(str(child.pid))
        time.sleep(600)
    if response == "two":
        return 2
    if response == "memory":
        return len(bytearray(6 << 30)) > 0
    if response == "length":
        return len(response) / 100
    if response == "torch":
        return float("torch" in sys.modules)
    return len(response) / 1_000_000

def dies_at_import(response, answer):
    return 1.0
"""


PATIENT_S = 60.0  # for answers that come; a grader that hangs ends itself some seconds later


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GradingProcess]]:
    """GradingProcess of a grader in my_graders.py, closed afterwards."""
    (tmp_path / "my_graders.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[GradingProcess] = []

    def make(grader: str = "my_graders:grade") -> GradingProcess:
        made.append(GradingProcess(grader, PATIENT_S))
        return made[-1]

    yield make
    for process in made:
        process.close()


def alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody waits for does not."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def assert_ends(pid: int) -> None:
    """Killed or told, and gone once the kernel has come to it."""
    latest = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < latest, "still there"
        time.sleep(0.01)


def test_one_process_grades_many_answers(make):
    process = make("number")
    assert process.pid is None
    assert process.grade("It is 7", "7") == Grade(1.0)
    pid = process.pid
    assert process.grade("#### 8", "7") == Grade(0.0, formatted=True)
    assert process.answer_fault("seven").startswith("it is not one number")
    assert process.answer_fault("7" * 20_000).startswith("it has 20000 characters")
    assert process.grade("\ud800\0 \u2028 7", "7") == Grade(1.0)
    assert process.pid == pid
    process.close()
    assert process.pid is None and not alive(pid)
    assert process.grade("7", "7") == Grade(1.0)


@pytest.mark.parametrize("response", ["hang", "sleep through alarms", "crash"])
def test_a_grader_that_hangs_or_dies_is_cut_off_and_replaced(make, response: str):
    process = make()
    assert process.grade("x" * 1000, "") == Grade(0.001)
    pid, started, process.seconds = process.pid, time.monotonic(), 1.0
    assert process.grade(response, "") == Grade(0.0, "timeout")
    assert time.monotonic() - started < PATIENT_S / 2
    assert not alive(pid)
    process.seconds = PATIENT_S
    assert process.grade("x" * 1000, "") == Grade(0.001)
    assert process.pid != pid


def test_what_a_grader_started_ends_with_it(make, tmp_path: Path):
    process, file = make(), tmp_path / "pid"
    process.seconds = 1.0
    while not (file.exists() and file.read_text()):  # a slow machine has started nothing by then
        assert process.grade(f"leave {file}", "") == Grade(0.0, "timeout") and process.seconds < PATIENT_S
        process.seconds *= 2
    assert_ends(int(file.read_text()))


def test_a_script_needs_no_guard_and_its_thinking_is_cut_before_its_length(tmp_path: Path):
    """Unlike multiprocessing's spawned workers: the child does not import the script."""
    script = tmp_path / "plain.py"
    script.write_text(
        "from eaft_verl.grading.process import GradingProcess\n"
        "p = GradingProcess('number', 30.0)\n"
        "thought = '<think>' + '1 ' * 100_000\n"
        "print(p.grade(thought, '1').score, p.grade(thought + '</think>2', '2').score)"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "0.0 1.0\n"


def test_a_grader_that_raises_scores_0_and_stays(make):
    process = make()
    assert process.grade("raise", "") == Grade(0.0, "error", error="RuntimeError: broken")
    pid = process.pid
    assert process.grade("two", "").error.startswith("ValueError: the grader returned 2")
    assert process.grade("memory", "").error.startswith("MemoryError")
    assert process.pid == pid


def test_long_responses_are_cut_to_their_end(make):
    assert make().grade("x" * 1_000_000, "") == Grade(MAX_CHARACTERS / 1_000_000)
    assert make("number").grade("1 " * 600_000 + "7", "7") == Grade(1.0)


def test_the_process_is_light(make):
    assert make().grade("torch", "") == Grade(0.0)


def test_a_process_that_was_killed_while_idle_is_replaced(make):
    process = make("number")
    process.grade("7", "7")
    os.kill(process.pid, 9)
    assert_ends(process.pid)
    assert process.grade("7", "7") == Grade(1.0)


def test_threads_share_it(make):
    process, grades = make("number"), []
    threads = [
        threading.Thread(target=lambda n=n: grades.append((n, process.grade(str(n), "7").score))) for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dict(grades) == {n: float(n == 7) for n in range(16)}


def test_a_grader_that_cannot_be_built_is_no_zero(make, tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be imported"):
        make("my_graders:none").grade("7", "7")
    (tmp_path / "dying.py").write_text("import os; os._exit(3)")
    with pytest.raises(RunError, match="did not start"):
        make("dying:grade").grade("7", "7")


def test_it_ends_with_its_parent():
    script = (
        "from eaft_verl.grading.process import GradingProcess\n"
        "p = GradingProcess('number'); p.grade('7', '7'); print(p.pid, flush=True)\n"
        "import os; os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, check=True
    )  # the child has our stderr
    assert_ends(int(done.stdout))
