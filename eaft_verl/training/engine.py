"""verl's FSDP2 engine for GRPO's workers, whose states are DCP's; an SFT arm's worker sets that itself."""

from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from eaft_verl.training.dcp import DcpCheckpoints
from eaft_verl.training.grpo.states import MAKER


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cuda"], vendor=[MAKER])
class SavingEngine(FSDPEngineWithLMHead):
    """Found before verl's own, and before an SFT arm's, where VERL_ENGINE_VENDOR asks for it."""

    def initialize(self) -> None:
        super().initialize()
        if self.optimizer is not None:  # a frozen reference has nothing to save
            self.checkpoint_manager = DcpCheckpoints(self.module, self.optimizer, self.lr_scheduler)
