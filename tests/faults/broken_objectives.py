"""Objectives that fail where they are computed, in the workers."""

from dataclasses import dataclass
from typing import Any

from eaft_verl.objectives import Objective, Sft


@dataclass(frozen=True)
class NoMemory(Sft):
    """As if its micro-batch did not fit."""

    def weight(self, stats: Any) -> Any:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@dataclass(frozen=True)
class Faulty(Sft):
    """As if somebody had made a mistake."""

    def weight(self, stats: Any) -> Any:
        raise IndexError("index out of range in self")


@dataclass(frozen=True, kw_only=True)
class NoWeight(Objective):
    """As it is left by who starts from the base class."""


@dataclass(frozen=True)
class OneNumber(Sft):
    """The mean of what should be a weight for each token."""

    def weight(self, stats: Any) -> Any:
        return stats.entropy_T.mean()
