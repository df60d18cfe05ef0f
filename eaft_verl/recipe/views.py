"""What the rooms below take from a resolved configuration, each in its own terms."""

import json
from pathlib import Path
from typing import Any

from eaft_verl.data.spec import DataSpec
from eaft_verl.errors import ConfigError
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.objectives import Objective
from eaft_verl.recipe.config import Config, plain
from eaft_verl.recipe.objective import build_objective


def objective_of(config: Config) -> Objective:
    """The arm's objective object; ConfigError lists what exists for an unknown name or parameter."""
    params = dict(plain(config.objective) or {})
    if not isinstance(name := params.pop("name", None), str):
        raise ConfigError("objective.name is missing, e.g. objective: {name: eaft}")
    try:
        return build_objective(name, **params)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def data_spec(config: Config, which: str = "train") -> DataSpec:
    """How one of the recipe's data sets ('train' or 'heldout') is to be prepared."""
    data = config.data
    return DataSpec(
        source=source_of(config, which),
        max_length=data.max_length,
        over_long=data.over_long,
        control_tokens=data.control_tokens,
        turns=data.turns,
        rows=data.rows if which == "train" else data.heldout_rows,
        columns=plain(data.columns),
        chat_template_kwargs=plain(data.chat_template_kwargs),
    )


def source_of(config: Config, which: str) -> Any:
    """What the recipe names as its 'train' or 'heldout' data; None where it names nothing."""
    return plain(config.data.train if which == "train" else config.data.heldout)


def world_size(config: Config) -> int:
    """Workers of the arm's training."""
    return config.verl.trainer.nnodes * config.verl.trainer.n_gpus_per_node


def evaluate_settings(config: Config, heldout: Path | None = None) -> EvaluateSettings:
    """The `evaluate` block as the evaluation package takes it; `heldout`: the prepared file, once there is one."""
    block = plain(config.evaluate)
    block.pop("points")
    block["backend_args"] = block["backend_args"] or {}
    named, arguments = source_of(config, "heldout"), plain(config.data.chat_template_kwargs)
    source = str(heldout) if heldout else named if named is None or isinstance(named, str) else json.dumps(named)
    return EvaluateSettings(**block, heldout=source, max_length=config.data.max_length, chat_template_kwargs=arguments)
