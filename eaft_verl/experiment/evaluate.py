"""`eaft evaluate`: a run's checkpoints, or any model, scored by the recipe's benchmarks into a run directory."""

from pathlib import Path
from typing import Any

from eaft_verl.data.prepare import template_hash
from eaft_verl.errors import ConfigError, RunError
from eaft_verl.evaluation.checkpoints import evaluate_checkpoints
from eaft_verl.evaluation.model_files import check_model_files
from eaft_verl.evaluation.settings import EvaluateSettings, evaluation_key
from eaft_verl.experiment.environment import describe
from eaft_verl.models import check_model, load_tokenizer, model_key, resolve_model
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.config import Config, as_yaml, stored_configuration
from eaft_verl.recipe.datasets import prepare_data
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.recipe.views import evaluate_settings
from eaft_verl.runs import Run, cause_of, is_run


def evaluate_command(what: str, recipe: str, out: Path | None, overrides: list[str]) -> Run:
    """Evaluate a run directory with its own settings, or a model with a recipe's; finished benchmarks are kept."""
    if is_run(Path(what)):
        if overrides or out:
            raise ConfigError("a run is evaluated by its own configuration; --out and key=value are for a MODEL")
        return _evaluate_run(Run(what))
    check_model(what)
    loaded = load_recipe(recipe)
    arm = next(iter(loaded.arms))
    config = resolve(loaded, arm, [*overrides, f"model={what}"])
    check(config)
    return _evaluate_model(config, out)


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
    if info["kind"] == "base":
        checkpoints: dict[int, Path | str] = {0: resolve_model(config.model)}
    else:
        checkpoints = dict(run.checkpoints())
    if info["total_steps"] not in checkpoints:
        raise RunError(f"{run.path} has no export of its last step {info['total_steps']}; was checkpoints/ removed?")
    return _score(run, config, settings, checkpoints)


def _evaluate_model(config: Config, out: Path | None) -> Run:
    model = resolve_model(config.model)
    check_model_files(model)
    tokenizer = load_tokenizer(model)
    _check_template(config, tokenizer)
    settings = settings_for(config, tokenizer)
    keys = {
        "model": model_key(config.model),
        "template": template_hash(tokenizer) if tokenizer.chat_template else "none",
        "evaluation": evaluation_key(settings),
    }
    folder = out or Path(config.output) / "base"
    if not is_run(folder):
        info = {"kind": "base", "recipe": config.name, "arm": "base", "seed": config.seed, "model": config.model}
        info |= {"keys": keys, "declared": [], "total_steps": 0, "train_seconds": 0.0}
        Run.create(folder, info=info, config=as_yaml(config), env=describe())
    run = Run(folder)
    if run.info["keys"] != keys:
        raise RunError(f"{folder} holds the evaluation of another model or recipe; choose another --out or remove it")
    run.update(status="finished")  # nothing is trained
    return _score(run, config, settings, {0: model})


def _check_template(config: Config, tokenizer: Any) -> None:
    """A model without a chat template is asked in plain text; texts rendered by one have no meaning to it."""
    wanted = {"data.heldout": config.data.heldout, "evaluate.drift": config.evaluate.drift}
    if not tokenizer.chat_template and (given := [key for key, value in wanted.items() if value is not None]):
        unset = " ".join(f"{key}=null" for key in given)
        raise ConfigError(
            f"model={config.model!r} has no chat template, which {' and '.join(given)} need; leave them out ({unset}); "
            "benchmarks are then asked in plain text"
        )


def _score(run: Run, config: Config, settings: EvaluateSettings, checkpoints: dict[int, Path | str]) -> Run:
    with run.locked():
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
        run.update(evaluated=True, error=None)
    return run
