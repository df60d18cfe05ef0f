"""Everything the page says of a store, as plain data, from two passes over it whose memory does not grow with rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from eaft_verl.analysis.blocks import blocks, candidates, spread
from eaft_verl.analysis.breakdown import TEXTS, Breakdown
from eaft_verl.analysis.clouds import frequent
from eaft_verl.analysis.fidelity import StoredAgreement
from eaft_verl.analysis.gates import Gates, read_gates
from eaft_verl.analysis.gradient import field
from eaft_verl.analysis.landscape import Boxes, Landscape
from eaft_verl.analysis.samples import Words
from eaft_verl.analysis.store import TokenStore
from eaft_verl.analysis.survey import Survey
from eaft_verl.errors import DataError
from eaft_verl.pages.statistics import percentile_interval

COLUMNS = (
    *("sample", "position", "token", "logprob", "entropy", "full_entropy"),
    *("max_prob", "argmax", "sum_p2", "top_k_mass", *TEXTS),
)
PAIRS, LISTED = 12, 1000  # conflicts named on the page; tokens of a regime in its CSV
Row = dict[str, Any]


class Analysis(NamedTuple):
    """A store with what was found in it; `result` is what the file says."""

    store: TokenStore
    survey: Survey
    boxes: Boxes
    result: Row


def analyse(
    store: TokenStore, words: Words, gates: Sequence[str], thresholds: Survey | None = None, *, pictures: bool = True
) -> Analysis:
    """The analysis of one store; `thresholds`: whose quantiles count, for own answers those of the data.

    `pictures`: with the gradient of each gate on the plane. DataError: a token of another tokenizer's.
    """
    survey = Survey(store)
    _same_tokenizer(store, survey, words)
    k, vocab, tokens = candidates(store), int(store.meta["vocab"]), int(store.meta["tokens"])
    boxes, plane = Boxes(survey, thresholds or survey), Landscape(tokens, k, vocab)
    parts = Breakdown(survey, words.mask(vocab, "numeric"), words.mask(vocab, "special"))
    agreement, lab = StoredAgreement(k, vocab), Gates(read_gates(gates), survey, k, tokens)
    adds = [part.add for part in (lab, boxes, plane, parts, agreement)]
    spread(blocks(store, COLUMNS, parts.texts), adds)
    found = lab.result()
    fields = {
        row["gate"]: square
        for row, objective in zip(found["gates"], lab.objectives, strict=True)
        if pictures and (square := field(objective, k, survey.tau)) is not None
    }
    result = {
        "meta": store.meta,
        "landscape": plane.result(),
        "boxes": boxes.result(),
        "breakdown": parts.result(),
        "pairs": [{"label": words(a), "expected": words(b), "count": n} for a, b, n in parts.pairs(PAIRS)],
        "clouds": {name: frequent(table, words, LISTED) for name, table in parts.clouds().items()},
        "agreement": agreement.result(),
        "gates": found,
        "fields": fields,
        "mean_nll_median": survey.tau,
    }
    return Analysis(store, survey, boxes, result)


def _same_tokenizer(store: TokenStore, survey: Survey, words: Words) -> None:
    if survey.last_token >= words.size:
        raise DataError(
            f"{store.path}: token {survey.last_token} is none of the tokenizer's {words.size}; give the tokenizer of "
            f"{store.meta['model']}, with which the statistics were made"
        )


def difference(data: Analysis, own: Analysis) -> Row:
    """Conflict share of the data minus that of own answers, with its interval: both resampled on their own."""
    (shares_B, draws_RB), (own_B, own_RB) = data.boxes.draws(), own.boxes.draws(seed=1)
    found = percentile_interval(float(shares_B[0] - own_B[0]), draws_RB[:, 0] - own_RB[:, 0])
    return {"share": found.delta, "low": found.bounds[0], "high": found.bounds[1]}
