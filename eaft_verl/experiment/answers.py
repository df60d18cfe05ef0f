"""What a model says instead of the data: its own answers to the same prompts, or the rollouts of a GRPO run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_verl.data.encode import render
from eaft_verl.data.parquet import Example, read_examples, write_examples
from eaft_verl.errors import DataError
from eaft_verl.files import computed_once, read_jsonl
from eaft_verl.models import resolve_model
from eaft_verl.recipe.config import Config, plain
from eaft_verl.recipe.views import evaluate_settings
from eaft_verl.runs import Run

if TYPE_CHECKING:
    from eaft_verl.evaluation.answers import Sampling

PART = 64  # prompts that are answered before their answers are kept
ROLLOUTS = "rollouts.jsonl"


def own_answers(
    config: Config, examples: Sequence[Example], sampling: "Sampling", keys: dict[str, str], folder: Path
) -> list[Example]:
    """The model's answers to the prompts of `examples`, kept in `folder` part by part."""
    from eaft_verl.evaluation.answers import Writer

    writer = Writer(resolve_model(config.model), evaluate_settings(config), sampling)
    key = json.dumps([keys, asdict(sampling)], sort_keys=True)
    answers: list[Example] = []
    for number, start in enumerate(range(0, len(examples), PART)):
        chosen = examples[start : start + PART]

        def make(empty: Path, chosen: Sequence[Example] = chosen, number: int = number) -> None:
            write_examples(empty / "answers.parquet", writer.answers(chosen, number))

        made = computed_once(folder / f"{start:06d}-{start + len(chosen):06d}", key, make)
        answers += read_examples(made / "answers.parquet")
    writer.close()
    return answers


def rollouts_of(config: Config, path: Path, tokenizer: Any, template: str, vocab: int) -> list[Example]:
    """The kept rollouts of a GRPO run as examples whose response is trained.

    DataError where there are none, or the run speaks another chat template or vocabulary than the configuration's.
    """
    rows = read_jsonl(path / ROLLOUTS)
    if not rows:
        raise DataError(f"--rollouts {path} holds no {ROLLOUTS}: give the folder of a run with trainer: grpo")
    if (theirs := Run(path).info["keys"]["template"]) != template:
        raise DataError(
            f"--rollouts {path} was made with another tokenizer or chat template ({theirs[:16]}, {config.model} has "
            f"{template[:16]}); analyze a model of the same family"
        )
    kwargs = plain(config.data.chat_template_kwargs)
    examples = []
    for number, row in enumerate(rows):
        if missing := {"step", "prompt", "response", "tokens"} - row.keys():
            raise DataError(
                f"{path / ROLLOUTS}:{number + 1} has no {', '.join(sorted(missing))}: not a run of this version"
            )
        if max(row["tokens"], default=0) >= vocab:
            raise DataError(f"{path / ROLLOUTS}:{number + 1} holds token {max(row['tokens'])} of {vocab}")
        text = render(tokenizer, row["prompt"], generate=True, kwargs=kwargs)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        messages = [*row["prompt"], {"role": "assistant", "content": row["response"]}]
        mask = [0] * len(ids) + [1] * len(row["tokens"])
        name = f"step{row['step']}-{number}"
        examples.append(Example(name, messages, ids + row["tokens"], mask, chat_template_kwargs=kwargs))
    return examples
