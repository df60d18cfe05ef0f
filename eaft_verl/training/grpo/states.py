"""verl's word for where a GRPO run goes on: a file beside the states, which this project's manifests decide."""

from pathlib import Path

from eaft_verl.files import write_text
from eaft_verl.training import states

LATEST = "latest_checkpointed_iteration.txt"
CAUSE_FILE = "rollout_error.txt"  # in the run: why a response could not be made
TRAINER = "eaft_sync"  # what verl's registry calls trainer.SavingTrainer
MAKER = "eaft"  # of devices, for which verl's registry gives engine.SavingEngine
STOP_FILE = ".stop"  # in the run: the trainer saves after the step it is in, and ends


def server_name(rank: int) -> str:
    """Name of the Ray actor that serves the replica of the hf rollout."""
    return f"hf_server_{rank}_0"


def mark_newest(run: Path) -> int:
    """Let verl's marker name the newest whole state; its number, 0 where there is none."""
    newest = max(states.whole(run), default=0)
    marker = run / states.FOLDER / LATEST
    if newest:
        write_text(marker, str(newest))
    else:
        marker.unlink(missing_ok=True)
    return newest
