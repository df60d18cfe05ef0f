"""verl's FSDP2 engine on CPU, where a frozen reference cannot be offloaded from pinned memory."""

from typing import Any

from verl.workers.engine import EngineRegistry

from eaft_verl.attention import packed
from eaft_verl.attention.tree import each_once
from eaft_verl.training.engine import SavingEngine
from eaft_verl.training.verl_cpu.private import unpinned_offload


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cpu"])
class CpuEngine(SavingEngine):
    """Chosen with VERL_ENGINE_DEVICE=cpu."""

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, given = super().prepare_model_inputs(micro_batch)
        return each_once(self.module, inputs, micro_batch["input_ids"].offsets()), given

    def _build_fsdp_module(self, module: Any) -> Any:
        packed.register()
        with unpinned_offload():
            return super()._build_fsdp_module(module)
