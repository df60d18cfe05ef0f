"""Resumable checkpoints: verl's sharded state plus what the driver must remember, complete or not there at all."""

import os
import shutil
from pathlib import Path
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.files import read_json, write_json
from eaft_verl.runs import Run, step_name, steps_in

FOLDER = "resume"
STATE_FILE = "trainer.json"


def save(run: Run, group: Any, step: int, state: dict[str, Any], keep: int | None) -> None:
    """Write `resume/step_N` under another name, describe it last, then rename; older ones go only after that."""
    folder = run.path / FOLDER / step_name(step)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    group.save_checkpoint(str(partial), None, step, None)
    write_json(partial / STATE_FILE, {"step": step, "world_size": group.world_size, **state}, exact=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    if keep is not None:
        for old in sorted(_complete(run).items())[:-keep]:
            shutil.rmtree(old[1], ignore_errors=True)


def load(run: Run, group: Any) -> dict[str, Any] | None:
    """Restore the newest complete checkpoint and return its state; None where there is none."""
    found = _complete(run)
    if not found:
        return None
    _step, folder = max(found.items())
    state = read_json(folder / STATE_FILE)
    if state["world_size"] != group.world_size:
        raise RunError(
            f"{folder} was saved by {state['world_size']} worker(s) and cannot be loaded by {group.world_size}; resume "
            "with the same verl.trainer.nnodes * n_gpus_per_node, or start a new run"
        )
    group.load_checkpoint(str(folder))
    return state


def newest(run: Run) -> int | None:
    """Step of the newest complete checkpoint; None where there is none."""
    return max(_complete(run), default=None)


def remove(run: Run) -> None:
    """A finished run needs its export only."""
    shutil.rmtree(run.path / FOLDER, ignore_errors=True)


def _complete(run: Run) -> dict[int, Path]:
    return steps_in(run.path / FOLDER, STATE_FILE)
