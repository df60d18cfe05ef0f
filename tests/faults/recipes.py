"""Recipes and command lines that cannot be meant."""

from .matrix import Lab, Outcome, fault


@fault("a key with a typo", "refused in one line that names it and the right one")
def _typo(lab: Lab) -> Outcome:
    seen = lab.train("verl.trainer.save_frequency=2")
    assert seen.code == 2 and "verl.trainer.save_freq" in seen.last_line and "Traceback" not in seen.said
    return Outcome(f"exit 2: {seen.last_line}")
