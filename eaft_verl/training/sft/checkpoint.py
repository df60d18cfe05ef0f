"""An SFT arm's states to resume: the workers' tensors and what the driver must remember, in one move."""

import contextlib
import copy
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eaft_verl.runs import Run, step_name
from eaft_verl.training import states
from eaft_verl.training.states import Saved


def save(run: Run, group: Any, step: int, state: dict[str, Any], keep: int | None) -> bool:
    """Write `resume/step_N` under another name, describe it last, then rename; older ones go only after that.

    False, and a warning, where the workers hold a value that is not finite: such a state is worth nothing.
    """
    partial = _begin(run, group, step)
    return _complete(run, partial, group.world_size, step, state, keep)


class Saver:
    """Saves at once, or in the background: then the workers write a copy, and one state at a time is under way."""

    def __init__(self, run: Run, group: Any, keep: int | None, *, background: bool) -> None:
        self.run, self.group, self.keep, self.background = run, group, keep, background
        self.begun: tuple[Path, int, dict[str, Any]] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """As `save`; in the background the state counts only once `settle` has found it written."""
        self.settle(wait=True)
        self.begun = _begin(self.run, self.group, step), step, copy.deepcopy(state)
        if not self.background:
            self.settle(wait=True)

    def settle(self, *, wait: bool) -> None:
        """Complete the state that was begun, once the workers have written it; what went wrong there is raised."""
        if self.begun is None:
            return
        partial, step, state = self.begun
        with _room_given_back(partial):
            if self.background and not all(self.group.save_finished(wait)):
                return
            self.begun = None
            _complete(self.run, partial, self.group.world_size, step, state, self.keep)


def _begin(run: Run, group: Any, step: int) -> Path:
    """The workers' part, under the name of what is not finished."""
    partial = run.path / states.FOLDER / f".{step_name(step)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with _room_given_back(partial):
        group.save_checkpoint(str(partial), None, step, None)
    return partial


def _complete(run: Run, partial: Path, world_size: int, step: int, state: dict[str, Any], keep: int | None) -> bool:
    """The driver's part, when every worker has written its own."""
    folder = partial.with_name(step_name(step))
    with _room_given_back(partial):
        if bad := states.nonfinite_in(partial):
            shutil.rmtree(partial, ignore_errors=True)
            print(
                f"eaft: warning: step {step} is not saved: {bad} is not finite; the older states are kept",
                file=sys.stderr,
                flush=True,
            )
            return False
        states.seal(partial, run, step, step, state, world_size)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        states.flush_folder(folder.parent)
    states.retain(run.path, keep)
    return True


@contextlib.contextmanager
def _room_given_back(partial: Path) -> Iterator[None]:
    """What could not be finished is removed: its room is needed."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
