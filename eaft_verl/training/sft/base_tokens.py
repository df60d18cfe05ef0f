"""What the starting model said of each trained token, for objectives whose weights come from it (stats: base)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eaft_verl.data.parquet import Example
from eaft_verl.errors import RunError
from eaft_verl.tokens.stats import BaseStats
from eaft_verl.training.sft.anchor_cache import token_starts, trained_positions
from eaft_verl.training.sft.order import PADDING


class BaseTokens:
    """`tokens(index)` gives an example's part of the base model's pass; 4 bytes per token and name in memory."""

    def __init__(self, examples: Sequence[Example], base: BaseStats, names: Sequence[str]) -> None:
        if base.column is None:
            raise RunError("stats=base needs the base model's pass over the data, and this trainer has made none")
        self.examples, self.mean_nll, self.starts = examples, base.mean_nll, token_starts(examples)
        self.columns = {name: base.column(name).float() for name in names}
        for name, column in self.columns.items():
            if len(column) != self.starts[-1]:
                raise RunError(
                    f"the base model's pass holds {name} of {len(column)} tokens, the data {self.starts[-1]}"
                )

    def tokens(self, index: int) -> dict[str, Tensor]:
        """base_NAME [length] of each name; 0 where nothing is trained."""
        trained = torch.from_numpy(trained_positions(self.examples[index]))
        found = {}
        for name, column in self.columns.items():
            found[f"base_{name}"] = torch.zeros(len(trained))
            found[f"base_{name}"][trained] = column[self.starts[index] : self.starts[index + 1]]
        return found

    def median_nll(self, rows: Sequence[int]) -> float:
        """Median over these examples of their mean -log p(label), nats: TALR's tau of the base model."""
        return float(np.median([float(self.mean_nll[row]) for row in rows if row != PADDING]))
