"""What `eaft synthesize` does with its arguments: a spec, or a recipe whose prompts its own model answers."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eaft_verl.boundary import secrets_in_clear
from eaft_verl.data.leakage import Against
from eaft_verl.data.spec import sources_of
from eaft_verl.data.teacher.asking import model_to_ask
from eaft_verl.data.teacher.endpoint import check_package
from eaft_verl.data.teacher.spec import SynthesisSpec, parse_spec
from eaft_verl.data.teacher.synthesis import describe, preview, synthesize
from eaft_verl.errors import ConfigError
from eaft_verl.recipe.config import Config, plain
from eaft_verl.recipe.datasets import file_questions, recipe_questions
from eaft_verl.recipe.file import read_recipe
from eaft_verl.recipe.resolve import load_recipe, overrides_tree, resolve
from eaft_verl.recipe.shipped import find_recipe

_YAML = (".yaml", ".yml")
_OWN = {"samples": 4, "sampling": {"temperature": 1.0, "top_p": 1.0}}  # as the model is, not as it is served best


def synthesize_command(options: argparse.Namespace) -> None:
    """Make OUT from SPEC, or with --dry-run say what would be asked; say what came of it."""
    spec, against = load_spec(options.spec, options.overrides, own=options.own)
    for name, why in (against.not_checked if against else {}).items():
        print(
            f"eaft: warning: prompts are not compared with {name}: {why}, `against: [...]` in SPEC here",
            file=sys.stderr,
        )
    if not options.dry_run:
        print("\n".join(describe(synthesize(spec, options.out, against, partial=options.partial), options.out)))
        return
    print("\n".join(preview(spec, options.out, against)))
    if spec.endpoint:
        try:
            check_package()
            print(f"endpoint: {spec.endpoint.url} serves {model_to_ask(spec)}")
        except ConfigError as error:
            print(f"eaft: warning: {error}", file=sys.stderr)


def load_spec(path: str, overrides: list[str], *, own: bool) -> tuple[SynthesisSpec, Against | None]:
    """The spec, and what its prompts must not contain: the benchmarks of its `recipe`, and `against`.

    path: a spec; a recipe, which stands for {recipe: it}; or a source of prompts. ConfigError as parse_spec.
    """
    path = str(find_recipe(Path(path)))
    tree = _resolved(path, overrides, own=own)
    recipe, sources = tree.pop("recipe", None), tree.pop("against", None) or []
    config = _config(recipe, Path(path).parent if Path(path).suffix in _YAML else Path()) if recipe else None
    if config is not None:
        tree.setdefault("grader", config.reward.grader)
        if own and not tree.get("prompts"):
            tree["prompts"] = _training_prompts(config)
        if own:  # a longer answer makes no row, and servers refuse to be asked for more than their context
            tree.setdefault("sampling", {}).setdefault("max_tokens", config.data.max_length)
    _check_said(tree, path, own=own)
    spec = parse_spec({**tree, "own": own}, path)
    return spec, _against(config, [sources] if isinstance(sources, str) else sources)


def _resolved(path: str, overrides: list[str], *, own: bool) -> dict[str, Any]:
    """The tree of the spec with overrides over it; the key of the endpoint from the environment."""
    try:
        tree = plain(OmegaConf.merge(_OWN if own else {}, _tree(path), overrides_tree(overrides)))
        if isinstance(tree.get("endpoint"), str):
            tree["endpoint"] = {"url": tree["endpoint"]}
        if isinstance(tree.get("endpoint"), dict):
            tree["endpoint"].setdefault("api_key", _default_key())
        if found := secrets_in_clear(tree):
            raise ConfigError(f"{path}: {found[0]} holds a secret in clear: export it and write ${{oc.env:NAME}} there")
        return plain(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: a ${{...}} reference cannot be resolved: {str(error).splitlines()[0]}") from None


def _check_said(tree: dict[str, Any], path: str, *, own: bool) -> None:
    """ConfigError unless the spec says who answers and how answers are verified."""
    if own and not (tree.get("endpoint") or {}).get("url"):
        raise ConfigError(
            f"{path}: --own asks the model that will be trained: say where it is served, endpoint.url=URL"
        )
    if "endpoint" not in tree:
        raise ConfigError(
            f"{path}: say who answers: endpoint.url=http://HOST:PORT/v1, or endpoint: null to draw from the "
            "answers that rows have"
        )
    if "grader" not in tree:
        raise ConfigError(
            f"{path}: say how answers are verified: recipe: FILE.yaml (its grader and benchmarks), grader: NAME, or "
            "grader: null to keep answers as they come"
        )


def _against(config: Config | None, sources: list[str]) -> Against | None:
    """The questions of a recipe's benchmarks, and of further sources; what those cover is no longer unchecked."""
    known = recipe_questions(config, "drop") if config is not None else Against({})
    questions = {name: found for one in sources for name, found in file_questions(one, "drop").questions.items()}
    unchecked = {name: why for name, why in known.not_checked.items() if not any(one in why for one in sources)}
    found = Against({**known.questions, **questions}, unchecked, "drop")
    return found if found.questions or found.not_checked else None


def _tree(path: str) -> dict[str, Any]:
    """The mapping in a spec file; {recipe: path} for a recipe, {prompts: path} for anything else."""
    if Path(path).suffix not in _YAML:
        return {"prompts": path}
    tree = read_recipe(Path(path))
    return {"recipe": str(Path(path).resolve())} if "arms" in tree else tree


def _default_key() -> str | None:
    """The client's usual variable, as a reference, so that it is known as a secret."""
    return "${oc.env:OPENAI_API_KEY}" if os.environ.get("OPENAI_API_KEY") else None


def _config(recipe: Any, folder: Path) -> Config:
    """The arm whose rewards the recipe declares, else its first: all arms share benchmarks and data."""
    if not isinstance(recipe, str):
        raise ConfigError(f"recipe={recipe!r} must be the path of a recipe, relative to the spec")
    found = load_recipe(folder / recipe)
    arm = next((name for name, own in found.arms.items() if own.get("trainer") == "grpo"), next(iter(found.arms)))
    return resolve(found, arm)


def _training_prompts(config: Config) -> dict[str, dict[str, Any]]:
    """The recipe's training data as sources of prompts."""
    columns = plain(config.data.columns)
    sources = sources_of(plain(config.data.train), "data.train", columns=columns, rows=config.data.rows)
    return {one.name or "train": {"source": one.source, "columns": one.columns, "rows": one.rows} for one in sources}
