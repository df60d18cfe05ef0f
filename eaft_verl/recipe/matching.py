"""Which arm gives the others their budget, and which arm a control belongs to: read off the recipe alone."""

from collections.abc import Mapping
from typing import Any

from eaft_verl.errors import ConfigError
from eaft_verl.recipe.budgets import MATCHES

GRPO = "grpo"
CONTROLS = ("nll",)
LENGTH_KEYS = ("verl.trainer.total_epochs", "verl.trainer.total_training_steps")
UPDATE_KEYS = (*LENGTH_KEYS, "verl.data.train_batch_size")
OWN_DATA = ("replay", "self_sft")  # keys of an arm by which it trains on other rows than the others
AFTERWARDS = ("tokens", "device_seconds")  # what a GRPO arm has spent of these is known only when it has finished

Arms = Mapping[str, Mapping[str, Any]]


def budget_source(
    arms: Arms, trainers: Mapping[str, str], arm: str, compare: Mapping[str, Any], *, fixed: bool = False
) -> tuple[str, str | None]:
    """(arm the others are matched to, arm whose finished run gives `arm` its budget or None where it needs none).

    In updates, arms that share batch size and length are equal as they stand and wait for nobody. fixed: the recipe
    gives all arms a number of steps; else arms are as long as their data, and one with data of its own waits.
    ConfigError for an unknown match or arm, and for an arm that cannot meet the budget or sets its own length.
    """
    match, to = compare["match"], _reference(arms, trainers, compare)
    if match == "none" or arm == to or arms[arm].get("average"):  # an average is not trained
        return to, None
    matched = f"compare.match={match} makes it as long as arm {to}"
    if stated := [key for key in LENGTH_KEYS if _sets(arms[arm], key)]:
        raise ConfigError(
            f"arm {arm} sets {stated[0]}, but {matched}; remove the key, or set compare.to={arm} or compare.match=none"
        )
    if trainers[arm] == GRPO and match in AFTERWARDS:
        raise ConfigError(
            f"arm {arm} has trainer=grpo, which cannot be stopped at a number of {match}, but {matched}; "
            f"set compare.to={arm}, or match updates or samples"
        )
    if match != "updates" or trainers[arm] != trainers[to]:
        return to, to
    return to, None if _equally_long(arms[arm], arms[to], fixed) else to


def _equally_long(arm: Mapping[str, Any], other: Mapping[str, Any], fixed: bool) -> bool:
    """Whether two arms of one trainer make equally many updates as they stand; `fixed` as for `budget_source`."""
    if any(_sets(one, key) for one in (arm, other) for key in UPDATE_KEYS):
        return False
    return fixed or all(arm.get(key) == other.get(key) for key in OWN_DATA)


def _reference(arms: Arms, trainers: Mapping[str, str], compare: Mapping[str, Any]) -> str:
    match, to = compare["match"], compare["to"]
    if match not in MATCHES:
        raise ConfigError(f"compare.match={match!r} is not one of {', '.join(MATCHES)}")
    ordinary = [name for name, own in arms.items() if not (own.get("control") or own.get("average"))]
    if not ordinary:
        raise ConfigError("every arm is a control or an average; a comparison needs the arms that they belong to")
    if to is None:
        last = [name for name in ordinary if trainers[name] == GRPO] if match not in ("updates", "none") else []
        return (last or ordinary)[0]
    if to not in arms:
        raise ConfigError(f"compare.to={to!r} is no arm of the recipe; its arms are {', '.join(arms)}")
    if to not in ordinary:
        what = "a control" if arms[to].get("control") else "an average"
        raise ConfigError(f"compare.to={to}: {what} cannot give the others their budget; name one of {ordinary}")
    return to


def check_control(arms: Arms, trainers: Mapping[str, str], arm: str, control: Any) -> None:
    """ConfigError unless `control` is {of: an SFT-trained arm that is no control, by: nll}, or None."""
    if control is None:
        return
    if not isinstance(control, Mapping) or set(control) != {"of", "by"}:
        raise ConfigError(f"arm {arm}: control={control!r} must be {{of: ARM, by: {' or '.join(CONTROLS)}}}")
    of, by = control["of"], control["by"]
    if by not in CONTROLS:
        raise ConfigError(f"arm {arm}: control.by={by!r} is not one of {', '.join(CONTROLS)}")
    if of not in arms or of == arm:
        others = ", ".join(name for name in arms if name != arm)
        raise ConfigError(f"arm {arm}: control.of={of!r} is no other arm of the recipe; those are {others}")
    if arms[of].get("control"):
        raise ConfigError(f"arm {arm}: control.of={of}, which is a control itself; name the arm it is a control of")
    if arms[of].get("average"):
        raise ConfigError(f"arm {arm}: control.of={of}, which is an average and not trained; name a trained arm")
    if trainers[of] == GRPO:
        raise ConfigError(
            f"arm {arm}: control.of={of} has trainer=grpo, which has no NLL of demonstrations to be "
            "matched by; use compare.match to give it and SFT equal budgets"
        )


def _sets(own: Mapping[str, Any], dotted: str) -> bool:
    node: Any = own
    for part in dotted.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True
