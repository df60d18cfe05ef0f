"""A recipe file and the files it extends, as one tree.

`extends: OTHER.yaml` (relative to the file that says it) lays a recipe over another one: mappings are merged key by
key, anything else is replaced, and the extending file wins. `arms` merge by name; `ARM: null` drops an arm that the
other file has. An objective that has a `name` is chosen whole, so that parameters of another one do not survive
underneath. `name` and `output` say which experiment a file is and are not passed on.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from eaft_verl.errors import ConfigError, did_you_mean
from eaft_verl.recipe.shipped import shipped

EXTENDS = "extends"
OWN_KEYS = ("name", "output")
MAX_VALUES, MAX_DEPTH = 100_000, 50


def read_recipe(path: Path) -> dict[str, Any]:
    """The whole recipe, `extends` followed and removed; `${...}` stays as written.

    ConfigError for a file that does not exist, is not a YAML mapping or extends itself, and for a dropped arm that is
    not there.
    """
    return _read(path, ())


def recipe_files(path: Path) -> list[Path]:
    """The recipe and every file that it extends, for one that `read_recipe` can read."""
    other = _load(path, None).get(EXTENDS)
    return [path, *(recipe_files(path.parent / other) if other else [])]


def recipe_hash(path: Path) -> str:
    """What the recipe says, whichever files say it: equal for equal trees, in the order that they are written in."""
    return hashlib.sha256(json.dumps(read_recipe(path), default=str).encode()).hexdigest()[:16]


def check_size(text: str) -> None:
    """ValueError for YAML that is larger or deeper, once its aliases are written out, than a recipe can be.

    A few lines of aliases to aliases stand for 10^9 values, and one that stands within itself for infinitely many.
    """
    if len(text) > MAX_VALUES:
        raise ValueError(f"{len(text)} characters; at most {MAX_VALUES:,} are allowed")
    depth, sizes = 0, dict[int, int]()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")

    def size_of(node: yaml.Node | None) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_VALUES  # until it is known: where an alias stands within what it names
            inside = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = (part for item in inside for part in (item if isinstance(item, tuple) else (item,)))
            sizes[id(node)] = 1 + sum(map(size_of, parts))
        return sizes[id(node)]

    if (size := size_of(yaml.compose(text, Loader=yaml.SafeLoader))) > MAX_VALUES:
        raise ValueError(f"its aliases stand for {size:,} values; at most {MAX_VALUES:,} are allowed")


def _read(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    chain = (*extending, path)
    if path.resolve() in [file.resolve() for file in extending]:
        raise ConfigError(f"recipe {path} extends itself: {' -> '.join(map(str, chain))}; remove one `extends`")
    tree = _load(path, extending[-1] if extending else None)
    if EXTENDS not in tree:
        return tree
    other = tree.pop(EXTENDS)
    if not isinstance(other, str) or not other:
        raise ConfigError(f"{path}: extends={other!r} must be one recipe file, relative to this one, e.g. paper.yaml")
    base = _read(path.parent / other, chain)
    for key in OWN_KEYS:
        base.pop(key, None)
    arms = _merged_arms(path, base.pop("arms", None) or {}, tree.pop("arms", None) or {})
    return {**merged(base, tree), "arms": arms}


def _load(path: Path, extending: Path | None) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise ConfigError(f"recipe {path} is a folder; name a YAML file")
    if not path.is_file():
        by = f", which {extending} extends," if extending else ""
        raise ConfigError(f"recipe {path}{by} does not exist{_instead(path)}")
    try:
        check_size(path.read_text(encoding="utf-8"))
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, YAMLError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path} is a {type(tree).__name__}; it needs `arms:` and other keys, a mapping")
    return tree


def _instead(path: Path) -> str:
    """What may have been meant by a file that does not exist, else what there is."""
    here = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    if near := did_you_mean(path.stem, {name: name for name in shipped()} | {file.stem: file for file in here}):
        return near
    there = f"; there are {', '.join(map(str, here))}" if here else ""
    return f"{there}; by name there are {', '.join(shipped())}"


def _merged_arms(path: Path, base: Any, own: Any) -> dict[str, Any]:
    """Arms of both, those of `base` first."""
    if not isinstance(base, dict) or not isinstance(own, dict):
        raise ConfigError(f"recipe {path}: `arms` must be a mapping of arm names, here and in the file it extends")
    if unknown := [str(name) for name, arm in own.items() if arm is None and name not in base]:
        raise ConfigError(
            f"{path}: arms.{unknown[0]}: null drops an arm of the extended recipe, which has no such arm; its arms are "
            f"{', '.join(map(str, base))}. For an arm without keys of its own write {unknown[0]}: {{}}"
        )
    dropped = [name for name, arm in own.items() if arm is None]
    kept = {name: arm for name, arm in base.items() if name not in dropped}
    return merged(kept, {name: arm for name, arm in own.items() if arm is not None})


def merged(base: Any, own: Any, key: str = "") -> Any:
    """`own` over `base`."""
    if not isinstance(base, dict) or not isinstance(own, dict) or (key == "objective" and "name" in own):
        return own
    both = {name: merged(base[name], value, str(name)) if name in base else value for name, value in own.items()}
    return {**base, **both}
