"""The fixed texts that the forgetting meter reads while an arm trains. Heavy imports happen where they are written."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eaft_verl.data.parquet import Example
from eaft_verl.evaluation.settings import DriftSettings, EvaluateSettings
from eaft_verl.models import model_key


def meter_probe(
    settings: EvaluateSettings, rows: int, new_tokens: int, model: Path | str, tokenizer: Any, work: Path
) -> Sequence[Example]:
    """The first rows of the texts of `drift` with the base's own greedy answers, or their own where they have some.

    The answers are kept in `work`; where they are not there yet, this process loads `model`, the base, to write them.
    """
    from eaft_verl.evaluation import drift

    wanted = replace(settings.drift_settings() or DriftSettings(), rows=rows, new_tokens=new_tokens)
    prompts = drift.prompts_of(wanted, settings.chat_template_kwargs)
    if drift.has_answers(prompts):
        return drift.given_probe(tokenizer, prompts, wanted, settings.max_length)

    def load() -> Any:
        from eaft_verl.evaluation.loading import load_model

        return load_model(model, settings)[0]

    return drift.own_answers(work, model_key(model), tokenizer, prompts, new_tokens, load)
