"""Around an optimizer's step: whether it was made, at which rate, and the pull of an l2 anchor."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from eaft_verl.training.sft.loss import TokenLoss


class Update:
    """Hooks of one optimizer. `begin` before a batch, `metrics` after it. Steps are collective, metrics are not."""

    def __init__(self, optimizer: torch.optim.Optimizer, group: Any) -> None:
        self.optimizer, self.group = optimizer, group
        self.start: list[Tensor] = []
        self.coef = self.distance = 0.0
        self.begun = False  # a saved state is loaded into an optimizer by a step of it that is none of training's
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def hold(self, coef: float) -> None:
        """Keep the weights as they are now; from here on each step pulls towards them (objectives/anchors.py, l2)."""
        self.start, self.coef = [weight.detach().clone() for weight in self._weights()], coef

    def begin(self, loss: Any) -> None:
        """Before a batch whose loss this is. verl skips the step where the gradient is not finite."""
        self.loss, self.begun, self.made, self.factor = loss, True, False, 1.0
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def metrics(self) -> dict[str, float]:
        """lr of this step, its factor where an objective sets one, and the distance from the start where it is held."""
        found = {"lr": self.rates[0] * self.factor}  # verl reports the next step's
        if _sets_rates(self.loss):
            found["step_factor"] = self.factor
        if self.start:
            found["anchor_l2"] = self.distance
        return found

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def _before(self, *_: Any) -> None:
        if self.begun and _sets_rates(self.loss):
            self.factor = self.loss.objective.step_factor(self.loss.table.mean_nll(self.group))
            for group in self.optimizer.param_groups:
                group["lr"] *= self.factor

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if not self.begun:
            return
        self.begun, self.made = False, True
        start = iter(self.start)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if self.start:
                for weight in group["params"]:
                    local(weight).lerp_(local(next(start)), min(1.0, group["lr"] * self.coef))
            group["lr"] = rate
        if self.start:
            self.distance = self._distance()

    def _distance(self) -> float:
        """|theta - theta_0|_2 over all weights; shards are summed, and copies of a shard counted once."""
        squares = [
            (local(weight) - local(start)).float().square().sum().double() / _copies(weight)
            for weight, start in zip(self._weights(), self.start, strict=True)
        ]
        total = torch.stack(squares).sum()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        return float(total.sqrt())


def _sets_rates(loss: Any) -> bool:
    return isinstance(loss, TokenLoss) and loss.objective.sets_rates


def _copies(weight: Tensor) -> int:
    """Ranks that hold the same part of a weight."""
    if not isinstance(weight, DTensor):
        return dist.get_world_size() if dist.is_initialized() else 1
    sizes = [weight.device_mesh.size(i) for i, kind in enumerate(weight.placements) if isinstance(kind, Replicate)]
    return int(torch.tensor(sizes, dtype=torch.int64).prod())


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
