"""Arms made from other arms, and arms with data of their own: read off the recipe alone.

start     {arm, step}: training begins at that arm's export and not at the recipe's model
average   {of, with, weights}: nothing is trained; w * of + (1 - w) * with is exported for every weight w
replay    {data, share, columns}: so much of the arm's training rows are others'
self_sft  {data, columns}: rows that take the place of data.train, such as the model's own verified answers
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from eaft_verl.errors import ConfigError, require
from eaft_verl.recipe.matching import GRPO, OWN_DATA, Arms

KEYS = ("start", "average", "replay", "self_sft")
LAST, CHOSEN, BASE = "last", "chosen", "base"
START = "start"  # objective.anchor.reference: the model that the arm starts from
_FIELDS = {
    "start": (("arm",), ("step",)),
    "average": (("of", "weights"), ("with",)),
    "replay": (("data", "share"), ("columns",)),
    "self_sft": (("data",), ("columns",)),
}
_EXAMPLES = {
    "start": "sft, or {arm: sft, step: 16}",
    "average": "{of: sft, with: base, weights: [0.25, 0.5, 0.75]}",
    "replay": "{data: general.jsonl, share: 0.2}",
    "self_sft": "{data: own.jsonl}",
}


def own_blocks(arms: Arms, trainers: Mapping[str, str], arm: str) -> dict[str, Any]:
    """The arm's `KEYS`, every field filled in, null where it does not set them.

    ConfigError for a field that is missing, unknown or out of range, an arm that does not exist, and for what cannot
    be meant together.
    """
    own = arms[arm]
    found: dict[str, Any] = {key: _block(arm, key, own.get(key)) for key in KEYS}
    if found["start"]:
        _check_start(arms, arm, found["start"])
    if found["average"]:
        _check_average(arms, arm, found["average"])
    for key in OWN_DATA:
        if found[key]:
            _check_data(arms, trainers, arm, key, found[key])
    _check_control(arms, arm)
    return found


def check_only_in_arms(layers: list[tuple[str, dict[str, Any]]]) -> None:
    """ConfigError for one of KEYS outside of an arm of the recipe. layers: (where it stands, what it says)."""
    for where, layer in layers:
        if key := next((key for key in KEYS if key in layer), None):
            advice = "; for all arms write a mixture into data.train" if key in OWN_DATA else ""
            raise ConfigError(f"{where}: {key} is what makes an arm another one; write it under arms.NAME{advice}")


def check_no_circle(arm: str, needs: Callable[[str], Mapping[str, str]]) -> None:
    """ConfigError that names the whole circle of arms that wait for each other, where `arm` leads into one.

    needs: from an arm to {arm that must have finished before: why}.
    """

    def walk(way: list[str], why: list[str]) -> None:
        for before, reason in needs(way[-1]).items():
            if before in way:
                circle = [*way[way.index(before) :], before]
                reasons = [*why[way.index(before) :], reason]
                raise ConfigError(
                    f"arms {' -> '.join(circle)} form a circle, in which each waits for the next: {'; '.join(reasons)}"
                )
            walk([*way, before], [*why, reason])

    walk([arm], [])


def needed_arms(arm: str, tree: Mapping[str, Any]) -> dict[str, str]:
    """{arm that must have finished before this one: why}. tree: of a resolved configuration, blocks filled in."""
    found: dict[str, str] = {}
    if control := tree.get("control"):
        found[control["of"]] = f"{arm} is a control of {control['of']}"
    if budget := tree.get("budget"):
        unit = tree["compare"]["match"]
        found[budget["of"]] = f"{arm} has the budget of {budget['of']} (compare.match={unit}; compare.to names another)"
    if start := tree.get("start"):
        found[start["arm"]] = f"{arm} starts from {start['arm']}"
    if average := tree.get("average"):
        for other in (average["of"], average["with"]):
            if other != BASE:
                found[other] = f"{arm} is an average of {other}"
    return found


def _block(arm: str, key: str, value: Any) -> dict[str, Any] | None:
    """The mapping with all its fields; a bare name of an arm or a file stands for the field it belongs to."""
    if value is None:
        return None
    needed, optional = _FIELDS[key]
    if isinstance(value, str) and len(needed) == 1:
        value = {needed[0]: value}
    allowed = f"e.g. {key}: {_EXAMPLES[key]}"
    require(isinstance(value, Mapping), f"arm {arm}: {key}={value!r} must be a mapping, {allowed}")
    unknown = [str(name) for name in value if name not in (*needed, *optional)]
    require(not unknown, f"arm {arm}: {key}.{unknown and unknown[0]} is unknown; it has {', '.join(needed + optional)}")
    lacking = [name for name in needed if value.get(name) is None]
    require(not lacking, f"arm {arm}: {key}.{lacking and lacking[0]} is missing, {allowed}")
    defaults = {"step": LAST, "with": BASE}
    return {name: defaults.get(name) if value.get(name) is None else value[name] for name in (*needed, *optional)}


def _check_arm(arms: Arms, arm: str, key: str, other: Any, *more: str) -> None:
    """ConfigError unless `other` is another arm whose run holds trained models of its own."""
    names = [name for name in arms if name != arm]
    if other in names:
        require(
            not arms[other].get("average"),
            f"arm {arm}: {key}={other} is an average, several models; name the arm that it is made of",
        )
        return
    require(other != arm, f"arms {arm} -> {arm} form a circle: {key} must be another arm")
    close = difflib.get_close_matches(str(other), names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"those are {', '.join([*more, *names])}"
    raise ConfigError(f"arm {arm}: {key}={other!r} is no other arm of the recipe; {hint}")


def _check_start(arms: Arms, arm: str, start: Mapping[str, Any]) -> None:
    _check_arm(arms, arm, "start.arm", start["arm"])
    step = start["step"]
    require(
        step in (LAST, CHOSEN) or (type(step) is int and step >= 1),
        f"arm {arm}: start.step={step!r} must be {LAST}, {CHOSEN} or the number of an evaluated step",
    )
    require(
        "model" not in arms[arm],
        f"arm {arm}: start={start['arm']} and model={arms[arm].get('model')!r} both say where training begins; "
        "remove one of them",
    )
    _check_same_model(arms, arm, "start.arm", start["arm"])
    adapter = _inside(arms[arm], "verl", "model", "lora_adapter_path")
    require(
        not adapter,
        f"arm {arm}: verl.model.lora_adapter_path={adapter!r} belongs to the model that it was trained on, and "
        f"start={start['arm']} trains from another; remove one of them",
    )


def _check_same_model(arms: Arms, arm: str, key: str, other: str) -> None:
    own, theirs = (arms[name].get("model") for name in (arm, other))
    require(
        own == theirs,
        f"arm {arm}: {key}={other} trains model {theirs!r} of its own, and this arm belongs to "
        f"{own or 'the model of the recipe'!r}; a chain stays with one model",
    )


def _check_average(arms: Arms, arm: str, average: Mapping[str, Any]) -> None:
    more = [key for key in arms[arm] if key != "average"]
    require(not more, f"arm {arm}: {more and more[0]} has no effect beside average, which trains nothing; remove it")
    _check_arm(arms, arm, "average.of", average["of"])
    _check_same_model(arms, arm, "average.of", average["of"])
    other = average["with"]
    if other != BASE:
        _check_arm(arms, arm, "average.with", other, BASE)
        _check_same_model(arms, arm, "average.with", other)
    require(other != average["of"], f"arm {arm}: average.of and average.with are both {other}")
    weights = average["weights"]
    good = isinstance(weights, list | tuple) and weights and all(_is_number(w) and 0 <= w <= 1 for w in weights)
    require(
        good and len(set(weights)) == len(weights),
        f"arm {arm}: average.weights={weights!r} must be different numbers from 0 (average.with) to 1 (average.of), "
        "such as [0.25, 0.5, 0.75]",
    )


def _check_data(arms: Arms, trainers: Mapping[str, str], arm: str, key: str, block: Mapping[str, Any]) -> None:
    data = block["data"]
    require(
        isinstance(data, str) and data.strip(),
        f"arm {arm}: {key}.data={data!r} must name a file, generate:NAME or a hub id org/name",
    )
    require(
        trainers[arm] != GRPO,
        f"arm {arm}: {key} has no effect with trainer: grpo, which learns from answers that it samples itself; remove "
        "it, or change data.train in this arm",
    )
    if key == "replay":
        share = block["share"]
        require(
            _is_number(share) and 0 < share < 1,
            f"arm {arm}: replay.share={share!r} must be above 0 and below 1: the part of the arm's training rows",
        )


def _check_control(arms: Arms, arm: str) -> None:
    """A control differs from its arm in nothing that decides what is learned from."""
    control = arms[arm].get("control")
    of = str(control.get("of")) if isinstance(control, Mapping) else ""
    for key in ("start", *OWN_DATA) if of in arms else ():
        mine, theirs = arms[arm].get(key), arms[of].get(key)
        require(
            mine == theirs,
            f"arm {arm}: it is a control of {of}, which has {key}={theirs!r}, and itself {mine!r}; a control starts "
            f"where its arm does and sees the same data: set both to the same",
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _inside(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
