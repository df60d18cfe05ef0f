"""verl's own SFT trainer, its Hydra tree and its data set, with one of our objectives in place of its loss:

    python -m eaft_verl.training.verl_sft ARGUMENTS OF verl.trainer.sft_trainer_ray +objective.name=eaft

Parameters follow as `+objective.power=2`. For objectives that need nothing but the batch; the others run as arms of
`eaft train`. As in an arm, the first loss is compared with the definitions. `val/loss` is plain cross-entropy, whatever
the objective, so that runs compare. On a CPU set VERL_PLATFORM=cpu and VERL_ENGINE_DEVICE=cuda.
"""

import sys
from collections.abc import Callable
from typing import Any

import hydra
import ray
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.sft_trainer_ray import SFTTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.device import auto_set_device

from eaft_verl.errors import ConfigError, require
from eaft_verl.recipe.objective import build_stateless
from eaft_verl.training.sft.loss import BATCH_FLAGS, TokenLoss
from eaft_verl.training.verl_cpu.private import require_version


class StockLoss(TokenLoss):
    """A TokenLoss for verl's own worker, which reads no table of tokens."""

    def _loss(self, model_output: dict[str, Tensor], data: TensorDict) -> Tensor:
        loss = super()._loss(model_output, data)
        self.table.clear()
        return loss

    def _total(self, values: dict[str, Tensor], weight_T: Tensor, *rest: Any) -> Tensor:
        return super()._total(values, weight_T if torch.is_grad_enabled() else torch.ones_like(weight_T), *rest)


class ObjectiveTrainer(SFTTrainer):
    """verl's trainer; the loss of its workers and the flags of its batches are ours."""

    def _build_engine(self) -> None:
        super()._build_engine()
        self.loss_fn = stock_loss(self.config)
        self.training_client.set_loss_fn(loss_fn=self.loss_fn)
        for name in ("train_batch", "infer_batch"):
            setattr(self.training_client, name, flagged(getattr(self.training_client, name)))


def flagged(call: Callable[[TensorDict], Any]) -> Callable[[TensorDict], Any]:
    """The same call for a batch that carries what our loss asks of it."""

    def forward(data: TensorDict) -> Any:
        for name in ("sample_weight", "row_weight"):
            data[name] = torch.ones(data.batch_size)
        tu.assign_non_tensor(data, **BATCH_FLAGS)
        return call(data)

    return forward


def stock_loss(config: Any) -> StockLoss:
    """The objective of `+objective.*`; ConfigError for one that cannot run here, or settings that would hide it."""
    params: Any = OmegaConf.to_container(OmegaConf.create(config.get("objective") or {}), resolve=True)
    require(isinstance(params.get("name"), str), "objective.name is missing: add e.g. +objective.name=eaft")
    strategy, pad_mode = config.engine.get("strategy"), config.data.pad_mode
    require(strategy in ("fsdp", "fsdp2"), f"engine.strategy={strategy!r} has no hook for our loss; use fsdp or fsdp2")
    require(pad_mode == "no_padding", f"data.pad_mode={pad_mode!r} must be no_padding")
    require(not config.model.get("use_fused_kernels"), "model.use_fused_kernels=true hides the logits; set it to false")
    require(not config.engine.get("pad_to_length"), "engine.pad_to_length=true moves tokens; set it to false")
    try:
        return StockLoss(build_stateless(**params))
    except ValueError as error:
        raise ConfigError(str(error)) from None


@hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None)
def main(config: Any) -> None:
    """Check, then train."""
    try:
        require_version()
        stock_loss(config)
    except ConfigError as error:
        print(f"verl_sft: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    auto_set_device(config)
    ray.init()
    ObjectiveTrainer(config=config).fit()


if __name__ == "__main__":
    main()
