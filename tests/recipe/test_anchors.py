"""`objective.anchor`: what is accepted, what is refused and in which words."""

from typing import Any

import pytest

from eaft_verl.objectives import LABEL_ESTIMATORS, OBJECTIVES, Anchor, Dft, Eaft, Sft
from eaft_verl.recipe.objective import build_objective


def refused(name: str = "sft", **params: Any) -> str:
    with pytest.raises(ValueError, match="objective|anchor") as caught:
        build_objective(name, **params)
    return str(caught.value)


@pytest.mark.parametrize(("name", "gate", "coef"), [("sft_kl", Sft, 0.5), ("asft", Dft, 0.05)])
def test_presets(name: str, gate: type, coef: float) -> None:
    objective = build_objective(name)
    assert type(objective) is gate and objective.anchor == Anchor(kind="forward_kl", coef=coef)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_any_gate_takes_an_anchor(name: str) -> None:
    anchor = build_objective(name, anchor={"kind": "forward_kl_topk", "coef": 0.1, "k": 32}).anchor
    assert anchor == Anchor(kind="forward_kl_topk", coef=0.1, k=32) and not anchor.full


def test_none_is_no_anchor() -> None:
    assert build_objective("sft_kl", anchor=None).anchor is None
    assert build_objective("eaft") == Eaft()


@pytest.mark.parametrize("kind", LABEL_ESTIMATORS)
def test_label_token_estimators_are_refused_with_the_reason(kind: str) -> None:
    message = refused(anchor={"kind": kind, "coef": 0.5})
    assert repr(kind) in message and "plain SFT scaled by (1 - beta)" in message and "forward_kl_topk" in message


@pytest.mark.parametrize(
    ("anchor", "words"),
    [
        (
            {"kind": "kl_forward"},
            ["anchor.kind='kl_forward'", "forward_kl, reverse_kl, mask_target, forward_kl_topk, l2"],
        ),
        ({"kind": "forward_kl", "coef": 0}, ["anchor.coef=0", "a number in (0, inf)"]),
        ({"kind": "forward_kl", "coef": "big"}, ["anchor.coef='big'"]),
        ({"kind": "forward_kl", "beta": 1}, ["objective.anchor.beta is unknown", "kind, coef, k, reference"]),
        ({"kind": "forward_kl", "k": 10}, ["objective.anchor.k belongs to kind=forward_kl_topk"]),
        ({"kind": "forward_kl_topk", "k": 1}, ["anchor.k=1", "at least 2"]),
        ({"kind": "forward_kl", "reference": 3}, ["anchor.reference=3", "folder or hub id"]),
        ({"kind": "l2"}, ["objective.anchor.coef is needed for kind=l2", "1 / (lr * updates)"]),
        ({"kind": "l2", "coef": 1, "reference": "m"}, ["anchor.reference must be null for kind=l2"]),
        ({"kind": "l2", "coef": 1, "k": 8}, ["objective.anchor.k belongs to kind=forward_kl_topk"]),
        ({"kind": "mask_target", "k": 8}, ["objective.anchor.k belongs to kind=forward_kl_topk"]),
        ("forward_kl", ["objective.anchor='forward_kl' must be a mapping"]),
        (True, ["must be a mapping"]),
    ],
)
def test_what_is_wrong_is_named(anchor: Any, words: list[str]) -> None:
    message = refused(anchor=anchor)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"updates_per_refresh": 0}, "a whole number of at least 1"),
        ({"updates_per_refresh": 2.0}, "a whole number of at least 1"),
        ({"clip_low": 1.5}, "[0, 1]"),
        ({"weight_norm": "batch_mean"}, "must be none"),
        ({"stats": "base"}, "must be current"),
    ],
)
def test_psft_parameters(params: dict[str, Any], words: str) -> None:
    assert words in refused("psft", **params)
