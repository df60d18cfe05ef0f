"""An arm with `average`: nothing is trained, one model per weight is written as if it were a step."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eaft_verl.errors import DiskFull, RunError
from eaft_verl.evaluation.model_files import local_folder
from eaft_verl.experiment.chain import Checkpoint
from eaft_verl.models import resolve_model
from eaft_verl.recipe.config import Config
from eaft_verl.runs import Run, step_name

GIB = 1024**3


def average_arm(config: Config, run: Run, made_of: Sequence[Checkpoint]) -> dict[str, Any]:
    """Write the averages that are not there yet; the fields of a finished run.json besides its status.

    Step n of the run is the n-th weight, ascending; `average` says which. Made anew where an earlier attempt ended.
    """
    from eaft_verl.training.average import average_weights  # torch takes seconds

    started, tuned = time.monotonic(), made_of[0].folder
    other = made_of[1].folder if len(made_of) > 1 else _folder_of(config.model)
    weights = sorted(map(float, config.average["weights"]))
    _require_room(run.path, tuned, len(weights) - len(run.checkpoints()))
    for step, weight in enumerate(weights, 1):
        target = run.path / "checkpoints" / step_name(step)
        if not (target / "config.json").exists():
            average_weights(tuned, other, weight, target)
            print(f"[{config.arm}] step {step}: {weight:g} {config.average['of']}, the rest {config.average['with']}")
    parts = {name: config.average[name] for name in ("of", "with")}
    seconds = time.monotonic() - started
    return {
        "total_steps": len(weights),
        "train_seconds": seconds,
        "workers": 1,
        "average": {**parts, "weights": {str(step): weight for step, weight in enumerate(weights, 1)}},
    }


def _require_room(run: Path, tuned: Path, count: int) -> None:
    """DiskFull unless so many more models as `tuned` find room."""
    needed = count * sum(file.stat().st_size for file in tuned.iterdir())
    if needed > (free := shutil.disk_usage(run).free):
        raise DiskFull(
            f"{count} averages need {needed / GIB:.1f} GiB and {run} has {free / GIB:.1f} free; delete what is not "
            "needed there, or ask for fewer weights"
        )


def _folder_of(model: str) -> Path:
    resolved = resolve_model(model)
    folder = resolved if isinstance(resolved, Path) else local_folder(resolved)
    if folder is None:
        raise RunError(f"model={model!r} is not in the local cache; download it: hf download {model}")
    return folder
