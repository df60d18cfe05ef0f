"""A model's own answers to the prompts of a data set, token by token as it wrote them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eaft_verl.data.parquet import Example
from eaft_verl.evaluation.drift import make_probe
from eaft_verl.evaluation.loading import load_model, release
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.files import write_jsonl
from eaft_verl.runs import Run, answers_file

SHOWN, LONGEST = 4, 256  # held-out prompts that are answered, tokens of an answer at most


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: temperature 0 is greedy; top_p 1 leaves no token out; at most new_tokens each."""

    temperature: float
    top_p: float
    new_tokens: int
    seed: int


def write_answers(run: Run, step: int, model: Any, tokenizer: Any, examples: Sequence[Example]) -> None:
    """Greedy answers to the first SHOWN held-out prompts, for people to read, in samples/STEP/answers.jsonl.

    Rows: {id, prompt, target, response, cut}; an answer may have twice the tokens of the longest target, LONGEST at
    most, and `cut` says that it did not end by itself.
    """
    chosen = [one for one in examples if len(one.messages) > 1][:SHOWN]
    if not chosen:
        return
    room = min(LONGEST, 2 * max(sum(one.loss_mask) for one in chosen))
    given = made_again(model, tokenizer, chosen, room)
    ends = model.generation_config.eos_token_id
    rows = [
        {
            "id": one.id,
            "prompt": next((turn["content"] for turn in reversed(one.messages[:-1]) if turn["role"] == "user"), ""),
            "target": one.messages[-1]["content"],
            "response": own.messages[-1]["content"],
            "cut": own.input_ids[-1] not in (ends if isinstance(ends, list) else [ends]),
        }
        for one, own in zip(chosen, given, strict=True)
    ]
    write_jsonl(answers_file(run.path, step), rows)


def made_again(
    model: Any, tokenizer: Any, examples: Sequence[Example], new_tokens: int, **sampling: Any
) -> Sequence[Example]:
    """The examples with the model's own last turn instead of theirs."""
    prompts = [
        {
            "id": example.id,
            "messages": example.messages[:-1],
            "tools": example.tools,
            "chat_template_kwargs": example.chat_template_kwargs,
        }
        for example in examples
    ]
    return make_probe(model, tokenizer, prompts, new_tokens, **sampling)


class Writer:
    """The model, loaded at the first answer that is asked for."""

    def __init__(self, model: Path | str, settings: EvaluateSettings, sampling: Sampling) -> None:
        self.model, self.settings, self.sampling = model, settings, sampling
        self.loaded: tuple[Any, Any] | None = None

    def answers(self, examples: Sequence[Example], number: int) -> Sequence[Example]:
        """The examples with the model's own last turn instead of theirs; `number`: of this part, for its seed."""
        if self.loaded is None:
            self.loaded = load_model(self.model, self.settings)
        drawn: dict[str, Any] = {
            "do_sample": True,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": 0,
        }
        torch.manual_seed(self.sampling.seed + number)
        how = drawn if self.sampling.temperature > 0 else {}
        model, tokenizer = self.loaded
        return made_again(model, tokenizer, examples, self.sampling.new_tokens, **how)

    def close(self) -> None:
        """Free the model."""
        self.loaded = None
        release()
