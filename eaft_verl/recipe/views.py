"""What the rooms below take from a resolved configuration, each in its own terms."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eaft_verl.data.spec import DataSpec, Source, sources_of
from eaft_verl.errors import ConfigError
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.objectives import Objective
from eaft_verl.recipe.chains import START
from eaft_verl.recipe.config import Config, plain
from eaft_verl.recipe.objective import build_objective

REPLAY = "replay"  # name of the replayed rows among the sources of the training data


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
        key=f"data.{which}",
    )


def source_of(config: Config, which: str) -> Any:
    """What the arm's 'train' or 'heldout' data is made of, its own rows and replay included; None for nothing."""
    if which == "heldout":
        return plain(config.data.heldout)
    source, own, replay = plain(config.data.train), config.self_sft, config.replay
    if own:
        prepared = Path(own["data"]).expanduser().with_suffix(".manifest.json").is_file()
        source = own["data"] if prepared else {"source": own["data"], "columns": plain(own["columns"])}
    return _mixed(source, plain(replay)) if replay else source


def _mixed(source: Any, replay: dict[str, Any]) -> dict[str, Any]:
    """The source, or the mixture that it is, with the replayed rows as one more part; shares among the others stay."""
    parts: dict[str, Any] = {}
    for one in sources_of(source, "data.train"):
        parts[one.name or "data"] = {key: value for key, value in asdict(one).items() if value is not None}
        if one.share:
            parts[one.name or "data"]["share"] = one.share * (1 - replay["share"])
        if one.columns is None and isinstance(source, dict) and "columns" in source:
            parts[one.name or "data"]["columns"] = None  # said, so that data.columns does not hold
    if REPLAY in parts:
        raise ConfigError(f"data.train has a source called {REPLAY}, which is what replayed rows are called; rename it")
    rows = {"source": replay["data"], "share": replay["share"], "columns": replay["columns"], "rows": None}
    return {**parts, REPLAY: rows}


def key_of(config: Config, which: str, source: Source) -> str:
    """The key of the recipe by which a source is part of the 'train' or 'heldout' data."""
    if which == "train" and config.replay and source.name == REPLAY:
        return "replay.data"
    return "self_sft.data" if which == "train" and config.self_sft else f"data.{which}"


def own_rows(config: Config) -> str:
    """What the files of the arm's training data have in their names: '_ARM' where it has rows of its own."""
    return f"_{config.arm}" if config.replay or config.self_sft else ""


def anchor_reference(config: Config) -> str | None:
    """The model that the anchor's reference names; None where there is none, or it is the one training starts from."""
    anchor = objective_of(config).anchor if config.trainer == "sft" else None
    return None if anchor is None or anchor.reference == START else anchor.reference


def world_size(config: Config) -> int:
    """Workers of the arm's training."""
    return config.verl.trainer.nnodes * config.verl.trainer.n_gpus_per_node


def layers_wrapped(config: Config) -> str | None:
    """Why FSDP2 must take the model of this arm layer by layer; None where it may be one unit."""
    model, engine = config.verl.model, config.verl.engine
    offloads = engine.param_offload or engine.optimizer_offload or engine.offload_policy
    reasons = {
        "is for arms with trainer: sft": config.trainer != "sft",
        "gathers all of it at once on each of several devices": world_size(config) > 1,
        "brings all of it back from the host at once": offloads,
        "an adapter is not merged into: verl merges unit by unit and leaves the root out": model.lora_rank,
        "leaves verl no layers to offload activations by": model.enable_activation_offload,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def evaluate_settings(config: Config, heldout: Path | None = None) -> EvaluateSettings:
    """The `evaluate` block as the evaluation package takes it; `heldout`: the prepared file, once there is one."""
    block = plain(config.evaluate)
    block.pop("points")
    block["backend_args"] = block["backend_args"] or {}
    named, arguments = source_of(config, "heldout"), plain(config.data.chat_template_kwargs)
    source = str(heldout) if heldout else named if named is None or isinstance(named, str) else json.dumps(named)
    return EvaluateSettings(**block, heldout=source, max_length=config.data.max_length, chat_template_kwargs=arguments)
