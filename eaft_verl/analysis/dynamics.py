"""Fig. 4 of arXiv 2601.02151: how the loss of groups of tokens moves while a model is trained.

Groups are fixed by the model before training and hold the same tokens at every step; the live groups beside them are
formed anew from each model's own statistics, so that tokens enter and leave them (a token that is learnt is no conflict
any more, whatever happened to the others).
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from eaft_verl.analysis.blocks import CONFLICT, Array, Block, blocks
from eaft_verl.analysis.store import TokenStore
from eaft_verl.errors import DataError
from eaft_verl.tokens.stats import HIGH_ENTROPY, LOW_ENTROPY

GROUPS = ("high_entropy", "low_entropy", "conflict", "no_conflict")
COLUMNS = ("sample", "position", "token", "logprob", "entropy")
Row = dict[str, Any]


class Later(NamedTuple):
    """A store of the same data under a model that has been trained."""

    arm: str
    step: int
    store: TokenStore


def dynamics(base: TokenStore, later: Iterable[Later]) -> list[Row]:
    """[{arm, step, tokens, fixed: {group: {tokens, nll, prob}}, live: the same}]; the first row is the base, step 0.

    nll: mean of -log p(label), nats; prob: mean of p. None for a group without tokens.
    DataError: a store of other data, or of another template.
    """
    rows = [{"arm": "base", "step": 0, **_measured(base, base)}]
    for item in sorted(later, key=lambda item: (item.arm, item.step)):
        rows.append({"arm": item.arm, "step": item.step, **_measured(base, item.store)})
    return rows


def _measured(base: TokenStore, store: TokenStore) -> Row:
    for key in ("data", "template"):
        if store.meta["keys"][key] != base.meta["keys"][key]:
            raise DataError(
                f"{store.path} holds other tokens than {base.path}: their {key} keys differ; analyse the same data"
            )
    fixed, live, tokens = np.zeros((len(GROUPS), 3)), np.zeros((len(GROUPS), 3)), 0
    for before, now in zip(blocks(base, COLUMNS, {}), blocks(store, COLUMNS, {}), strict=True):
        if len(before) != len(now) or any((before[name] != now[name]).any() for name in COLUMNS[:3]):
            raise DataError(
                f"{store.path} and {base.path} do not hold the same tokens in the same order; analyse again"
            )
        tokens += len(now)
        for sums, judge in ((fixed, before), (live, now)):
            for row, inside_T in zip(sums, _groups(judge), strict=True):
                row += (inside_T.sum(), -now["logprob"][inside_T].sum(dtype=np.float64), now.prob_T[inside_T].sum())
    return {"tokens": tokens, "fixed": _means(fixed), "live": _means(live)}


def _groups(block: Block) -> Sequence[Array]:
    conflict_T = block.regime_T == CONFLICT
    return block["entropy"] >= HIGH_ENTROPY, block["entropy"] <= LOW_ENTROPY, conflict_T, ~conflict_T


def _means(sums: Array) -> Row:
    return {
        name: {"tokens": int(size), "nll": nll / size if size else None, "prob": prob / size if size else None}
        for name, (size, nll, prob) in zip(GROUPS, sums.tolist(), strict=True)
    }
