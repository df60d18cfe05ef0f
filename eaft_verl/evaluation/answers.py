"""A model's own answers to the prompts of a data set, token by token as it wrote them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eaft_verl.data.parquet import Example
from eaft_verl.evaluation.drift import make_probe
from eaft_verl.evaluation.harness import load_model, release
from eaft_verl.evaluation.settings import EvaluateSettings


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: temperature 0 is greedy; top_p 1 leaves no token out; at most new_tokens each."""

    temperature: float
    top_p: float
    new_tokens: int
    seed: int


class Writer:
    """The model, loaded at the first answer that is asked for."""

    def __init__(self, model: Path | str, settings: EvaluateSettings, sampling: Sampling) -> None:
        self.model, self.settings, self.sampling = model, settings, sampling
        self.loaded: tuple[Any, Any] | None = None

    def answers(self, examples: Sequence[Example], number: int) -> Sequence[Example]:
        """The examples with the model's own last turn instead of theirs; `number`: of this part, for its seed."""
        if self.loaded is None:
            self.loaded = load_model(self.model, self.settings)
        prompts = [
            {
                "id": example.id,
                "messages": example.messages[:-1],
                "tools": example.tools,
                "chat_template_kwargs": example.chat_template_kwargs,
            }
            for example in examples
        ]
        drawn: dict[str, Any] = {
            "do_sample": True,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": 0,
        }
        torch.manual_seed(self.sampling.seed + number)
        how = drawn if self.sampling.temperature > 0 else {}
        model, tokenizer = self.loaded
        return make_probe(model, tokenizer, prompts, self.sampling.new_tokens, **how)

    def close(self) -> None:
        """Free the model."""
        self.loaded = None
        release()
