"""States that are written while training goes on."""

import os
import signal
import subprocess
import time

from .matrix import ARM, STEPS, Lab, Outcome, fault
from .stops import SAVED, assert_one_line, orphans

ASYNC = "async_save=true"
WRITTEN = ".step_000008.partial"  # what step 8's state is called until it is whole


def _seen_writing(lab: Lab, process: subprocess.Popen[str]) -> None:
    """Return while the state of step 8 is being written."""
    end = time.monotonic() + 600
    while not (lab.run / "resume" / WRITTEN).exists():
        assert time.monotonic() < end and process.poll() is None, lab.said(process)
        time.sleep(0.001)


@fault(
    "async_save: kill -9 while step 8 is being written, saves at 4 and 8", "4 is the newest; exact from it", slow=True
)
def _killed(lab: Lab) -> Outcome:
    lab.whole()
    with lab.started("train", lab.recipe, "--arm", ARM, ASYNC) as process:
        _seen_writing(lab, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    names = sorted(path.name for path in (lab.run / "resume").iterdir())
    assert names == [WRITTEN, "step_000004"] and not (lab.run / "resume" / WRITTEN / "manifest.json").exists(), names
    lost = len(lab.rows()) - 4
    seen = lab.train(ASYNC)
    assert seen.code == 0 and f"resuming at step 4 of {STEPS}" in seen.said, seen.said
    lab.assert_exact()
    return Outcome("resumed at step 4, every row equal", lost=lost)


@fault(
    "async_save: SIGTERM while step 8 is being written",
    "it is waited for and the last step saved; 75, exact",
    slow=True,
)
def _told(lab: Lab) -> Outcome:
    lab.whole()
    with lab.started("train", lab.recipe, "--arm", ARM, ASYNC, LAB=str(lab.run)) as process:
        _seen_writing(lab, process)
        process.send_signal(signal.SIGTERM)
        code, said, left = process.wait(timeout=600), lab.said(process), orphans(lab.run)
    step = len(lab.rows())
    assert code == SAVED and not left and f"is saved at step {step} of {STEPS}" in assert_one_line(said), (said, left)
    kept = sorted(path.name for path in (lab.run / "resume").iterdir())
    assert kept == sorted({"step_000008", f"step_{step:06d}"} | ({"step_000004"} if step == 8 else set())), kept
    assert (seen := lab.train()).code == 0, seen.said  # the other way of saving reads it as well
    lab.assert_exact()
    return Outcome(f"75, saved at step {step}; every row equal", lost=0)
