"""`extends`: what is merged, what is not passed on, and what is refused."""

from pathlib import Path

import pytest

from eaft_verl.errors import ConfigError
from eaft_verl.recipe.resolve import declared_keys, load_recipe

BASE = """
name: parent
output: /somewhere
model: a/b
data: {train: generate:sums_train, max_length: 128}
evaluate: {target: [sums], general: [gcd, lcm]}
verl: {optim: {lr: 1.0e-5, betas: [0.9, 0.95]}}
arms:
  sft: {objective: {name: sft}}
  talr: {objective: {name: talr, floor: 0.2}, seed: 3}
  eaft: {objective: {name: eaft}}
"""


def recipe(folder: Path, text: str, base: str = BASE):
    (folder / "base.yaml").write_text(base, encoding="utf-8")
    (folder / "child.yaml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "child.yaml")


def test_child_wins_key_by_key_and_lists_are_replaced(tmp_path: Path) -> None:
    text = """
extends: base.yaml
model: c/d
data: {max_length: 256}
evaluate: {general: [gcd]}
verl: {optim: {lr: 2.0e-5}}
arms: {talr: {seed: 4}, more: {objective: {name: dft}}}
"""
    found = recipe(tmp_path, text)
    assert found.shared == {
        "model": "c/d",
        "data": {"train": "generate:sums_train", "max_length": 256},
        "evaluate": {"target": ["sums"], "general": ["gcd"]},
        "verl": {"optim": {"lr": 2.0e-5, "betas": [0.9, 0.95]}},
    }
    assert list(found.arms) == ["sft", "talr", "eaft", "more"]
    assert found.arms["talr"] == {"objective": {"name": "talr", "floor": 0.2}, "seed": 4}
    assert declared_keys(found, "talr") == ["objective.floor", "objective.name", "seed"]
    assert found.name == "child"  # neither name nor output of the parent


def test_arms_are_dropped_by_null_and_objectives_chosen_whole(tmp_path: Path) -> None:
    found = recipe(tmp_path, "extends: base.yaml\narms: {sft: null, talr: {objective: {name: dft}}}")
    assert list(found.arms) == ["talr", "eaft"]
    assert found.arms["talr"]["objective"] == {"name": "dft"}
    tuned = recipe(tmp_path, "extends: base.yaml\narms: {talr: {objective: {floor: 0.1}}}")
    assert tuned.arms["talr"]["objective"] == {"name": "talr", "floor": 0.1}


def test_several_levels_and_paths_relative_to_each_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")
    (tmp_path / "deep" / "middle.yaml").write_text("extends: ../base.yaml\nseed: 1\nmodel: m/m\n", encoding="utf-8")
    (tmp_path / "deep" / "child.yaml").write_text("extends: middle.yaml\nseed: 2\n", encoding="utf-8")
    found = load_recipe(tmp_path / "deep" / "child.yaml")
    assert (found.shared["seed"], found.shared["model"], len(found.arms)) == (2, "m/m", 3)


@pytest.mark.parametrize(
    ("text", "base", "message"),
    [
        ("extends: nowhere.yaml", BASE, r"nowhere.yaml, which .*child.yaml extends, does not exist; there are .*base"),
        ("extends: [base.yaml]", BASE, "extends=.*must be one recipe file"),
        ("extends: base.yaml", "extends: child.yaml", "extends itself: .*child.yaml -> .*base.yaml -> .*child.yaml"),
        ("extends: child.yaml", BASE, "extends itself"),
        ("extends: base.yaml", "a: [", "base.yaml is not valid YAML"),
        ("extends: base.yaml", "- a\n", "base.yaml is a list; it needs `arms:`"),
        ("extends: base.yaml\narms: {stf: null}", BASE, r"arms.stf: null drops.*its arms are sft, talr, eaft"),
        ("extends: base.yaml\narms: [sft]", BASE, "`arms` must be a mapping"),
        ("extends: base.yaml\narms: {sft: null, talr: null, eaft: null}", BASE, "needs `arms:`"),
        ("extends: base.yaml\narms: {sft: {extends: base.yaml}}", BASE, ""),
    ],
)
def test_refused(tmp_path: Path, text: str, base: str, message: str) -> None:
    if not message:  # an arm extends nothing: it is an unknown key when resolved
        from eaft_verl.recipe.resolve import resolve

        with pytest.raises(ConfigError, match="unknown key extends"):
            resolve(recipe(tmp_path, text, base), "sft")
        return
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, text, base)
