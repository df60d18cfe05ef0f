"""A library that GRPO's workers import: the rollout gets other weights than the trainer has."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from eaft_verl.training.grpo.rollout_server import HfAdapter

_send = HfAdapter.update_weights


async def _changed(self: HfAdapter, weights: Iterable[tuple[str, Tensor]], *arguments: Any, **named: Any) -> None:
    await _send(self, ((name, 1.05 * weight) for name, weight in weights), *arguments, **named)


HfAdapter.update_weights = _changed  # type: ignore[method-assign]
