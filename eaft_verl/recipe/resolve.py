"""Recipe + arm + overrides -> one resolved configuration, checked before anything is loaded.

Layers, later wins: verl 0.9.1's SFT tree (composed by Hydra), `defaults.yaml` (the paper), what the device forces, the
recipe, its arm, `key=value` overrides. A key that is not in the tree is an error with a suggestion.
"""

import copy
import difflib
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eaft_verl.boundary import in_cluster
from eaft_verl.errors import ConfigError, did_you_mean
from eaft_verl.recipe.chains import KEYS, check_no_circle, check_only_in_arms, needed_arms, own_blocks
from eaft_verl.recipe.config import OF_SFT, Config, configuration, own_defaults
from eaft_verl.recipe.file import read_recipe
from eaft_verl.recipe.keys import (
    ENGINE_OF_GRPO,
    FREE_KEYS,
    GRPO_ONLY,
    OPEN_KEYS,
    OURS_INSTEAD,
    PARTS,
    SOURCE_KEYS,
    TEXT_KEYS,
    VERL_KEYS,
    VERL_TREE,
    WITHOUT_EFFECT,
)
from eaft_verl.recipe.matching import budget_source, check_control
from eaft_verl.recipe.overrides import arm_words, check_shared, overrides_tree
from eaft_verl.recipe.shipped import find_recipe, require_no_spec
from eaft_verl.recipe.verl_keys import grpo_tree, lay, verl_defaults

FUSED = ("torch.optim", "AdamW")
DEVICES = ("auto", "cpu", "cuda")
_OF_VERL = {  # keys without effect in an arm with trainer: grpo: why
    **dict.fromkeys(("objective", "fused_head"), "whose loss is verl's"),
    "async_save": "whose states verl writes",
}
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


@dataclass(frozen=True)
class Recipe:
    """A recipe file: what all arms share, and what each arm says of its own."""

    path: Path
    name: str
    shared: dict[str, Any]
    arms: dict[str, dict[str, Any]]


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe YAML and what it extends; ConfigError for a missing file, broken YAML, a bad name or no arms."""
    path = find_recipe(Path(path))
    tree = read_recipe(path)
    require_no_spec(path, tree)
    if not isinstance(tree.get("arms"), dict) or not tree["arms"]:
        raise ConfigError(
            f"recipe {path} needs `arms:` with at least one arm, e.g. arms: {{sft: {{objective: {{name: sft}}}}}}"
        )
    arms = {str(name): arm or {} for name, arm in tree.pop("arms").items()}
    if bad := [name for name, arm in arms.items() if not isinstance(arm, dict)]:
        raise ConfigError(
            f"{path}: arms.{bad[0]} must be a mapping of the keys it sets, e.g. {{objective: {{name: sft}}}}"
        )
    name = tree.get("name") or path.stem
    for label in (name, *arms):
        check_name(label)
    check_shared(f"{path}", arms)
    if "base" in arms:
        raise ConfigError("an arm cannot be called 'base': that is the untrained model, which is always evaluated")
    return Recipe(path, name, tree, arms)


def resolve(recipe: Recipe, arm: str, overrides: Iterable[str] = ()) -> Config:
    """The whole configuration of one arm, read-only. Cross-field checks are `checks.check(...)`."""
    if arm not in recipe.arms:
        near = did_you_mean(arm, recipe.arms.keys())
        raise ConfigError(f"{recipe.path} has no arm {arm!r}; its arms are {', '.join(recipe.arms)}{near}")
    defaults, words = own_defaults(), overrides_tree(overrides)
    layers = [(f"{recipe.path}", recipe.shared), (f"{recipe.path}: arms.{arm}", recipe.arms[arm])]
    recipe, of_arms = _with_words(recipe, words)
    layers += [("command line", words), (f"command line: arms.{arm}", of_arms.get(arm, {}))]  # the arm's own are last
    check_only_in_arms([layers[0], layers[2]])
    trainer, device = _trainer(layers), _device(layers)
    tree = {**defaults, "verl": _verl_tree(defaults["verl"], trainer)}
    if trainer == "grpo":
        lay(tree["verl"], grpo_tree(device))
    _apply_device(tree, device)
    pristine = copy.deepcopy(tree)
    for where, layer in layers:
        _merge(tree, layer, where, pristine)
    _fuse_optimizer(tree["verl"]["optim"])
    if trainer == "grpo":
        tree |= dict.fromkeys(OF_SFT)
    tree["name"] = tree["name"] or recipe.name
    check_name(tree["name"])
    tree["output"] = str(Path(tree["output"] or Path("runs") / tree["name"]).expanduser().absolute())
    tree |= {"recipe": str(recipe.path), "arm": arm, **_matched(recipe, arm, tree, words)}
    if tree["start"] and isinstance((tree["objective"] or {}).get("anchor"), dict):
        tree["objective"]["anchor"].setdefault("reference", None)  # what training puts another value into
    try:
        return configuration(tree)
    except ConfigError as error:
        raise ConfigError(f"{recipe.path}: {error}") from None


def _with_words(recipe: Recipe, words: dict[str, Any]) -> tuple[Recipe, dict[str, dict[str, Any]]]:
    arms, said = arm_words(f"{recipe.path}", recipe.arms, words)
    return replace(recipe, arms=arms), said


def _matched(recipe: Recipe, arm: str, tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """What the arms say of each other: `compare` with its arm named, `budget`: {of: arm whose run gives this one its
    budget} or null, and the blocks of `chains`."""
    shared, arms = recipe.shared.get("trainer", "sft"), recipe.arms
    trainers = {name: overrides.get("trainer", own.get("trainer", shared)) for name, own in arms.items()}
    fixed = tree["verl"]["trainer"]["total_training_steps"] is not None
    known: dict[str, dict[str, Any]] = {}

    def decided(name: str) -> dict[str, Any]:
        if name not in known:
            control = tree["control"] if name == arm else arms[name].get("control")
            check_control(arms, trainers, name, control)
            to, of = budget_source(arms, trainers, name, tree["compare"], fixed=fixed)
            compare = {**tree["compare"], "to": to}
            known[name] = {"compare": compare, "control": control, "budget": {"of": of} if of else None}
            known[name] |= own_blocks(arms, trainers, name)
        return known[name]

    check_no_circle(arm, lambda name: needed_arms(name, decided(name)))
    return decided(arm)


def check_name(name: Any) -> None:
    """ConfigError for what cannot be the name of an experiment or arm, and with it of a folder."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"name {name!r} must be letters, digits, dot, dash or underscore, at most 128 characters")


def declared_keys(recipe: Recipe, arm: str, overrides: Iterable[str] = ()) -> list[str]:
    """Dotted keys that the arm itself sets: the only ones in which compared arms may differ."""
    recipe, _ = _with_words(recipe, overrides_tree(overrides))
    keys: list[str] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for name, item in value.items():
                walk(f"{prefix}.{name}" if prefix else str(name), item)
        elif prefix:
            keys.append(prefix)

    walk("", recipe.arms[arm])
    return sorted({*keys, *(key for key in KEYS if recipe.arms[arm].get(key))})


def _verl_tree(ours: dict[str, Any], trainer: str) -> dict[str, Any]:
    """verl's own SFT configuration, composed from the installed package without importing it, less what is not ours."""
    tree = verl_defaults(VERL_TREE)
    kept = {part: tree[part] for part in ("model", "engine", "optim")}
    kept |= {part: {key: tree[part][key] for key in keys} for part, keys in VERL_KEYS.items()}
    # fields that verl reads and its YAML does not list
    kept["engine"] |= {"mixed_precision": None, "wrap_policy": {"disable": None}}
    absent = [*WITHOUT_EFFECT, *(key for key in OURS_INSTEAD if key.split(".")[1] in kept)]
    if trainer != "grpo":
        absent += [f"verl.engine.{key}" for key in ENGINE_OF_GRPO]
    for dotted in (*absent, "verl.model.hf_config_path", "verl.model.tokenizer_path"):
        _verl, part, key = dotted.split(".", 2)
        kept[part].pop(key, None)
    for dotted, names in PARTS.items():
        _verl, part, key = dotted.split(".")
        kept[part][key] = {name: kept[part][key][name] for name in names}
    _merge(kept, ours, "defaults.yaml", kept, prefix="verl")
    return kept


def _trainer(layers: list[tuple[str, dict[str, Any]]]) -> str:
    """The arm's trainer; what an arm says itself and its trainer has no use for is refused."""
    trainer = next((layer["trainer"] for _, layer in reversed(layers) if "trainer" in layer), "sft")
    if trainer == "sft" and "reward" in layers[1][1]:
        raise ConfigError(f"{layers[1][0]}: reward has no effect with trainer: sft, which generates nothing; remove it")
    for where, layer in layers[1:]:
        for key, why in _OF_VERL.items():
            if trainer == "grpo" and key in layer:
                raise ConfigError(f"{where}: {key} has no effect with trainer: grpo, {why}; remove it")
        if trainer == "grpo" and layer.get("meter") is not None:
            raise ConfigError(f"{where}: meter has no effect with trainer: grpo, which cannot read it; remove it")
    return trainer


def _device(layers: list[tuple[str, dict[str, Any]]]) -> str:
    chosen = "auto"
    for where, layer in layers:
        chosen = layer.get("device", chosen)
        if chosen not in DEVICES:
            raise ConfigError(f"{where}: device={chosen!r} is not one of {', '.join(DEVICES)}")
    if chosen == "auto":
        return "cuda" if shutil.which("nvidia-smi") or in_cluster() else "cpu"
    return chosen


def _apply_device(tree: dict[str, Any], device: str) -> None:
    """What a CPU cannot do: flash-attention, compiled entropy; gradient checkpointing only costs time there."""
    if device == "cpu":
        tree["verl"]["model"]["override_config"] = {"attn_implementation": "sdpa"}
        tree["verl"]["model"]["enable_gradient_checkpointing"] = False
        tree["verl"]["engine"] |= {key: False for key in ("use_torch_compile",) if key in tree["verl"]["engine"]}
    tree["device"] = device


def _fuse_optimizer(optim: dict[str, Any]) -> None:
    """AdamW in one pass over the weights where nothing is said. By itself torch takes them one by one on a CPU, and all
    of them operation by operation on a GPU, which holds the root of every second moment at once."""
    if optim["override_optimizer_config"] is None and (optim["optimizer_impl"], optim["optimizer"]) == FUSED:
        optim["override_optimizer_config"] = {"fused": True}


def _merge(base: dict[str, Any], layer: dict[str, Any], where: str, pristine: Any, prefix: str = "") -> None:
    """Write `layer` into `base` in place; unknown keys and values of another kind are errors.

    `pristine`: `base` as it was before any layer; null undoes a layer's value wherever null is the default.
    """
    for key, value in layer.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if dotted == "device":
            continue  # resolved once, before the layers, because it changes the defaults they are laid on
        if key not in base or key == "_target_":
            raise ConfigError(f"{where}: {_unknown(dotted, key, base)}")
        default = pristine.get(key) if isinstance(pristine, dict) else None
        if isinstance(default, dict) and dotted not in OPEN_KEYS:
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {dotted}={value!r} must be a mapping with keys {', '.join(base[key])}")
            _merge(base[key], value, where, default, dotted)
        else:
            base[key] = _laid(where, dotted, base[key], default, value)


def _laid(where: str, dotted: str, before: Any, default: Any, value: Any) -> Any:
    """What a key holds once `value` is laid over `before`."""
    if value is None and default is None:
        return None
    if dotted in SOURCE_KEYS:
        return _sources(where, dotted, before, value)
    if dotted not in OPEN_KEYS:
        return _typed(where, dotted, before, value)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{where}: {dotted}={value!r} must be a mapping")
    # an objective is chosen whole: parameters of another one must not survive underneath
    if value is None or (dotted == "objective" and "name" in value):
        return value
    return {**(before or {}), **value}


def _sources(where: str, dotted: str, before: Any, value: Any) -> Any:
    """Where data comes from, checked as far as its kind goes."""
    if not isinstance(value, str | dict | list):
        raise ConfigError(f"{where}: {dotted}={value!r} must be text, or a mapping of names to sources")
    return _merged_sources(before, value)


def _merged_sources(before: Any, value: Any) -> Any:
    """A mapping over a mapping changes the sources that it names; anything else takes the place of what was there."""
    if not (isinstance(before, dict) and isinstance(value, dict)):
        return value
    return before | value | {name: _merged_sources(before[name], value[name]) for name in before.keys() & value.keys()}


def _unknown(dotted: str, key: str, siblings: dict[str, Any]) -> str:
    if dotted in GRPO_ONLY:
        return f"{dotted} is for arms with trainer: grpo, and this one has trainer: sft"
    if dotted in WITHOUT_EFFECT:
        return f"{dotted} has no effect: {WITHOUT_EFFECT[dotted]}"
    if dotted in OURS_INSTEAD:
        return f"{dotted} is set through `{OURS_INSTEAD[dotted]}`"
    close = difflib.get_close_matches(str(key), [str(name) for name in siblings], n=1)
    hint = f"did you mean {dotted.rpartition('.')[0] + '.' if '.' in dotted else ''}{close[0]}?" if close else ""
    return f"unknown key {dotted}; {hint or 'allowed here: ' + ', '.join(map(str, siblings))}"


def _typed(where: str, dotted: str, default: Any, value: Any) -> Any:
    """The value, when it is of the default's kind. A default of None says nothing of the kind."""
    if dotted in TEXT_KEYS and not (value is None or isinstance(value, str)):
        raise ConfigError(f"{where}: {dotted}={value!r} must be text")
    kind = type(default)
    refers = isinstance(value, str) and "${" in value
    if default is None or kind is dict or dotted in FREE_KEYS or refers:
        return value
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits:
        said = {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(kind, "a list")
        raise ConfigError(f"{where}: {dotted}={value!r} must be {said}, such as {default!r}")
    return float(value) if kind is float else value
