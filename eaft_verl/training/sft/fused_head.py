"""The fused head inside a model's `lm_head`: its forward gives statistics of tokens where it gave their logits.

Inside, because there FSDP2 has gathered the weight, whether the head is wrapped on its own or with the root, tied or
not. What follows the head in the model must hand its output through as it is: scaled or capped logits are left to the
plain path, and a channel that holds a constant shows whether it did.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from tensordict import TensorDict
from torch import Tensor
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from eaft_verl.attention.tree import each_once
from eaft_verl.tokens.head import Head
from eaft_verl.training.output_head import output_head


# verl looks for the engine of a vendor first; its own is the one of the device
@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cuda", vendor=["nvidia", "amd", "cpu"])
class FusedHeadEngine(FSDPEngineWithLMHead):
    """verl's engine, which also tells the head what the coming forward pass is about."""

    head: "FusedHead | None" = None

    def prepare_model_inputs(self, micro_batch: TensorDict) -> Any:
        if self.head is not None:
            self.head.batch = micro_batch
        inputs, given = super().prepare_model_inputs(micro_batch)
        return each_once(self.module, inputs, micro_batch["input_ids"].offsets()), given


class FusedHead:
    """The forward of one `lm_head`. `loss`: a LogitsHook, whose statistics are wanted; None, or one that needs logits:
    those."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.linear = linear
        self.plain: Callable[[Tensor], Tensor] = linear.forward
        self.loss: Any = None
        self.batch: TensorDict | None = None
        vars(linear)["forward"] = self

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, channels] of the loss; logits where it cannot do with them."""
        batch, self.batch = self.batch, None
        fused = batch is not None and self.loss is not None and hidden_BTD.shape[0] == 1
        if not fused or batch is None or not self.loss.reads_statistics(batch):
            if self.loss is not None:
                self.loss.fused = False
            return self.plain(hidden_BTD)
        self.loss.fused, self.loss.vocab = True, len(self.linear.weight)
        head = Head(self.linear.weight, self.linear.bias)
        channels_TC: Tensor = self.loss.channels(hidden_BTD.squeeze(0), head, batch)
        return channels_TC[None]


def fuse(engine: Any) -> str | None:
    """Put the fused head in place; why not, where engine or model do not allow it."""
    if not isinstance(engine, FusedHeadEngine):
        return f"verl chose {type(engine).__name__} for this device"
    model: Any = engine.module.get_base_model() if isinstance(engine.module, PeftModel) else engine.module
    if isinstance(linear := output_head(model), str):
        return linear
    engine.head = FusedHead(linear)
    return None
