"""What verl's checkpoints become: a Hugging Face folder at every evaluation point, and states to resume."""

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
from eaft_verl.training.grpo.states import COMPLETE, tidy


class ExportCallback(CheckpointCallback):
    """Called by verl after every save. `trainer.eaft`: a Schedule's fields, run, model, dtype, updates, keep."""

    def on_save(
        self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs: Any
    ) -> None:
        """Move the exported model to the run; the rest is a state to resume, except of the last step."""
        ours, folder = self.config.trainer.eaft, Path(checkpoint_dir)
        exported = folder / "actor" / "huggingface"
        if global_step in ours.points:
            target = Path(ours.run) / "checkpoints" / step_name(global_step * ours.updates)
            if not (target / "config.json").exists():
                export_weights(saved_weights(exported), target, ours.model, ours.dtype, write=True)
        if global_step < ours.steps:
            shutil.rmtree(exported)
            write_json(folder / COMPLETE, {"step": global_step})
        else:
            shutil.rmtree(folder)
        tidy(folder.parent, ours.keep)


def saved_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a folder's safetensors files, one tensor in memory at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)
