"""What verl's checkpoints become: a Hugging Face folder at every evaluation point, and states to resume."""

import shutil
from pathlib import Path
from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from eaft_verl.files import write_json
from eaft_verl.training.export import HF_FOLDER, export_state
from eaft_verl.training.grpo.states import COMPLETE, tidy


class ExportCallback(CheckpointCallback):
    """Called by verl after every save. `trainer.eaft`: a Schedule's fields, run, model, dtype, updates, keep."""

    def on_save(
        self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs: Any
    ) -> None:
        """Move the exported model to the run; the rest is a state to resume, except of the last step.

        Where the export fails the state stays, with the weights that it failed on: `export_state` at the next start.
        """
        ours, folder = self.config.trainer.eaft, Path(checkpoint_dir)
        write_json(folder / COMPLETE, {"step": global_step})  # a state to go on from, whatever becomes of the export
        if global_step in ours.points:
            export_state(folder, Path(ours.run), global_step * ours.updates, ours.model, ours.dtype, list(ours.ends))
        if global_step < ours.steps:
            shutil.rmtree(folder / HF_FOLDER)
        else:
            shutil.rmtree(folder)
        tidy(folder.parent, ours.keep)
