"""`eaft reproduce`: a finished run made once more from what it recorded, and every number beside the first one's.

Its own config.yaml decides: what it took from another run (a budget, the level of a control) stands in it. Training and
evaluation are stages of their own, as in `compare`; what is finished already is kept.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from eaft_verl.boundary import python_command
from eaft_verl.errors import ConfigError, RunError, require
from eaft_verl.experiment.environment import describe, environment_differences
from eaft_verl.experiment.evaluate import evaluate_model
from eaft_verl.experiment.processes import run_stage
from eaft_verl.experiment.same_inputs import Again, other_inputs, other_model
from eaft_verl.experiment.same_numbers import BIT_EQUAL, DIFFERENT, compared, summary, table
from eaft_verl.experiment.stored import require_same, settings_that_differ
from eaft_verl.experiment.train import train
from eaft_verl.files import write_json
from eaft_verl.recipe.chains import BASE
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.config import Config, changed, plain, stored_configuration, value_of
from eaft_verl.recipe.datasets import prepared_path
from eaft_verl.reporting.comparability import flatten
from eaft_verl.runs import Run, is_run, run_name
from eaft_verl.training.interruption import is_stage

CAME_OUT_DIFFERENT = 3  # exit code
UNTRAINED = ("base", "model")  # kinds of run that are evaluated only
FILES = ("model", "data.train", "data.heldout")  # may lie elsewhere: their contents are compared
_KINDS: dict[type, tuple[type, ...]] = {float: (float, int), int: (float, int), str: (str, dict, list)}
DECIDING = ("code", "versions")  # kinds of difference of the environment that need --force


def reproduce(folder: Path, out: Path | None, overrides: list[str], *, force: bool) -> int:
    """Make the run in `folder` once more in `out` (None: beside its output folder) and print what came out.

    overrides: where its files lie now; another setting, like another version, needs `force` and is named.
    0 if every number came out within rounding or the noise floor, CAME_OUT_DIFFERENT if not, else a stage's exit code.
    RunError naming every setting, version or input that is another one, before anything is trained.
    """
    run = Run(folder)
    config = _configuration(run, out, overrides)
    if is_stage():
        _make(run, config, Again(run, force))
        return 0
    asked = [line for line in settings_that_differ(run.config, plain(config)) if line.partition("=")[0] not in FILES]
    environment = environment_differences(run.env, describe())
    _require_before(run, config)
    _require_the_same(run, asked, environment, other_model(run, config), force=force)
    target = _folder(run, config)
    require_same(target, config)
    words = ["reproduce", str(run.path), "--output", config.output, *overrides, *(["--force"] if force else [])]
    untrained = run.info["kind"] in UNTRAINED
    stages = [(("evaluated", True) if untrained else ("status", "finished"), words)]
    if run.info.get("evaluated") and not untrained:
        stages.append((("evaluated", True), ["evaluate", str(target)]))
    for (field, value), arguments in stages:
        done = is_run(target) and Run(target).info.get(field) == value
        if not done and (code := run_stage(python_command("eaft_verl.cli", *arguments))):
            return code
    return _outcome(run, Run(target), asked, environment)


def _configuration(run: Run, out: Path | None, overrides: list[str]) -> Config:
    """The run's own configuration with another output folder, files that may lie elsewhere, and what is asked for."""
    if run.info["status"] != "finished":
        raise RunError(f"{run.path} has status {run.info['status']!r}; only a finished run can be reproduced")
    place = Path(out or run.path.parent.with_name(f"{run.path.parent.name}-reproduced")).expanduser().absolute()
    if place == run.path.parent:
        raise RunError(f"--output {place} holds the run itself; give another folder")
    config = stored_configuration(run.config)
    settings = {f"{key}={value}" for key, value in flatten(plain(config)).items()}
    changes: dict[str, Any] = {"output": str(place), "resume": "fallback"}
    for key in FILES:
        changes |= _where_it_was(key, value_of(config, key), run.env.get("folder"))
    for item in overrides:
        key, value = _override(item)
        known = value_of(config, key)
        if known is None and f"{key}=null" not in settings:
            raise ConfigError(f"{item!r}: {run.path} has no setting {key}; see its config.yaml")
        if known is not None and value is not None and not isinstance(value, _KINDS.get(type(known), type(known))):
            raise ConfigError(f"{item!r}: the run has {key}={known!r}; give a value of the same kind")
        changes[key] = value
    config = changed(config, changes)
    check(config)
    return config


def _override(item: str) -> tuple[str, Any]:
    """Key and value of `key=value`, read as in a recipe."""
    key, equals, _ = item.partition("=")
    try:
        value = OmegaConf.select(OmegaConf.from_dotlist([item]), key) if key and equals else None
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"override {item!r}: {str(error).splitlines()[0]}") from None
    require(key and equals, f"override {item!r} must be key=value, for example data.train=/new/place/train.jsonl")
    return key, plain(value)


def _where_it_was(key: str, value: Any, folder: str | None) -> dict[str, str]:
    """A path relative to the folder in which the first command was given, where it leads nowhere from here."""
    if folder is None or not isinstance(value, str) or Path(value).is_absolute() or Path(value).exists():
        return {}
    return {key: str(Path(folder) / value)} if (Path(folder) / value).exists() else {}


def _require_the_same(
    run: Run, asked: list[str], environment: dict[str, list[str]], inputs: list[str], *, force: bool
) -> None:
    found = [*asked, *(line for group in DECIDING for line in environment.get(group, [])), *inputs]
    if found and not force:
        ways = "Install its versions (env.json), check out its commit, or add --force to see what comes of these"
        raise RunError(f"{run.path} was made otherwise: {'; '.join(found)}. {ways}")
    for line in found:
        print(f"eaft: warning: made otherwise: {line}", file=sys.stderr)
    if (run.config.get("budget") or {}).get("unit") == "device_seconds":
        print("eaft: warning: it was stopped by the clock of its own machine; steps may differ", file=sys.stderr)


def _require_before(run: Run, config: Config) -> None:
    """RunError naming the run that this one starts from or is made of, unless it has been reproduced beside it."""
    average = config.average or {}
    for arm in (config.start and config.start.arm, average.get("of"), average.get("with")):
        name = run_name(arm, config.seed) if arm and arm != BASE else ""
        if name and not is_run(Path(config.output) / name):
            first = shlex.join(["eaft", "reproduce", str(run.path.parent / name), "--output", config.output])
            raise RunError(f"{run.path} is made from {name}, which {config.output} does not hold; first `{first}`")


def _folder(run: Run, config: Config) -> Path:
    untrained = run.info["kind"] in UNTRAINED
    return Path(config.output) / (run.path.name if untrained else run_name(config.arm, config.seed))


def _make(run: Run, config: Config, again: Again) -> None:
    if run.info["kind"] in UNTRAINED:
        what = config.model if run.info["kind"] == "base" else run.info["model"]
        evaluate_model(what, config, _folder(run, config), again)
    else:
        train(config, run.info["declared"], again)


def _outcome(run: Run, made: Run, asked: list[str], environment: dict[str, list[str]]) -> int:
    """Print and keep what came out."""
    rows = compared(run, made)
    require(rows, f"{run.path} holds no number to be compared: neither metrics.jsonl nor eval/")
    trained = run.info["kind"] not in UNTRAINED
    prepared = prepared_path(stored_configuration(made.config), "train") if trained else None
    inputs = other_inputs(run, made.info["keys"], prepared)
    otherwise = [*asked, *inputs, *(line for lines in environment.values() for line in lines)]
    found = {"run": str(run.path), "made": str(made.path), "otherwise": otherwise, "numbers": rows}
    write_json(made.path / "reproduction.json", found | {"summary": summary(rows)})
    print(*table(rows), sep="\n", end="\n" * any(row["verdict"] != BIT_EQUAL for row in rows))
    print("made otherwise: " + ("; ".join(otherwise) or "nothing: same code, versions, hardware, settings and inputs"))
    print(f"{made.path}: {summary(rows)}")
    return CAME_OUT_DIFFERENT if any(row["verdict"] == DIFFERENT for row in rows) else 0
