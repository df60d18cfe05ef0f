"""What the program tells its user to type exists: verbs and options of `eaft`, and keys of a recipe."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eaft_verl.experiment.arguments import parser
from eaft_verl.recipe.config import plain
from eaft_verl.recipe.keys import OPEN_KEYS, OURS_INSTEAD
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.reporting.comparability import flatten

SOURCES = sorted((Path(__file__).parents[1] / "eaft_verl").rglob("*.py"))
# Options of other programs that are run or recommended here.
GIT = {"--error-unmatch", "--exclude-standard", "--porcelain", "--recurse-submodules", "--show-toplevel"}
GIT |= {"--untracked-files", "--others"}
RAY = {"--address", "--dashboard-agent-listen-port", "--head", "--num-gpus"}
OTHERS = {"--format", "--gpus-per-node", "--ipc", "--job-name", "--no-deps", "--num-nodes"}
OTHERS |= {
    "--query-gpu",
    "--secret",
    "--served-model-name",
    "--shm-size",
    "--port",
    "--follow",
    "--generate",
    "--no",
}
KEY = re.compile(r"\b((?:data|evaluate|verl|objective|compare|choose|meter)(?:\.[a-z_]+)+)=")


def texts() -> Iterator[str]:
    """Every text of the package that is no docstring; what is filled in is {}."""
    for source in SOURCES:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        skipped = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                skipped.add(id(body[0].value))
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                yield node.value


def named(pattern: str | re.Pattern[str]) -> set[str]:
    return {found for text in texts() for found in re.findall(pattern, text)}


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def test_every_verb_that_is_named_exists() -> None:
    found = named(r"`eaft ([a-z]+)")
    assert len(found) > 8 and found <= verbs().keys()


def test_every_option_that_is_named_exists() -> None:
    ours = {option for verb in verbs().values() for option in verb._option_string_actions} | {"--version"}
    found = named(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
    assert len(found & ours) > 20
    assert found - ours == GIT | RAY | OTHERS


@pytest.mark.parametrize("option", sorted(named(r"`?eaft [a-z]+ [^`;]*--[a-z-]+")))
def test_an_option_that_stands_behind_a_verb_is_one_of_it(option: str) -> None:
    verb = re.findall(r"eaft ([a-z]+)", option)[0]
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", option)) <= verbs()[verb]._option_string_actions.keys()


def test_every_key_that_a_message_sets_exists() -> None:
    recipe: Any = load_recipe("quickstart")
    known = {key for arm in recipe.arms for key in flatten(plain(resolve(recipe, arm)))}
    parts = {key[: end.start()] for key in known for end in re.finditer(r"\.|$", key)}
    found = named(KEY)
    assert len(found) > 20
    unknown = {
        key for key in found - parts - OURS_INSTEAD.keys() if not any(key.startswith(f"{one}.") for one in OPEN_KEYS)
    }
    assert unknown == {"data.pad_mode"}  # of verl's own SFT trainer
