"""Arms of every shipped recipe, resolved as they are trained, may stand in one table: what differs is declared."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from eaft_verl.recipe.config import plain
from eaft_verl.recipe.resolve import declared_keys, load_recipe, resolve
from eaft_verl.reporting.comparability import config_differences

RECIPES = sorted(path for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml") if "synth" not in path.name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_differs_is_declared(path: Path) -> None:
    recipe = load_recipe(str(path))
    arms = []
    for arm in recipe.arms:
        config = plain(resolve(recipe, arm, ["model=x"]))
        run = SimpleNamespace(config=config, path=Path("/runs") / arm)
        info = {"declared": declared_keys(recipe, arm)}
        arms.append(SimpleNamespace(runs=[SimpleNamespace(arm=arm, label=arm, run=run, info=info)]))
    differences = config_differences(arms)
    assert [row["key"] for row in differences if not row["declared"]] == []
    if {"sft", "grpo"} <= recipe.arms.keys():
        assert next(row for row in differences if row["key"] == "fused_head")["of_trainer"]
