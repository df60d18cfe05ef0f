"""The gate lab: words, weights by hand, shares, overlaps, and objectives of one's own."""

import math
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from analysis.made_stores import random_columns, write_store

from eaft_verl.analysis.blocks import blocks
from eaft_verl.analysis.gates import COLUMNS as GATE_COLUMNS
from eaft_verl.analysis.gates import WORDS, Gates, read_gates, sweep
from eaft_verl.analysis.survey import Survey
from eaft_verl.errors import ConfigError
from eaft_verl.objectives import Objective


@dataclass(frozen=True, kw_only=True)
class Squared(Objective):
    """w = slope * p^2."""

    slope: float = 1.0

    def weight(self, stats):
        return self.slope * stats.logprob_T.exp() ** 2


@dataclass(frozen=True, kw_only=True)
class Broken(Objective):
    """Not a number."""

    def weight(self, stats):
        return stats.logprob_T.where(stats.logprob_T != LOWEST, math.nan)


@dataclass(frozen=True, kw_only=True)
class Average(Objective):
    """One number for all tokens."""

    def weight(self, stats):
        return stats.entropy_T.mean()


@dataclass(frozen=True, kw_only=True)
class InPlace(Objective):
    """Writes into what it is given."""

    def weight(self, stats):
        return stats.entropy_T.mul_(0)


@dataclass(frozen=True, kw_only=True)
class Weightless(Objective):
    """Asks for weights of samples that it does not give."""

    @property
    def needs(self):
        return frozenset({"sample_weight"})

    def weight(self, stats):
        return stats.sample_weight_T


@dataclass(frozen=True, kw_only=True)
class Leaving(Objective):
    """Ends the program, or fails, at the first token or on real data only."""

    tokens: int = 0
    fails: bool = False

    def weight(self, stats):
        if len(stats.logprob_T) > self.tokens:
            if self.fails:
                raise KeyError("temperature")
            sys.exit(3)
        return stats.logprob_T.exp()


COLUMNS = random_columns(24, 60, seed=7)
LOWEST = float(COLUMNS["logprob"].astype(np.float32).min())
P, H = np.exp(COLUMNS["logprob"]), COLUMNS["entropy"] / math.log(20)
SUM_P2 = COLUMNS["sum_p2"]
NLL_S = np.array([-COLUMNS["logprob"][COLUMNS["sample"] == i].mean() for i in range(24)])
BY_HAND = {
    "sft": np.ones_like(P),
    "eaft": H,
    "eaft:power=2": H**2,
    "eaft:power=3": H**3,
    "eaft_sigmoid": 1 / (1 + np.exp(-30 * (H - 0.17))),
    "masked:quantile=0.15": (np.quantile(H, 0.15) < H).astype(float),
    "masked:threshold=0.17": (H > 0.17).astype(float),
    "pilot_mask": 1.0 - ((np.quantile(H, 0.15) >= H) & (np.quantile(P, 0.15) >= P)),
    "dft": P,
    "talr": np.maximum(P ** (1 / np.median(NLL_S)), 0.01),
    "talr:tau=2": np.maximum(P**0.5, 0.01),
    "flow": np.exp(-NLL_S / np.median(NLL_S))[COLUMNS["sample"]],
    "power_p:exponent=0.25": P**0.25,
    "deft": P**SUM_P2,
    "chord": P * (1 - P),
    "psft": np.ones_like(P),
    "mile:weight_norm=none": 1 + COLUMNS["full_entropy"],
    "idft": P ** np.clip(np.exp(-(np.log(P) + COLUMNS["full_entropy"])), 0.1, 2.0),
    "gift:boost=3": P * (math.exp(3) - 1) / (1 + P * (math.exp(3) - 1)),
    "prift": P,
    "finch": np.ones_like(P),
    "analysis.test_gates:Squared:slope=2": 2 * P**2,
}
ERROR = np.sqrt(1 - 2 * P + SUM_P2)
CONFLICT = (COLUMNS["entropy"] <= 0.5) & (P < 0.2)
BRANCHING = COLUMNS["entropy"] >= 2.0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"), **COLUMNS)


@pytest.fixture(scope="module")
def found(store):
    return sweep(store, list(BY_HAND))


@pytest.mark.parametrize("name", list(BY_HAND))
def test_every_number_of_a_gate_against_its_formula(found, name):
    row, w = next(row for row in found["gates"] if row["gate"] == name), BY_HAND[name]
    assert row["weight_mean"] == pytest.approx(w.mean(), rel=2e-3)
    assert row["ess"] == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=2e-3)
    assert row["gradient"] == pytest.approx((w * ERROR).mean(), rel=2e-3)
    assert row["loss"] == pytest.approx((w * -COLUMNS["logprob"]).mean(), rel=2e-3)
    assert row["gradient_share"]["conflict"] == pytest.approx((w * ERROR)[CONFLICT].sum() / (w * ERROR).sum(), rel=5e-3)
    assert row["gradient_share"]["branching"] == pytest.approx(
        (w * ERROR)[BRANCHING].sum() / (w * ERROR).sum(), rel=5e-3
    )
    nll = -COLUMNS["logprob"]
    assert row["loss_share"]["conflict"] == pytest.approx((w * nll)[CONFLICT].sum() / (w * nll).sum(), rel=5e-3)


def test_overlaps_against_numpy(found):
    names = [row["gate"] for row in found["gates"]]
    smooth = [names.index(name) for name in ("eaft", "dft", "deft", "chord", "flow")]
    weights = np.stack(list(BY_HAND.values()))
    expected = np.corrcoef(weights[smooth])
    correlation = np.array(found["overlap"]["correlation"], dtype=object)[np.ix_(smooth, smooth)].astype(float)
    assert correlation == pytest.approx(expected, abs=1e-4)
    top = [set(np.flatnonzero(w >= np.quantile(w, 0.9, method="lower"))) for w in weights]
    for i in smooth:
        for j in smooth:
            jaccard = len(top[i] & top[j]) / len(top[i] | top[j])
            assert found["overlap"]["jaccard"][i][j] == pytest.approx(jaccard, abs=0.01)


def test_a_constant_weight_has_no_correlation_and_all_tokens_on_top(found):
    assert found["overlap"]["correlation"][0][1] is None
    assert found["overlap"]["top_share"][0] == 1.0


def test_a_rescaled_weight_has_mean_one_and_the_same_shares(store):
    plain, scaled = sweep(store, ["eaft", "eaft:weight_norm=batch_mean"])["gates"]
    assert scaled["weight_mean"] == pytest.approx(1.0)
    assert scaled["gradient_share"] == pytest.approx(plain["gradient_share"])
    assert scaled["gradient"] == pytest.approx(plain["gradient"] / plain["weight_mean"])


def test_numbers_do_not_depend_on_the_blocks(store, found, monkeypatch):
    monkeypatch.setattr("eaft_verl.analysis.blocks.ROWS", 101)
    parts = sweep(store, list(BY_HAND))
    for mine, theirs in zip(parts["gates"], found["gates"], strict=True):
        assert mine["gradient_share"] == pytest.approx(theirs["gradient_share"], rel=1e-5)
        assert mine["ess"] == pytest.approx(theirs["ess"], rel=1e-5)
    assert parts["overlap"]["jaccard"] == found["overlap"]["jaccard"]


def test_words_become_every_combination():
    names = list(read_gates(["eaft:power=1,2:normalizer=ln_k,3.0", "dft", "masked:quantile=.1,.15"]))
    assert names == [
        *("eaft:power=1:normalizer=ln_k", "eaft:power=1:normalizer=3.0"),
        *("eaft:power=2:normalizer=ln_k", "eaft:power=2:normalizer=3.0"),
        *("dft", "masked:quantile=0.1", "masked:quantile=0.15"),
    ]
    assert read_gates(WORDS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no gate given"),
        (["eeaft"], "'eeaft' is unknown; choose one of sft, eaft"),
        (["eaft:pwer=1"], "pwer is unknown"),
        (["eaft:power"], "cannot be imported"),
        (["eaft:power="], "no KEY=VALUE"),
        (["eaft:=1"], "no KEY=VALUE"),
        (["eaft:power=1,,2"], "no KEY=VALUE"),
        (["eaft:power=one"], "must be a number"),
        (["eaft:power=-1"], "must be a number in"),
        (["eaft:power=[1"], "is no value"),
        ([""], "write NAME"),
        (["a:b:c"], "write NAME"),
        (["dft", "dft"], "dft is given twice"),
        (["no_such.module:Gate"], "cannot be imported"),
        (["os:path"], "must be a subclass"),
        (["analysis.test_gates:Average"], "has shape \\[\\] for statistics of shape"),
        (["eaft:power=" + ",".join(map(str, range(60)))], "more than 48 gates"),
    ],
)
def test_a_bad_word_is_one_line(words, says):
    with pytest.raises(ConfigError, match=says) as caught:
        read_gates(words)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--gates")


def test_another_k_and_weights_that_are_no_numbers_are_refused(store):
    with pytest.raises(ConfigError, match="top-20 entropy only"):
        sweep(store, ["eaft:k=50"])
    with pytest.raises(ConfigError, match="Broken: its weights"):
        sweep(store, ["analysis.test_gates:Broken"])
    with pytest.raises(ConfigError, match="writes into the statistics"):
        sweep(store, ["analysis.test_gates:InPlace", "eaft"])
    with pytest.raises(ConfigError, match="a weight for each of 24 samples"):
        sweep(store, ["analysis.test_gates:Weightless"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("Leaving", r"weight\(\) raises RuntimeError: Leaving.weight calls sys.exit\(3\)"),
        ("Leaving:tokens=100", r"weight\(\) raises RuntimeError: Leaving.weight calls sys.exit\(3\)"),
        ("Leaving:tokens=100:fails=True", r"weight\(\) raises KeyError: 'temperature'"),
    ],
)
def test_an_own_objective_that_ends_the_program_or_fails_is_one_line(store, words, says):
    with pytest.raises(ConfigError, match=f"^--gates analysis.test_gates:{words}: {says}") as caught:
        sweep(store, [f"analysis.test_gates:{words}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["import sys; sys.exit(1)", "x = 1 /", "undefined_name"])
def test_a_module_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, line):
    (tmp_path / f"own_{len(line)}.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="cannot be imported") as caught:
        read_gates([f"own_{len(line)}:Mine"])
    assert "\n" not in str(caught.value)


def test_the_tokens_kept_for_overlaps_hold_no_block_in_memory(store, monkeypatch):
    monkeypatch.setattr("eaft_verl.analysis.gates.OVERLAP", 100)
    gates = Gates(read_gates(["sft", "eaft"]), Survey(store), 20, len(P))
    for block in blocks(store, GATE_COLUMNS, {}):
        gates.add(block)
    assert all(part.base is None for part in gates._chosen)
    assert gates.result()["overlap"]["tokens"] == 96  # every 15th of 1,440


@pytest.mark.parametrize("slope", ["1e-25", "1e25"])
def test_a_gate_s_effective_sample_size_knows_no_scale(tmp_path, slope):
    """Squares of such weights are 0, or infinite, in float32; 1e-25 is a number here as in a recipe."""
    store = write_store(tmp_path, **random_columns(20, 30))
    plain, scaled = sweep(store, [f"analysis.test_gates:Squared:slope=1,{slope}"])["gates"]
    assert scaled["ess"] == pytest.approx(plain["ess"], rel=1e-4) and plain["ess"] > 0
