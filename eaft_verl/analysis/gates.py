"""The gate lab: what objectives would do with stored statistics, without a model.

Weights come from the objectives themselves, on what the store knows of each token: thresholds of `masked` and
`pilot_mask` are quantiles of the store, `flow`'s are of its samples, `talr`'s tau is the median over all samples of
their mean loss, `psft` is seen before its first update, where the ratio is 1, and `idft` after its warm-up. Anchors are
not counted. The store is the base model's: `stats=base` and `stats=current` are the same here.
The gradient of a token is w |softmax - onehot|_2 = w sqrt(1 - 2 p + sum_v p_v^2).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from eaft_verl.analysis.blocks import BRANCHING, CONFLICT, SETTLED, Array, Block, blocks, candidates
from eaft_verl.analysis.store import TokenStore
from eaft_verl.analysis.survey import Survey
from eaft_verl.errors import ConfigError, require
from eaft_verl.objectives import Objective
from eaft_verl.recipe.objective import build_objective
from eaft_verl.tokens.rehearsal import ask, weight_fault

WORDS = (
    *("sft", "eaft", "eaft_2", "eaft_3", "eaft_sigmoid", "masked", "pilot_mask", "dft", "talr", "flow", "deft"),
    *("mile", "idft", "gift"),  # before the first update `prift` is `dft`, and `finch` `sft`
)
COLUMNS = ("sample", "logprob", "entropy", "sum_p2", "full_entropy")
MOST = 48  # gates of one sweep
TOP = 0.1  # share of tokens that count as top-weighted
_EXACT = 1 << 13  # tokens summed in float32, before float64
OVERLAP = 1 << 18  # tokens, evenly taken, that overlaps are measured on
REGIMES = {"conflict": CONFLICT, "settled": SETTLED, "branching": BRANCHING}
_EXAMPLE = "write NAME[:KEY=VALUE,VALUE...], e.g. eaft:power=1,2,3"
Row = dict[str, Any]


def read_gates(words: Sequence[str]) -> dict[str, Objective]:
    """{name for people: objective} of words like `eaft:power=1,2,3`, `dft`, `my_pkg.mod:MyObjective:a=.5`.

    Values of several keys are combined. ConfigError names the word: an unknown objective, key or value, a gate given
    twice, or more than MOST gates.
    """
    require(words, f"--gates: no gate given; {_EXAMPLE}")
    found: dict[str, Objective] = {}
    for word in words:
        for name, params in _parse(word):
            label = ":".join([name, *(f"{key}={value}" for key, value in params.items())])
            require(label not in found, f"--gates {word}: {label} is given twice")
            try:
                found[label] = build_objective(name, **params)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"--gates {word}: {error}") from None
            fault = weight_fault(found[label])
            require(not fault, f"--gates {word}: {fault}")
            require(len(found) <= MOST, f"--gates: more than {MOST} gates; sweep fewer values at a time")
    return found


def _parse(word: str) -> list[tuple[str, Row]]:
    """The gates of a word: its name, and every combination of its values."""
    parts = word.split(":")
    named = list(itertools.takewhile(lambda part: "=" not in part, parts))
    require(0 < len(named) <= 2 and all(named), f"--gates {word!r}: {_EXAMPLE}")
    keys, values = [], []
    for part in parts[len(named) :]:
        key, _, given = part.partition("=")
        texts = given.split(",")
        require(key and all(texts) and key not in keys, f"--gates {word!r}: {part!r} is no KEY=VALUE,...; {_EXAMPLE}")
        keys.append(key)
        values.append([_value(word, text) for text in texts])
    return [(":".join(named), dict(zip(keys, chosen, strict=True))) for chosen in itertools.product(*values)]


def _value(word: str, text: str) -> Any:
    try:  # as a recipe's, for which 1e-3 is a number
        return OmegaConf.from_dotlist([f"value={text}"]).value
    except (YAMLError, OmegaConfBaseException):
        raise ConfigError(f"--gates {word!r}: {text!r} is no value") from None


class Gates:
    """Sums of every objective's weights over blocks. G gates, T tokens."""

    def __init__(self, gates: dict[str, Objective], survey: Survey, k: int, tokens: int) -> None:
        self._names = list(gates)
        given = [_at_k(name, objective, k) for name, objective in gates.items()]
        self.objectives = [
            ask(f"--gates {name}", one, "calibrate", survey.base) if "base" in one.needs else one
            for name, one in zip(gates, given, strict=True)
        ]
        self._samples = [_sample_weights(name, one, survey) for name, one in zip(gates, self.objectives, strict=True)]
        self._tau, self._step = survey.tau, max(1, math.ceil(tokens / OVERLAP))
        self._sums = np.zeros((len(self._names), 3 + 3 * len(REGIMES)))
        self._squares = np.zeros(len(self._names))
        self._plain = np.zeros(self._sums.shape[1])
        self._chosen: list[Array] = []
        self._seen = 0

    def weights(self, block: Block) -> Array:
        """[G, T] float32."""
        sample = torch.from_numpy(block["sample"].astype(np.int64))
        found_GT = np.empty((len(self._names), len(block)), np.float32)
        for row_T, name, objective, weight_S in zip(found_GT, self._names, self.objectives, self._samples, strict=True):
            own = weight_S[sample] if weight_S is not None else None
            stats = block.stats._replace(sample_weight_T=own, tau=self._tau, progress=1.0)
            weight_T = ask(f"--gates {name}", objective, "weight", stats)
            require(weight_T.shape == (len(block),), f"--gates {name}: weight() has shape {list(weight_T.shape)}")
            row_T[:] = weight_T.detach().numpy()
            if not (row_T.min() >= 0 and row_T.max() < np.inf):  # NaN is neither
                raise ConfigError(f"--gates {name}: its weights are not all finite and at least 0; look at weight()")
            if any(part._version for part in block.stats if isinstance(part, torch.Tensor)):
                raise ConfigError(f"--gates {name}: weight() writes into the statistics that it is given; copy them")
        return found_GT

    def add(self, block: Block) -> None:
        """Count a block."""
        weight_GT = self.weights(block)
        measure_3T = np.stack([np.ones(len(block), np.float32), -block["logprob"], block.error_T])
        regimes_R = np.array([*REGIMES.values()])[:, None]
        for start in range(0, len(block), _EXACT):
            weight, measure = weight_GT[:, start : start + _EXACT], measure_3T[:, start : start + _EXACT]
            inside = (block.regime_T[start : start + _EXACT] == regimes_R).astype(np.float32)
            features = np.concatenate([measure, (inside[:, None] * measure).reshape(-1, len(inside[0]))])
            self._sums += weight @ features.T
            self._squares += np.einsum("gt,gt->g", weight, weight, dtype=np.float64)  # 1e-23 squared is 0 in float32
            self._plain += features.sum(axis=1)
        self._chosen.append(weight_GT[:, -self._seen % self._step :: self._step].copy())  # a view would keep the block
        self._seen += len(block)

    def result(self) -> Row:
        """Plain data: a row per gate, and the overlaps between them.

        weight_mean; ess = (sum w)^2 / (N sum w^2); loss, gradient: mean over tokens, nats and |.|_2; gradient_share:
        {regime: part of the summed gradient}; parameters as calibrated. correlation: Pearson, of weights (None where
        one is constant); jaccard: of the sets of tokens whose weight is at least its own 90 % quantile.
        """
        rows, tokens = [], self._plain[0]
        for name, objective, sums, square in zip(self._names, self.objectives, self._sums, self._squares, strict=True):
            scale = sums[0] / tokens if objective.weight_norm == "batch_mean" else 1.0
            weight, loss, gradient = (sums[:3] / tokens / (scale or 1.0)).tolist()
            row = {"gate": name, "weight_mean": weight, "loss": loss, "gradient": gradient}
            row["ess"] = float(sums[0] ** 2 / (tokens * square)) if square else 0.0
            for measure, at in (("loss_share", 1), ("gradient_share", 2)):
                row[measure] = {r: _ratio(sums[3 + 3 * i + at], sums[at]) for i, r in enumerate(REGIMES)}
            row["parameters"] = {key: value for key, value in vars(objective).items() if key not in ("anchor", "k")}
            rows.append(row)
        return {
            "tokens": int(tokens),
            "token_share": {regime: float(self._plain[3 + 3 * i] / tokens) for i, regime in enumerate(REGIMES)},
            "tau": self._tau,
            "gates": rows,
            "overlap": self._overlap(),
        }

    def _overlap(self) -> Row:
        weight_GT = np.concatenate(self._chosen, axis=1)
        wide_GT = weight_GT.astype(np.float64) - weight_GT.mean(axis=1, dtype=np.float64, keepdims=True)
        spread_G = np.sqrt((wide_GT**2).sum(axis=1))
        constant_G = spread_G <= 1e-6 * np.sqrt(weight_GT.shape[1])
        scale_G = np.where(constant_G, np.nan, spread_G)
        correlation_GG = wide_GT @ wide_GT.T / scale_G / scale_G[:, None]
        top_GT = (weight_GT >= np.quantile(weight_GT, 1 - TOP, axis=1, method="lower")[:, None]).astype(np.float32)
        both_GG, size_G = top_GT @ top_GT.T, top_GT.sum(axis=1)
        jaccard_GG = both_GG / (size_G + size_G[:, None] - both_GG)
        return {
            "tokens": weight_GT.shape[1],
            "correlation": [[None if np.isnan(x) else float(x) for x in row] for row in correlation_GG],
            "jaccard": jaccard_GG.astype(float).tolist(),
            "top_share": (size_G / weight_GT.shape[1]).astype(float).tolist(),
        }


def sweep(store: TokenStore, words: Sequence[str]) -> Row:
    """What `Gates.result` says of the gates in `words` on a store; two passes over it, memory flat in its rows."""
    gates = read_gates(words)
    survey = Survey(store)
    found = Gates(gates, survey, candidates(store), int(store.meta["tokens"]))
    for block in blocks(store, COLUMNS, {}):
        found.add(block)
    return found.result()


def _at_k(name: str, objective: Objective, k: int) -> Objective:
    """The objective on entropies of the store's K, which is the one thing that no sweep can change."""
    if "k=" in name and objective.k != k:
        raise ConfigError(f"--gates {name}: the store holds top-{k} entropy only; leave k out or analyse with that K")
    return replace(objective, k=max(k, 2))


def _sample_weights(name: str, objective: Objective, survey: Survey) -> torch.Tensor | None:
    """Weight of each sample by its number, for objectives that fix it before training."""
    if "sample_weight" not in objective.needs:
        return None
    own = ask(f"--gates {name}", objective, "sample_weights", survey.base)
    if own is None or own.shape != (survey.samples,):
        raise ConfigError(f"--gates {name}: sample_weights() must give a weight for each of {survey.samples} samples")
    weight_S = torch.zeros(len(survey.tokens_S))
    weight_S[torch.from_numpy(survey.tokens_S > 0)] = own.float()
    return weight_S


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
