"""verl's FSDP2 engine for GRPO's workers, whose states are DCP's; an SFT arm's worker sets that itself."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import merged_lora_context, normalize_peft_param_name, offload_fsdp_model_to_cpu
from verl.utils.model import convert_weight_keys
from verl.utils.torch_dtypes import PrecisionType
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

    def _build_lora_module(self, module: Any) -> Any:
        torch.manual_seed(self.engine_config.seed)  # as an SFT arm's worker does; verl draws the same adapter always
        return super()._build_lora_module(module)

    def _merged_lora_per_tensor_param(self) -> Iterator[tuple[str, Tensor]]:
        """Base plus adapter for the rollout, in the dtype that the policy computes in.

        verl rounds to bfloat16 whatever that is: under float32 the policy that samples would not be the one trained.
        """
        precision = self.engine_config.mixed_precision or {}
        dtype = PrecisionType.to_dtype(precision.get("param_dtype", "bf16"))
        try:
            with merged_lora_context(self.module, backup_adapters=True):
                weights = convert_weight_keys(normalize_peft_param_name(self.module.state_dict()), self.module)
                for name, weight in weights.items():
                    here: Any = weight.to(get_device_id()) if isinstance(weight, DTensor) else weight
                    whole = here.full_tensor() if isinstance(here, DTensor) else here.detach()
                    yield name, whole.to(dtype, copy=True)  # the storage is given the base's values back at the end
        finally:
            if self._is_offload_param:
                offload_fsdp_model_to_cpu(self.module)
