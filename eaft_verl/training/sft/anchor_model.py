"""The frozen reference beside the model in the same worker: its logits for the micro-batch the model just saw.

Same mesh and same sequence-parallel group, so that both models' logits are shards of the same tokens and nothing
travels through Ray. Under LoRA the model without its adapter is the reference and no second one is loaded.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine import EngineRegistry

from eaft_verl.training.sft.fused_head import FusedHeadEngine
from eaft_verl.training.verl_cpu.private import frozen_engine


class Reference:
    """A second engine without optimizer. Called inside the model's own autocast; collective over the FSDP group."""

    def __init__(self, worker_config: Any) -> None:
        settings = worker_config.extra_context["reference"]
        # forward_only would force every shard through the host's memory in each micro-batch, and cannot run on CPU
        found = EngineRegistry.get_engine_cls(worker_config.model_type, settings["engine_config"].strategy)
        self.engine = frozen_engine(found, PrecisionType.to_dtype(settings["dtype"]))(
            model_config=settings["model_config"],
            engine_config=settings["engine_config"],
            optimizer_config=worker_config.optimizer_config,
            checkpoint_config=worker_config.checkpoint_config,
        )
        settings["engine_config"].use_remove_padding = worker_config.engine_config.use_remove_padding
        self.engine.initialize()
        self.engine.optimizer = self.engine.lr_scheduler = None  # never stepped: no state was made
        self.engine.module.eval().requires_grad_(False)

    def __call__(self, data: TensorDict) -> Tensor:
        """[T, V] logits of this rank's tokens, no graph."""
        with torch.no_grad():
            logits = micro_batch_logits(self.engine, data)
        self.engine.module.reshard()
        return logits


class AdapterOff:
    """The model itself without its LoRA adapter, dropout off."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __call__(self, data: TensorDict) -> Tensor:
        """[T, V] logits of this rank's tokens, no graph."""
        module = self.engine.module
        training = module.training
        module.eval()
        try:
            with torch.no_grad(), self.engine.disable_adapter():
                return micro_batch_logits(self.engine, data)
        finally:
            module.train(training)


def micro_batch_logits(engine: Any, data: TensorDict) -> Tensor:
    """What the engine's logits hook is given for this micro-batch: [T, V], packed, this rank's shard."""
    inputs, _ = engine.prepare_model_inputs(data)
    if isinstance(engine, FusedHeadEngine) and engine.head:
        engine.head.batch = None  # these logits are wanted whole
    logits = engine.module(**inputs, use_cache=False).logits
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    if tu.get_non_tensor_data(data, "use_remove_padding", True):
        return logits.squeeze(0)
    lengths = data["input_ids"].offsets().diff().tolist()
    return torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)])
