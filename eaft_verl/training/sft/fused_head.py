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

from eaft_verl.tokens.head import Head, head_statistics
from eaft_verl.training.output_head import output_head
from eaft_verl.training.sft.guard import check_head
from eaft_verl.training.sft.loss import TokenLoss, channels, local_shard, shifted


# verl looks for the engine of a vendor first; its own is the one of the device
@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cuda", vendor=["nvidia", "amd", "cpu"])
class FusedHeadEngine(FSDPEngineWithLMHead):
    """verl's engine, which also tells the head what the coming forward pass is about."""

    head: "FusedHead | None" = None

    def prepare_model_inputs(self, micro_batch: TensorDict) -> Any:
        if self.head is not None:
            self.head.batch = micro_batch
        return super().prepare_model_inputs(micro_batch)


class FusedHead:
    """The forward of one `lm_head`. `loss`: whose statistics are wanted; None, or one that needs logits: those."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.linear = linear
        self.plain: Callable[[Tensor], Tensor] = linear.forward
        self.loss: Any = None
        self.batch: TensorDict | None = None
        vars(linear)["forward"] = self

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, channels] of the loss; logits where it cannot do with them."""
        batch, self.batch = self.batch, None
        fused = batch is not None and isinstance(self.loss, TokenLoss) and hidden_BTD.shape[0] == 1
        if not fused or batch is None or not self.loss.reads_statistics(batch):
            if self.loss is not None:
                self.loss.fused = False
            return self.plain(hidden_BTD)
        self.loss.fused, self.loss.vocab = True, len(self.linear.weight)
        return self._statistics(hidden_BTD.squeeze(0), batch)[None]

    def _statistics(self, hidden_TD: Tensor, batch: TensorDict) -> Tensor:
        loss, head = self.loss, Head(self.linear.weight, self.linear.bias)
        labels_T, mask_T = (local_shard(part, batch) for part in shifted(batch))
        objective = loss.objective
        stats = head_statistics(
            hidden_TD,
            head,
            labels_T,
            mask_T,
            gate=loss.gate(batch, loss.vocab),
            k=objective.k,
            **objective.extras,
        )
        if not loss.guarded:
            check_head(stats, hidden_TD, head, labels_T, mask_T, objective)
        return channels(stats, loss.vocab)


def fuse(engine: Any) -> str | None:
    """Put the fused head in place; why not, where engine or model do not allow it."""
    if not isinstance(engine, FusedHeadEngine):
        return f"verl chose {type(engine).__name__} for this device"
    model: Any = engine.module.get_base_model() if isinstance(engine.module, PeftModel) else engine.module
    if isinstance(linear := output_head(model), str):
        return linear
    engine.head = FusedHead(linear)
    return None
