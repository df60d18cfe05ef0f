"""What verl's checkpoints become: a Hugging Face folder at every evaluation point, and states to resume."""

import shutil
from pathlib import Path
from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from eaft_verl.errors import RunError
from eaft_verl.runs import Run, step_name
from eaft_verl.training import states
from eaft_verl.training.grpo.states import mark_newest
from eaft_verl.training.saved_model import export_saved


class ExportCallback(CheckpointCallback):
    """Called by verl after every save. `trainer.eaft`: a Schedule's fields, run, model, dtype, updates, keep."""

    def on_save(
        self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs: Any
    ) -> None:
        """Seal the state and export the model at a point; that of the last step goes then, because nothing follows it.

        Where the export fails the state stays, and the next start exports from it.
        """
        ours, folder = self.config.trainer.eaft, Path(checkpoint_dir)
        run, step = Run(ours.run), global_step * ours.updates
        bad = states.nonfinite_in(folder)
        if bad and global_step in ours.points:
            raise RunError(f"step {step}: {bad} is not finite, so there is no model to export; lower verl.optim.lr")
        if not bad:
            states.seal(folder, run, global_step, step, {}, ours.world_size)  # whatever becomes of the export
        if global_step in ours.points:
            target = run.path / "checkpoints" / step_name(step)
            if not (target / "config.json").exists():
                export_saved(folder / "actor", target, ours.model, self._settings(), ours.dtype, list(ours.ends))
        if bad or global_step == ours.steps:
            shutil.rmtree(folder)
        states.retain(run.path, ours.keep)
        mark_newest(run.path)

    def _settings(self) -> dict[str, Any]:
        shared = self.config.actor_rollout_ref
        return {**shared.model, "model_dtype": shared.actor.fsdp_config.model_dtype}
