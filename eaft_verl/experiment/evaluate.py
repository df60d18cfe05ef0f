"""`eaft evaluate`: a run's checkpoints, or any model, scored by the recipe's benchmarks into a run directory."""

import re
import time
from pathlib import Path
from typing import Any

from eaft_verl.data.prepare import template_hash
from eaft_verl.errors import ConfigError, RunError
from eaft_verl.evaluation.checkpoints import evaluate_checkpoints
from eaft_verl.evaluation.model_files import check_model_files
from eaft_verl.evaluation.settings import EvaluateSettings, evaluation_key
from eaft_verl.experiment.arguments import DEFAULT_RECIPE
from eaft_verl.experiment.environment import describe, note_change
from eaft_verl.experiment.same_inputs import Again
from eaft_verl.files import write_json
from eaft_verl.models import check_model, check_same_vocabulary, load_tokenizer, model_key, resolve_model
from eaft_verl.recipe.checks import check_scoring
from eaft_verl.recipe.config import Config, as_yaml, stored_configuration
from eaft_verl.recipe.datasets import prepare_data
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.recipe.views import evaluate_settings
from eaft_verl.runs import Run, cause_of, is_run


def evaluate_command(
    what: str, recipe: str | None, out: Path | None, overrides: list[str], base: str | None = None
) -> Run:
    """Evaluate a run directory with its own settings, or a model with a recipe's; finished benchmarks are kept.

    base: the model that drift is measured from, for a MODEL; None: the recipe's. A model that is the base, byte for
    byte, is evaluated as one: in OUTPUT/base unless `out` says otherwise; any other in OUTPUT/models/NAME.
    """
    if is_run(Path(what)):
        given = [("--out", out), ("key=value", overrides), ("--recipe", recipe), ("--base", base)]
        if useless := [name for name, value in given if value]:
            raise ConfigError(
                f"{', '.join(useless)}: a run is evaluated by its own configuration, where this has no effect; it is "
                "for a MODEL"
            )
        return _evaluate_run(Run(what))
    check_model(what)
    loaded = load_recipe(recipe or DEFAULT_RECIPE)
    arm = next(iter(loaded.arms))
    config = resolve(loaded, arm, [*overrides, *([f"model={base}"] if base else [])])
    if not config.model:  # a recipe of settings only
        config = resolve(loaded, arm, [*overrides, f"model={what}"])
    check_scoring(config)
    return evaluate_model(what, config, out)


def settings_for(config: Config, tokenizer: Any) -> EvaluateSettings:
    """The evaluation with its held-out data prepared as for training, so that both see the same tokens."""
    heldout = prepare_data(config, tokenizer, "heldout").path if config.data.heldout else None
    return evaluate_settings(config, heldout)


def _evaluate_run(run: Run) -> Run:
    info = run.info
    if info["status"] != "finished":
        raise RunError(f"{run.path} has status {info['status']!r}; only a finished run is evaluated: train it first")
    config = stored_configuration(run.config)
    settings = settings_for(config, load_tokenizer(resolve_model(config.model)))
    if info["kind"] in ("base", "model"):
        checkpoints: dict[int, Path | str] = {0: resolve_model(info["model"])}
    else:
        checkpoints = dict(run.checkpoints())
    if info["total_steps"] not in checkpoints:
        raise RunError(f"{run.path} has no export of its last step {info['total_steps']}; was checkpoints/ removed?")
    return _score(run, config, settings, checkpoints)


def evaluate_model(what: str, config: Config, out: Path | None, again: Again | None = None) -> Run:
    """The run of a model that is not trained here, in `out` (None: its own folder), evaluated; what is there is kept.

    again: the run whose configuration this is; RunError where its model or evaluation are not these.
    """
    model, key = resolve_model(what), model_key(what)
    check_model_files(model)
    tokenizer = load_tokenizer(model)
    _check_template(what, config, tokenizer)
    base_key = key if what == config.model else model_key(config.model)  # every byte is read for one
    is_base = key == base_key
    settings = settings_for(config, tokenizer)
    if not is_base and settings.drift:
        check_same_vocabulary(model, config.model, "--base (default: the recipe's model)", "evaluate.drift")
    keys = {"model": key, "template": _template_key(tokenizer), "evaluation": evaluation_key(settings)}
    if not is_base:
        keys["base"] = base_key
    if again:
        again.require(keys)
    kind = "base" if is_base else "model"
    folder = out or Path(config.output) / ("base" if is_base else f"models/{_folder_name(what)}-{key[:8]}")
    if not is_run(folder):
        info = {"kind": kind, "recipe": config.name, "arm": kind, "seed": config.seed, "model": what}
        info |= {"keys": keys, "declared": [], "total_steps": 0, "train_seconds": 0.0}
        Run.create(folder, info=info, config=as_yaml(config), env=describe())
    run = Run(folder)
    if run.info["keys"] != keys:
        raise RunError(f"{folder} holds the evaluation of another model or recipe; choose another --out or remove it")
    run.update(status="finished")  # nothing is trained
    return _score(run, config, settings, {0: model})


def _folder_name(model: str) -> str:
    """'checkpoints-step_000016' of runs/x/checkpoints/step_000016, 'org-name' of a hub id."""
    parts = [part for part in Path(model).parts if part not in ("/", ".", "..", "~")]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts[-2:]))[-80:]


def _template_key(tokenizer: Any) -> str:
    return template_hash(tokenizer) if tokenizer.chat_template else "none"


def _check_template(model: str, config: Config, tokenizer: Any) -> None:
    """A model without a chat template is asked in plain text; texts rendered by one have no meaning to it."""
    wanted = {"data.heldout": config.data.heldout, "evaluate.drift": config.evaluate.drift}
    if not tokenizer.chat_template and (given := [key for key, value in wanted.items() if value is not None]):
        unset = " ".join(f"{key}=null" for key in given)
        raise ConfigError(
            f"model={model!r} has no chat template, which {' and '.join(given)} need; leave them out ({unset}); "
            "benchmarks are then asked in plain text"
        )


def _score(run: Run, config: Config, settings: EvaluateSettings, checkpoints: dict[int, Path | str]) -> Run:
    with run.locked():
        note_change(run, "evaluate")
        try:
            evaluate_checkpoints(
                run,
                checkpoints,
                settings,
                base_model=config.model,
                work=Path(config.output) / "data",
                points=config.evaluate.points,
            )
        except BaseException as error:
            run.update(error=f"evaluation: {cause_of(error)}")
            raise
        if run.info["kind"] == "arm":
            _weigh(run, config, checkpoints)
        run.update(evaluated=True, error=None)
    return run


def _weigh(run: Run, config: Config, checkpoints: dict[int, Path | str]) -> None:
    """eval/weights.json: how far the last export lies from the base; nothing for a base without safetensors."""
    step, base, file = max(checkpoints), Path(resolve_model(config.model)), run.path / "eval" / "weights.json"
    if file.exists() or not any(base.glob("*.safetensors")):
        return
    from eaft_verl.analysis.weight_change import weight_change

    started = time.perf_counter()
    found = weight_change(base, Path(checkpoints[step]))
    write_json(file, {"step": step, "seconds": time.perf_counter() - started, **found})
