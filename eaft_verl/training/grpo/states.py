"""verl's checkpoints of a GRPO run on disk: which are whole, which is the newest."""

import shutil
from pathlib import Path

from eaft_verl.files import write_text

LATEST = "latest_checkpointed_iteration.txt"
COMPLETE = "complete.json"
CAUSE_FILE = "rollout_error.txt"  # in the run: why a response could not be made
TRAINER = "eaft_sync"  # what verl's registry calls trainer.SavingTrainer
STOP_FILE = ".stop"  # in the run: the trainer saves after the step it is in, and ends


def server_name(rank: int) -> str:
    """Name of the Ray actor that serves the replica of the hf rollout."""
    return f"hf_server_{rank}_0"


def newest(folder: Path) -> int:
    """verl's step of the newest whole state; 0 where there is none."""
    whole = [path for path in folder.glob("global_step_*") if (path / COMPLETE).exists()]
    return max((int(path.name.rpartition("_")[2]) for path in whole), default=0)


def tidy(folder: Path, keep: int | None) -> int:
    """Remove incomplete and surplus states, let verl's marker name the newest; its step, 0 where none is left."""
    found: dict[int, Path] = {}
    for path in folder.glob("global_step_*"):
        if (path / COMPLETE).exists():
            found[int(path.name.rpartition("_")[2])] = path
        else:
            shutil.rmtree(path)
    for step in sorted(found)[: -keep if keep else 0]:
        shutil.rmtree(found.pop(step))
    newest = max(found, default=0)
    if newest:
        write_text(folder / LATEST, str(newest))
    else:
        (folder / LATEST).unlink(missing_ok=True)
    return newest
