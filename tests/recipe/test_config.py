"""The typed face of a resolved configuration is the tree itself: every field is there, with a value of its type."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from config_fixtures import composed_once  # noqa: F401
from omegaconf import DictConfig, OmegaConf

from eaft_verl.recipe import config as face
from eaft_verl.recipe.resolve import load_recipe, resolve

ONLY_GRPO = {"verl.actor_rollout_ref", "verl.algorithm", "verl.reward", "verl.data.max_prompt_length"}
ONLY_GRPO |= {"verl.data.max_response_length"}
DERIVED = {"budget.unit", "budget.amount", "control.level", "control.window"}


def mismatches(kind: Any, value: Any, where: str) -> list[str]:
    """Fields that are missing, or hold a value of another type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        found = [mismatches(one, value, where) for one in typing.get_args(kind)]
        return [] if any(not part for part in found) else found[0]
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            return [f"{where} is {value!r}"]
        wrong = []
        for name, field in typing.get_type_hints(kind).items():
            key = f"{where}.{name}".lstrip(".")
            wrong += mismatches(field, value[name], key) if name in value else [key]
        return wrong
    plain = typing.get_origin(kind) or kind
    plain = dict if plain is Mapping else plain
    return [] if plain is Any or isinstance(value, plain) else [f"{where}={value!r} is no {kind}"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("arm", ["sft", "grpo", "control"])
def test_every_field_is_in_the_tree_with_its_type(tmp_path: Path, arm: str, device: str) -> None:
    arms = "{sft: {}, grpo: {trainer: grpo}, control: {control: {of: sft, by: nll}}}"
    text = f"model: m\ndata: {{train: x.jsonl}}\narms: {arms}"
    (tmp_path / "r.yaml").write_text(text)
    config: Any = resolve(load_recipe(tmp_path / "r.yaml"), arm, [f"device={device}"])
    assert isinstance(config, DictConfig)
    wrong = set(mismatches(face.Config, OmegaConf.to_container(config), ""))
    assert wrong - DERIVED == (set() if arm == "grpo" else ONLY_GRPO)
