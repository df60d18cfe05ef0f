"""From an arm's `objective` mapping to the object: names, import paths, parameters, anchors."""

import importlib
from dataclasses import fields
from typing import Any

from eaft_verl.objectives import KINDS, L2_KIND, LABEL_ESTIMATORS, OBJECTIVES, TOPK_KIND, Anchor, Objective


def build_objective(name: str, **params: Any) -> Objective:
    """The named objective (or `module:Class`) with its parameters.

    Raises ValueError that lists what exists for an unknown name or parameter, or says which value is out of range.
    """
    cls, preset = _import_objective(name) if ":" in name else _known_objective(name)
    known = sorted(item.name for item in fields(cls))
    if unknown := sorted(params.keys() - set(known)):
        raise ValueError(f"objective.{unknown[0]} is unknown for {name!r}; it takes {', '.join(known)}")
    try:
        if params.get("anchor") is not None:
            params["anchor"] = build_anchor(params["anchor"])
        return cls(**{**preset, **params})
    except ValueError as error:
        raise ValueError(f"objective {name!r}: {error}") from None
    except (Exception, SystemExit) as error:
        if ":" not in name:
            raise
        raise ValueError(f"objective {name!r} cannot be made: {error!r}") from None


LACKING = {  # need of an objective: what only an arm of `eaft train` gives, and how to do without
    "base": "a forward pass of the starting model over the data",
    "sample_weight": "a weight of each example",
    "tau": "the median loss of the whole batch; give a number, e.g. tau=1",
    "progress": "the share of updates made; warmup=0, transition=0 do without",
    "old_logprob": "log-probabilities of an earlier model",
}


def build_stateless(name: str, **params: Any) -> Objective:
    """The named objective for a trainer that gives a loss one micro-batch and nothing else; ValueError says what it
    would need besides."""
    objective = build_objective(name, **params)
    needs = objective.needs | ({"base"} if objective.needs_base else set())
    lacking = [what for need, what in LACKING.items() if need in needs]
    if objective.weight_norm == "batch_mean":
        lacking.append("the mean weight of the whole batch; weight_norm=none does without, at another scale")
    if objective.anchor is not None:
        lacking.append("a frozen reference or the starting weights (anchor)")
    if objective.sets_rates:
        lacking.append("the optimizer's learning rate")
    if lacking:
        raise ValueError(f"objective {name!r} needs {lacking[0]}; as it is, it runs as an arm of `eaft train` only")
    return objective


def _known_objective(name: str) -> tuple[type[Objective], dict[str, Any]]:
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective.name={name!r} is unknown; choose one of {', '.join(OBJECTIVES)}, or 'module:Class' for your own"
        )
    return OBJECTIVES[name]


def _import_objective(name: str) -> tuple[type[Objective], dict[str, Any]]:
    module, _, attribute = name.partition(":")
    if not module or module.startswith("."):
        raise ValueError(f"objective.name={name!r} must be 'package.module:Class', with the whole module path")
    try:
        cls = vars(importlib.import_module(module))[attribute]
    except (Exception, SystemExit) as error:  # it is somebody else's code
        raise ValueError(f"objective.name={name!r} cannot be imported ({error!r}); is it on PYTHONPATH?") from None
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise ValueError(f"objective.name={name!r} must be a subclass of eaft_verl.objectives.Objective")
    return cls, {}


def build_anchor(params: Any) -> Anchor:
    """The anchor of a recipe's `objective.anchor` mapping; ValueError says what is wrong and what is allowed."""
    if isinstance(params, Anchor):
        return params
    if not isinstance(params, dict):
        raise ValueError(f"objective.anchor={params!r} must be a mapping, e.g. {{kind: forward_kl, coef: 0.5}}")
    known = [item.name for item in fields(Anchor)]
    if unknown := sorted(map(str, params.keys() - set(known))):
        raise ValueError(f"objective.anchor.{unknown[0]} is unknown; it takes {', '.join(known)}")
    if (kind := params.get("kind")) in LABEL_ESTIMATORS:
        raise ValueError(
            f"objective.anchor.kind={kind!r} looks at the label token only. On given data that is no KL and no anchor: "
            "with k1 = ln p(y) - ln r(y), cross-entropy + beta * k1 is plain SFT scaled by (1 - beta), and k2, k3 "
            f"only reweight it. Use one of {', '.join(KINDS)}"
        )
    if "k" in params and params.get("kind") != TOPK_KIND:
        raise ValueError(f"objective.anchor.k belongs to kind={TOPK_KIND}; {kind or 'forward_kl'} uses every token")
    if kind == L2_KIND and "coef" not in params:
        raise ValueError(
            "objective.anchor.coef is needed for kind=l2, whose pull per update is lr * coef: 1 / (lr * updates) holds "
            "the weights noticeably"
        )
    return Anchor(**params)
