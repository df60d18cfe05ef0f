"""verl's FSDP2 engine on CPU, where a frozen reference cannot be offloaded from pinned memory."""

from typing import Any

from verl.workers.engine import EngineRegistry

from eaft_verl.training import packed_attention
from eaft_verl.training.engine import SavingEngine
from eaft_verl.training.verl_cpu.private import unpinned_offload


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cpu"])
class CpuEngine(SavingEngine):
    """Chosen with VERL_ENGINE_DEVICE=cpu."""

    def _build_fsdp_module(self, module: Any) -> Any:
        packed_attention.register()
        with unpinned_offload():
            return super()._build_fsdp_module(module)
