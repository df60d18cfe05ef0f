"""verl's word for where a GRPO run goes on: a file beside the states, which this project's manifests decide."""

from pathlib import Path

from eaft_verl.errors import RunError
from eaft_verl.files import write_text
from eaft_verl.training import states

LATEST = "latest_checkpointed_iteration.txt"
CAUSE_FILE = "rollout_error.txt"  # in the run: why a response could not be made
TRAINER = "eaft_sync"  # what verl's registry calls trainer.SavingTrainer
MAKER = "eaft"  # of devices, for which verl's registry gives engine.SavingEngine
CHECK_FILE = ".self_check.json"  # in the run: what the trainer found before its first step, until the driver has it
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


def require_inert(state: Path) -> None:
    """RunError for a pickle in a state that would run code: verl reads its own data.pt without asking.

    torch's switch for all of a process will not do: Ray's workers exchange tensors as pickles of other classes.
    """
    import torch

    for file in sorted(state.rglob("*.pt")):
        try:
            torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # whatever its bytes lead to
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise RunError(
                f"{file} is not read, because it holds more than numbers: {reason}; delete {state}"
            ) from None
