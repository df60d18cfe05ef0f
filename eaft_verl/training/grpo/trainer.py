"""verl's synchronous PPO trainer, which also saves by time and before it is stopped."""

import time
from pathlib import Path
from typing import Any

from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer

from eaft_verl.files import write_json
from eaft_verl.training.grpo.self_check import self_check
from eaft_verl.training.grpo.states import CHECK_FILE, STOP_FILE, TRAINER
from eaft_verl.training.stacks import write_stacks_when_asked

write_stacks_when_asked()


@register_trainer(TRAINER)
class SavingTrainer(PPOTrainerSync):
    """Saves where `trainer.eaft` (a Schedule and `run`) wants it; verl's own `save_freq` is off."""

    def __init__(self, config: Any) -> None:
        config.trainer.v1.trainer_mode = "sync"  # verl asks for the mode by this name in many places
        super().__init__(config)
        self.saved = time.monotonic()

    def on_init_end(self) -> None:
        """Check that rollout and trainer are one model; the rollout, asleep after it, gets the weights once more."""
        super().on_init_end()
        write_json(Path(self.config.trainer.eaft.run) / CHECK_FILE, self_check(self))
        super().on_init_end()

    def on_step_end(self) -> None:
        """Save when a save is due. After a stop request the step is logged as any other and no further one begins."""
        step, ours = self.global_steps, self.config.trainer.eaft
        stopping = (Path(ours.run) / STOP_FILE).exists()
        due = stopping or step in ours.saves or time.monotonic() - self.saved >= ours.save_seconds
        if step in ours.points or (due and step < ours.steps):
            with marked_timer("save_checkpoint", self.timing_raw):
                self._save_checkpoint()
            self.saved = time.monotonic()
        if stopping:
            self.total_training_steps = step
        super().on_step_end()
