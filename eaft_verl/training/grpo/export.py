"""What verl's checkpoints become: a Hugging Face folder at every evaluation point, a resumable state on request."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from eaft_verl.files import write_json
from eaft_verl.runs import step_name
from eaft_verl.training.export import export_weights
from eaft_verl.training.grpo.states import COMPLETE, next_save, tidy


class ExportCallback(CheckpointCallback):
    """Called by verl after every save. `trainer.eaft`: run, model, dtype, updates, points, saves, keep.

    verl saves every `save_freq` steps; the steps that are wanted are not evenly spaced, so the next one is set here:
    step % n is 0 at n for the first time.
    """

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, **kwargs: Any) -> None:
        """Move the exported model to the run, keep or remove the rest, and set the step of the next save."""
        ours, folder = self.config.trainer.eaft, Path(checkpoint_dir)
        exported = folder / "actor" / "huggingface"
        if global_step in ours.points:
            target = Path(ours.run) / "checkpoints" / step_name(global_step * ours.updates)
            if not (target / "config.json").exists():
                export_weights(saved_weights(exported), target, ours.model, ours.dtype, write=True)
        if global_step in ours.saves:
            shutil.rmtree(exported)
            write_json(folder / COMPLETE, {"step": global_step})
        else:
            shutil.rmtree(folder)
        tidy(folder.parent, ours.keep)
        trainer.config.trainer.save_freq = next_save(global_step, [*ours.points, *ours.saves])


def saved_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a folder's safetensors files, one tensor in memory at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)
