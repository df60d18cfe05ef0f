"""verl's FSDP2 engine for GRPO's workers, whose states are DCP's; an SFT arm's worker sets that itself."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import merged_lora_context, normalize_peft_param_name, offload_fsdp_model_to_cpu
from verl.utils.model import convert_weight_keys
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from eaft_verl.training.dcp import DcpCheckpoints
from eaft_verl.training.grpo.states import MAKER


def response_rows(micro_batch: Any) -> Tensor:
    """Places in the packed sequences whose logits predict the tokens of the responses, which end them; [N]."""
    ends, counts = micro_batch["input_ids"].offsets()[1:], micro_batch["responses"].offsets().diff()
    places = [torch.arange(end - count - 1, end - 1) for end, count in zip(ends.tolist(), counts.tolist(), strict=True)]
    return torch.cat(places).to(ends.device)


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cuda"], vendor=[MAKER])
class SavingEngine(FSDPEngineWithLMHead):
    """Found before verl's own, and before an SFT arm's, where VERL_ENGINE_VENDOR asks for it.

    The head is multiplied with the rows that predict a response's tokens, no others: verl forms logits, their softmax
    and the entropy's gradient for every token of the prompts too, and reads none of them.
    """

    def initialize(self) -> None:
        super().initialize()
        if self.optimizer is not None:  # a frozen reference has nothing to save
            self.checkpoint_manager = DcpCheckpoints(self.module, self.optimizer, self.lr_scheduler)

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, given = super().prepare_model_inputs(micro_batch)
        if "temperature_rmpad" in given and self._reads_responses_only(micro_batch):
            inputs["logits_to_keep"] = given["rows"] = response_rows(micro_batch)
        return inputs, given

    def _reads_responses_only(self, micro_batch: Any) -> bool:
        others = ("use_fused_kernels", "distillation_use_topk")  # these take the whole sequence
        if self.use_ulysses_sp or any(tu.get_non_tensor_data(micro_batch, name, False) for name in others):
            return False
        model = self.module.get_base_model() if hasattr(self.module, "get_base_model") else self.module
        told = "responses" in micro_batch.keys() and micro_batch["responses"].is_nested  # noqa: SIM118 - a TensorDict
        return told and "logits_to_keep" in inspect.signature(model.forward).parameters

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        if (rows := output_args.get("rows")) is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        kept = {name: output_args[name][rows] for name in ("input_ids_rmpad_rolled", "temperature_rmpad")}
        ids, counts = micro_batch["input_ids"], micro_batch["responses"].offsets()
        short = micro_batch.clone(recurse=False)
        short["input_ids"] = torch.nested.nested_tensor_from_jagged(ids.values()[rows], counts)
        found = super().prepare_model_outputs(
            output, output_args | kept | {"pad_size": 0}, short, logits_processor_func
        )
        return {
            name: torch.nested.nested_tensor_from_jagged(
                torch.zeros_like(ids.values(), dtype=part.dtype).index_copy(0, rows, part.values()), ids.offsets()
            )
            for name, part in found.items()
        }

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
