"""The recipes that travel with the package, by name: from a checkout's recipes/, or from where a wheel put them."""

import functools
import importlib.metadata
import itertools
from pathlib import Path
from typing import Any

import yaml

from eaft_verl.errors import ConfigError

DISTRIBUTION = "eaft-verl"
SUFFIX = ".yaml"
_FOR = {
    "recipe": "recipes, for `eaft compare NAME`:",
    "shared": "what these extend, no experiment by itself:",
    "spec": "specs that make training data, for `eaft synthesize NAME OUT.jsonl`:",
}


@functools.cache
def shipped() -> dict[str, Path]:
    """{name: file}, in order of name; empty where neither a checkout nor an installed wheel holds any."""
    checkout = Path(__file__).parents[2] / "recipes"
    files = list(checkout.glob(f"*{SUFFIX}")) or _installed()
    return {file.stem: file for file in sorted(files)}


def _installed() -> list[Path]:
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return []
    found = (file for file in distribution.files or () if file.parent.name == "recipes" and file.suffix == SUFFIX)
    return [Path(str(distribution.locate_file(file))).resolve() for file in found]


def find_recipe(name: Path) -> Path:
    """The file itself where there is one; else, for a bare name, with or without .yaml, the shipped recipe."""
    if name.exists() or name.parent != Path():
        return name
    found = shipped().get(name.stem if name.suffix in ("", SUFFIX) else name.name, name)
    # below the current folder it stays relative: what is launched elsewhere finds it in the folder that travels
    return found.relative_to(Path.cwd()) if found.is_absolute() and found.is_relative_to(Path.cwd()) else found


def listing() -> list[str]:
    """Every shipped file in a line, by what it is for: trained, extended by others, or a spec that makes data."""
    kinds: dict[str, list[str]] = {kind: [] for kind in _FOR}
    width = max(map(len, shipped()), default=0)
    for name, file in shipped().items():
        kinds[_kind(file)].append(f"  {name:{width}}  {_about(file)}")
    return [line for kind, lines in kinds.items() if lines for line in (_FOR[kind], *lines)]


def _is_spec(tree: dict[str, Any]) -> bool:
    return "prompts" in tree and "arms" not in tree


def require_no_spec(path: Path, tree: dict[str, Any]) -> None:
    """ConfigError for a YAML file that is a spec of `eaft synthesize` where a recipe is asked for."""
    if _is_spec(tree):
        raise ConfigError(
            f"{path} is no recipe but a spec that makes training data: `eaft synthesize {path} OUT.jsonl`, then train "
            "a recipe with data.train=OUT.jsonl"
        )


def _kind(file: Path) -> str:
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    if _is_spec(tree):
        return "spec"
    return "recipe" if {"model", "extends"} & tree.keys() else "shared"


def _about(file: Path) -> str:
    """The first sentence of the comment that the file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines).partition(". ")[0].rstrip(".")
