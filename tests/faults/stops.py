"""Processes that are killed or told to stop."""

from .matrix import Lab, Outcome, fault


@fault("kill -9 of the driver and its session at step 10, saves at 4 and 8", "exact from step 8", slow=True)
def _driver_killed(lab: Lab) -> Outcome:
    lab.interrupt()
    again = lab.train()
    assert again.code == 0, again.said
    lab.assert_exact()
    return Outcome("resumed, every row equal", lost=2)
