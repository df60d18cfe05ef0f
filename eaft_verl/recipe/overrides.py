"""The `key=value` words of a command line: one tree, and what of it is said of single arms."""

from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from eaft_verl.errors import ConfigError, did_you_mean
from eaft_verl.recipe.file import merged

Arms = dict[str, dict[str, Any]]


def overrides_tree(items: Iterable[str]) -> dict[str, Any]:
    """`key=value` words as one tree; ConfigError for a word that is not that."""
    items = list(items)
    for item in items:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"override {item!r} must be key=value, for example verl.optim.lr=2e-5")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.from_dotlist(items), throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"overrides {' '.join(items)}: {str(error).splitlines()[0]}") from None
    return dict(tree)


def arm_words(where: str, arms: Arms, words: dict[str, Any]) -> tuple[Arms, Arms]:
    """(the arms with what `arms.NAME.key=value` says of them, that alone); it is taken out of `words`.

    ConfigError for an arm that the recipe does not have, or a word that names no key of one.
    """
    said = words.pop("arms", {})
    if not isinstance(said, dict):
        raise ConfigError(f"arms={said!r} must name an arm and a key, arms.NAME.key=value; --arms says which arms run")
    for name, own in said.items():
        if name not in arms:
            near = did_you_mean(name, arms.keys())
            raise ConfigError(f"arms.{name}: {where} has no arm {name!r}; its arms are {', '.join(arms)}{near}")
        if not isinstance(own, dict):
            raise ConfigError(f"arms.{name}={own!r} must name a key, arms.{name}.key=value; --arms says which arms run")
    check_shared("command line", said)
    return {name: merged(own, said.get(name, {})) for name, own in arms.items()}, said


def check_shared(where: str, arms: Arms) -> None:
    """ConfigError for a key that one arm sets and that holds for all."""
    for key in ("compare", "choose"):
        if bad := [name for name, arm in arms.items() if key in arm]:
            raise ConfigError(
                f"{where}: arms.{bad[0]} sets {key}, which holds for all arms; move it to the shared part"
            )
