"""log p of the model as it was a few updates ago, for objectives with a trust region (PSFT)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eaft_verl.training.sft.order import PADDING


class OldPolicy:
    """`refresh` before each step; `tokens(index)` then gives old_logprob of an example of that step.

    `state` is the trainer's and survives a restart: between two refreshes the old model exists nowhere else.
    """

    def __init__(self, every: int, state: dict[str, Any]) -> None:
        self.every, self.state = every, state

    def refresh(self, step: int, rows_of: Callable[[int], list[int]], infer: Callable[[list[int]], Any]) -> None:
        """At the first of each `every` steps: one forward pass over the rows of these steps."""
        if (step - 1) % self.every:
            return
        old: dict[str, Sequence[float]] = {}
        for rows in map(rows_of, range(step, step + self.every)):
            for index, nll in zip(rows, infer(rows)["nll"].unbind(), strict=True):
                if index != PADDING:
                    old[str(index)] = (-nll).tolist()
        self.state["old_logprobs"] = old

    def tokens(self, index: int) -> dict[str, Tensor]:
        """old_logprob [length], nats; 0 where nothing is trained."""
        return {"old_logprob": torch.tensor(self.state["old_logprobs"][str(index)], dtype=torch.float32)}
