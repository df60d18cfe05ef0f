"""build_objective: presets, names that are imported, and what its errors say; parameters; no torch needed."""

import math
import re
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
import torch

from eaft_verl.objectives import OBJECTIVES, Objective, Sft
from eaft_verl.recipe.objective import build_objective
from eaft_verl.tokens.stats import TokenStats

STATS = TokenStats(torch.tensor([-1.0]), torch.tensor([1.5]), 20)


@dataclass(frozen=True, kw_only=True)
class Third(Objective):
    """w = share."""

    share: float = 1 / 3

    def weight(self, stats):
        return stats.logprob_T.new_full(stats.logprob_T.shape, self.share)


class Weightless(Objective):
    """Forgets to define its weight."""


def message_of(name: str, **params: object) -> str:
    with pytest.raises(ValueError, match="objective") as caught:
        build_objective(name, **params)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_entry_builds_frozen_with_its_preset(name):
    cls, preset = OBJECTIVES[name]
    objective = build_objective(name)
    assert type(objective) is cls and vars(objective).items() >= preset.items()
    with pytest.raises(AttributeError):
        objective.k = 5
    assert build_objective(name, k=7).k == 7


def test_a_parameter_overrides_the_preset():
    assert build_objective("eaft_3", power=1.5).power == 1.5


@pytest.mark.parametrize("name", ["eafft", "", "EAFT", "eaft.objectives"])
def test_unknown_name_lists_all(name):
    message = message_of(name)
    assert repr(name) in message
    assert all(re.search(rf"\b{known}\b", message) for known in OBJECTIVES)
    assert "module:Class" in message


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_unknown_parameter_lists_the_known(name):
    message = message_of(name, alhpa=1.0)
    assert "objective.alhpa" in message and repr(name) in message
    assert all(item.name in message for item in fields(OBJECTIVES[name][0]))


@pytest.mark.parametrize(
    ("name", "key", "value", "allowed"),
    [
        ("eaft", "power", -0.1, "[0, inf"),
        ("eaft", "power", math.nan, "a number"),
        ("eaft", "power", math.inf, "a number"),
        ("eaft", "power", "1", "a number"),
        ("eaft", "power", True, "a number"),
        ("eaft", "power", None, "a number"),
        ("eaft", "k", 1, "at least 2"),
        ("eaft", "k", 20.0, "integer"),
        ("eaft", "k", True, "integer"),
        ("eaft", "normalizer", "ln20", "one of ln_k, 3.0, none"),
        ("eaft", "normalizer", None, "one of ln_k, 3.0, none"),
        ("sft", "weight_norm", "mean", "one of none, batch_mean"),
        ("eaft_sigmoid", "steepness", -1, "[0, inf"),
        ("eaft_sigmoid", "center", 1.1, "[0, 1]"),
        ("masked", "threshold", 1.5, "[0, 1]"),
        ("masked", "quantile", None, "[0, 1]"),
        ("pilot_mask", "prob_threshold", -0.5, "[0, 1]"),
        ("talr", "tau", 0, "(0, inf"),
        ("talr", "tau", "epoch", "previous_step or batch"),
        ("talr", "floor", 2, "[0, 1]"),
        ("flow", "temperature", 0.0, "(0, inf"),
        ("power_p", "exponent", -1, "[0, inf"),
        ("eaft", "stats", "frozen", "one of current, base"),
        ("mile", "power", -1, "[0, inf"),
        ("idft", "scale", 0, "(0, inf"),
        ("idft", "warmup", 1.5, "[0, 1]"),
        ("idft", "exponent_min", 3.0, "at most exponent_max"),
        ("gift", "boost", 0, "(0, 80]"),
        ("gift", "boost", 100, "(0, 80]"),
        ("finch", "level", 0, "(0, inf"),
        ("finch", "lowest", 2, "[0, 1]"),
        ("finch", "highest", 0.5, "[1, inf"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(name, key, value, allowed):
    message = message_of(name, **{key: value})
    assert f"{key}={value!r}" in message and allowed in message and repr(name) in message


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("eaft", {"power": 0, "k": 2}),
        ("masked", {"threshold": 0.0, "quantile": 1}),
        ("masked", {"threshold": None}),
        ("talr", {"tau": "batch", "floor": 0}),
        ("talr", {"tau": 1e-3}),
        ("flow", {"temperature": None}),
        ("sft", {"weight_norm": "batch_mean"}),
    ],
)
def test_the_edges_of_the_ranges_are_inside(name, params):
    assert vars(build_objective(name, **params)).items() >= params.items()


def test_yaml_reads_the_normalizer_as_a_number():
    word, number = (build_objective("eaft", normalizer=value).weight(STATS) for value in ("3.0", 3.0))
    assert torch.equal(word, number) and float(number) == 0.5


def test_an_own_objective_is_imported():
    objective = build_objective(f"{__name__}:Third", share=0.25, k=5)
    assert isinstance(objective, Third) and objective.k == 5
    assert objective.weight(STATS).tolist() == [0.25]
    assert isinstance(build_objective("eaft_verl.objectives:Sft"), Sft)
    assert "objective.power" in message_of(f"{__name__}:Third", power=2)


@pytest.mark.parametrize("name", ["no_such_package.module:Own", "math:NoSuch", "eaft_verl.objectives:", "math.pi:x"])
def test_a_name_that_cannot_be_imported(name):
    message = message_of(name)
    assert repr(name) in message and "PYTHONPATH" in message


@pytest.mark.parametrize("name", [":Own", ".module:Own"])
def test_a_name_without_an_absolute_module(name):
    assert repr(name) in message_of(name)


@pytest.mark.parametrize("name", ["math:pi", "collections:OrderedDict", "eaft_verl.objectives:OBJECTIVES"])
def test_a_name_that_is_no_objective(name):
    message = message_of(name)
    assert repr(name) in message and "subclass of eaft_verl.objectives.Objective" in message


def test_a_class_without_a_weight_says_so():
    with pytest.raises(TypeError, match="Weightless defines no weight"):
        build_objective(f"{__name__}:Weightless").weight(STATS)


def test_objectives_are_checked_without_torch():
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import eaft_verl.parameters\n"
        "from eaft_verl.objectives import OBJECTIVES\nfrom eaft_verl.recipe.objective import build_objective\n"
        "print(len([build_objective(name) for name in OBJECTIVES]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(OBJECTIVES)
