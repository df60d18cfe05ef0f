"""An SFT arm's states to resume: the workers' tensors and what the driver must remember, in one move."""

import os
import shutil
import sys
from typing import Any

from eaft_verl.runs import Run, step_name
from eaft_verl.training import states
from eaft_verl.training.states import Saved


def save(run: Run, group: Any, step: int, state: dict[str, Any], keep: int | None) -> bool:
    """Write `resume/step_N` under another name, describe it last, then rename; older ones go only after that.

    False, and a warning, where the workers hold a value that is not finite: such a state is worth nothing.
    """
    folder = run.path / states.FOLDER / step_name(step)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        group.save_checkpoint(str(partial), None, step, None)
        if bad := states.nonfinite_in(partial):
            print(
                f"eaft: warning: step {step} is not saved: {bad} is not finite; the older states are kept",
                file=sys.stderr,
                flush=True,
            )
            return False
        states.seal(partial, run, step, step, state, group.world_size)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        states.flush_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # of what could not be finished: its room is needed
    states.retain(run.path, keep)
    return True


def restore(saved: Saved, group: Any, objective: Any) -> dict[str, Any]:
    """Load a verified state into the workers; what the driver must remember. objective: as it is now."""
    if saved.manifest.get("objective") != objective:
        print(
            f"eaft: warning: {saved.folder} was saved under objective {saved.manifest.get('objective')}, and it is "
            f"{objective} now",
            file=sys.stderr,
        )
    group.load_checkpoint(str(saved.folder))
    return dict(saved.manifest["state"])


def newest(run: Run) -> int | None:
    """Step of the newest complete checkpoint; None where there is none."""
    return max(states.whole(run.path), default=None)
