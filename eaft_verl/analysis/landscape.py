"""Fig. 1b of arXiv 2601.02151: where trained tokens lie on the plane of label probability and entropy.

Bounds of the entropy at label probability p, V vocabulary, K candidates, h(x) = -x ln x - (1 - x) ln(1 - x):

full entropy   H >= h(p), reached where one other token has all the rest.
top-K entropy  H >= min(h(p), h(q) + (1 - q) ln(K - 1)),  q = p / (p + (K - 1) (1 - p) / (V - 1)); h(p) for p < 1 / V.
               M H, with M the mass of the K, is concave and M linear on the distributions in a given order, so the
               minimum lies at a corner: one other token with all the rest, or the rest spread evenly over V - 1, most
               of it outside the K. Real models stay close to the first: the second line says how low it could get.
               H <= h(p) + (1 - p) ln(K - 1), and ln K for p < 1 / K.
"""

import math
from typing import Any

import numpy as np
from scipy.special import entr

from eaft_verl.analysis.blocks import REGIMES, Array, Block
from eaft_verl.analysis.survey import Survey
from eaft_verl.pages.statistics import percentile_interval, resampled_means
from eaft_verl.tokens.stats import CONFLICT_PROB, LOW_ENTROPY

P_BINS, LOG_BINS, H_BINS = 50, 48, 40
LOG_LOW = -8.0  # log10 p of the first bin, which holds all below
POINTS = 3000  # of the scatter
GROUPS = 4096  # samples are resampled one by one up to here, beyond it in this many random groups
RESAMPLES = 2000
QUANTILES = (0.05, 0.1, 0.15, 0.25)
ABSOLUTE = ((LOW_ENTROPY, CONFLICT_PROB), (LOW_ENTROPY, 0.1), (LOW_ENTROPY, 0.01))  # nats, probability
NORMALIZED = ((0.17, 0.1),)  # of ln K (the centre of EAFT_sig), probability
Row = dict[str, Any]


def binary_entropy(p: Array) -> Array:
    """h(p) in nats."""
    return entr(p) + entr(1.0 - p)


def lowest_topk_entropy(p: Array, k: int, vocab: int) -> Array:
    """The exact minimum of the top-K entropy, nats, over all distributions that give the label p."""
    if k >= vocab:
        return binary_entropy(p)
    q = p / (p + (k - 1) * (1.0 - p) / (vocab - 1))
    spread = binary_entropy(q) + (1.0 - q) * math.log(k - 1)
    return np.where(p < 1 / vocab, binary_entropy(p), np.minimum(binary_entropy(p), spread))


def highest_topk_entropy(p: Array, k: int) -> Array:
    """The exact maximum of the top-K entropy, nats."""
    return np.where(p < 1 / k, math.log(k), binary_entropy(p) + (1.0 - p) * math.log(k - 1))


class Boxes:
    """How many tokens lie at or below pairs of thresholds, per group of samples, for intervals over samples."""

    def __init__(self, survey: Survey, reference: Survey) -> None:
        """`reference`: whose quantiles are the thresholds; for own answers those of the data."""
        self.rows: list[Row] = [
            *({"kind": "absolute", "entropy": h, "normalized": False, "prob": p} for h, p in ABSOLUTE),
            *({"kind": "absolute", "entropy": h, "normalized": True, "prob": p} for h, p in NORMALIZED),
        ]
        for q in QUANTILES:
            cut = {"entropy": reference.entropy.quantile(q), "prob": reference.prob.quantile(q)}
            self.rows.append({"kind": "quantile", "quantile": q, "normalized": True, **cut})
        self._groups = min(GROUPS, len(survey.tokens_S))
        self._hits_BG = np.zeros((len(self.rows), self._groups))
        self._tokens_G = np.zeros(self._groups)

    def group(self, sample_T: Array) -> Array:
        """Group of a sample: itself, or a random one (multiplicative hash) where there are more than GROUPS."""
        if self._groups < GROUPS:
            return sample_T
        return (sample_T.astype(np.uint64) * np.uint64(2654435761) >> np.uint64(8)) % np.uint64(self._groups)

    def add(self, block: Block) -> None:
        """Count a block; absolute cuts as training has them: H <= h and p < p0; quantiles: both <=."""
        group_T = self.group(block["sample"]).astype(np.int64)
        self._tokens_G += np.bincount(group_T, minlength=self._groups)
        near = np.flatnonzero(block.prob_T <= np.float32(max(row["prob"] for row in self.rows)))  # others are in no box
        prob_N, group_N = block.prob_T[near], group_T[near]
        entropy_N, normalized_N = block["entropy"][near], block.normalized_T[near]
        for row, hits_G in zip(self.rows, self._hits_BG, strict=True):
            low_N = (normalized_N if row["normalized"] else entropy_N) <= np.float32(row["entropy"])
            rare = np.less if row["kind"] == "absolute" else np.less_equal
            inside = np.flatnonzero(low_N & rare(prob_N, np.float32(row["prob"])))
            hits_G += np.bincount(group_N[inside], minlength=self._groups)

    def draws(self, seed: int = 0) -> tuple[Array, Array]:
        """(share of every box [B], its resamples [R, B]); NaN where one sample is all there is."""
        known_G = self._tokens_G > 0
        tokens_G, hits_GB = self._tokens_G[known_G], self._hits_BG[:, known_G].T
        if len(tokens_G) == 1:  # it has no spread
            return hits_GB[0] / tokens_G[0], np.full((RESAMPLES, len(self.rows)), np.nan)
        draws_RB = resampled_means(hits_GB / tokens_G[:, None], tokens_G, RESAMPLES, np.random.default_rng(seed))
        return hits_GB.sum(axis=0) / tokens_G.sum(), draws_RB

    def result(self) -> list[Row]:
        """The rows with share, low, high: a 95 % interval that resamples samples, not tokens.

        low, high: None where resamples know no spread: of one sample, or of samples without a hit.
        """
        shares_B, draws_RB = self.draws()
        draws_RB = np.where(np.ptp(draws_RB, axis=0) > 0, draws_RB, np.nan)
        found = [percentile_interval(share, draws_R) for share, draws_R in zip(shares_B, draws_RB.T, strict=True)]
        return [
            row | {"share": one.delta, "low": one.bounds[0], "high": one.bounds[1]}
            for row, one in zip(self.rows, found, strict=True)
        ]


class Landscape:
    """Histograms, a sample of points, and sums by regime."""

    def __init__(self, tokens: int, k: int, vocab: int) -> None:
        self._tokens, self._k, self._vocab = tokens, k, vocab
        self._hist = np.zeros(P_BINS * H_BINS, np.int64)
        self._log_hist = np.zeros(LOG_BINS * H_BINS, np.int64)
        self._points: list[Array] = []
        self._regimes = np.zeros((6, len(REGIMES)))
        self._seen = self._below = 0

    def add(self, block: Block) -> None:
        """Count a block."""
        high_T = _bins(block.normalized_T, 0.0, 1.0, H_BINS)
        log_T = block["logprob"] * np.float32(1 / math.log(10))
        for hist, bin_T in (
            (self._hist, _bins(block.prob_T, 0.0, 1.0, P_BINS)),
            (self._log_hist, _bins(log_T, LOG_LOW, 0.0, LOG_BINS)),
        ):
            hist += np.bincount(bin_T * H_BINS + high_T, minlength=len(hist))
        step = max(1, self._tokens // POINTS)
        chosen = np.arange(-self._seen % step, len(block), step)
        self._points.append(np.column_stack([block.prob_T[chosen], block["entropy"][chosen], block["logprob"][chosen]]))
        self._seen += len(block)
        columns = (block.prob_T, block["entropy"], -block["logprob"], block.error_T, block["max_prob"])
        for row, weight_T in enumerate((None, *columns)):
            self._regimes[row] += np.bincount(block.regime_T, weight_T, minlength=len(REGIMES))
        odd = np.flatnonzero(block["full_entropy"] < math.log(2) - 0.01)  # h(p) is nowhere above ln 2
        self._below += int((block["full_entropy"][odd] < binary_entropy(block.prob_T[odd]) - 0.01).sum())

    def result(self) -> Row:
        """Everything of the figure as plain data; `below_bound`: tokens that no distribution explains."""
        counts = self._regimes[0]
        names = ("prob", "entropy", "nll", "error", "max_prob")
        totals = self._regimes[1:].sum(axis=1)
        regimes = {
            regime: {"tokens": int(counts[i]), "share": counts[i] / self._tokens}
            | {f"mean_{name}": self._regimes[j, i] / max(counts[i], 1) for j, name in enumerate(names, 1)}
            | {
                "nll_share": _ratio(self._regimes[3, i], totals[2]),
                "error_share": _ratio(self._regimes[4, i], totals[3]),
            }
            for i, regime in enumerate(REGIMES)
        }
        return {
            "tokens": self._tokens,
            "k": self._k,
            "vocab": self._vocab,
            "nll": totals[2] / self._tokens,
            "mean_entropy": totals[1] / self._tokens,
            "regimes": regimes,
            "below_bound": self._below,
            "histogram": self._hist.reshape(P_BINS, H_BINS).tolist(),
            "log_histogram": self._log_hist.reshape(LOG_BINS, H_BINS).tolist(),
            "points": np.concatenate(self._points).astype(float).round(5).tolist(),
        }


def _bins(values: Array, low: float, high: float, bins: int) -> Array:
    """Index of the equal bin of [low, high] that a value falls into; those outside go to the first or last."""
    place = (values - np.float32(low)) * np.float32(bins / (high - low))
    return np.clip(place, 0, bins - 1).astype(np.intp)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
