"""What a dry run looks at beside the keys: rows, benchmarks' names and rows, a user's own objective."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.objectives import OBJECTIVES, Objective
from eaft_verl.recipe.checks import pending
from eaft_verl.recipe.objective import build_objective
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.tokens.rehearsal import weight_fault

RECIPE = """
model: {model}
device: cpu
data: {{train: {folder}/train.jsonl, heldout: {folder}/heldout.jsonl}}
arms:
  sft: {{objective: {{name: sft}}}}
  grpo: {{trainer: grpo}}
"""
GOOD = {"prompt": "2+2?", "response": "It is 4. #### 4"}


@dataclass(frozen=True, kw_only=True)
class NoWeight(Objective):
    """As somebody leaves it who starts from the base."""


@dataclass(frozen=True, kw_only=True)
class OneNumber(Objective):
    """The mean, not a weight for each token."""

    def weight(self, stats: Any) -> Any:
        return stats.entropy_T.mean()


@dataclass(frozen=True, kw_only=True)
class NoNumber(Objective):
    """Divides by an entropy that may be zero."""

    def weight(self, stats: Any) -> Any:
        return stats.logprob_T / stats.entropy_T


@dataclass(frozen=True, kw_only=True)
class Everything(Objective):
    """Asks for all seven fields."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"sum_p2", "sample_weight", "tau", "base", "old_logprob"})

    def weight(self, stats: Any) -> Any:
        return stats.sum_p2_T + stats.sample_weight_T + stats.old_logprob_T.exp() + stats.tau * torch.ones(5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NoWeight", "weight() raises TypeError: NoWeight defines no weight()"),
        ("OneNumber", "weight() has shape [] for statistics of shape [5]"),
        ("NoNumber", "finite floating-point numbers are expected"),
        ("Everything", ""),
    ],
)
def test_an_objective_of_ones_own_is_tried_on_made_up_statistics(name: str, said: str) -> None:
    fault = weight_fault(build_objective(f"{__name__}:{name}"))
    assert said in fault if said else fault == ""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_of_ours_passes(name: str) -> None:
    assert weight_fault(build_objective(name)) == ""


def lines(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def found(tmp_path: Path, tiny_model_path: Path) -> Any:
    lines(tmp_path / "train.jsonl", *[GOOD] * 5)
    lines(tmp_path / "heldout.jsonl", GOOD)
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=tiny_model_path, folder=tmp_path))

    def look(arm: str, *overrides: str) -> list[str]:
        return pending(resolve(load_recipe(tmp_path / "r.yaml"), arm, overrides), contents=True)

    return look


def test_rows_that_nothing_can_be_made_of_and_rows_without_an_answer_are_found(tmp_path: Path, found: Any) -> None:
    assert found("sft") == found("grpo") == []
    lines(tmp_path / "train.jsonl", GOOD, {"prompt": "Hi", "response": "Hello!"})
    assert found("sft") == []
    (said,) = found("grpo")
    assert "train.jsonl' row 2 has no `answer`, and its response marks none" in said
    lines(tmp_path / "heldout.jsonl", {"text": "no chat"}, {"text": "none either"})
    (said,) = found("sft")
    assert "heldout.jsonl': none of its first 2 rows can be used; row 1: found the fields text" in said


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("[hellaswagg]", "evaluate.target[0]: evaluate: unknown task 'hellaswagg'"),
        ("[hellaswag, mmlu_abstract_algebra, mmlu, leaderboard]", ""),
        ("[{task: gsm8k_local, data: FOLDER/asked.jsonl}]", "asked.jsonl row 2 has no 'answer'"),
        ("[{task: gsm8k_local, data: FOLDER/good.jsonl}]", ""),
    ],
)
def test_names_and_rows_of_benchmarks(tmp_path: Path, found: Any, entries: str, said: str) -> None:
    pytest.importorskip("lm_eval")
    lines(tmp_path / "good.jsonl", {"question": "1+1?", "answer": "2"})
    lines(tmp_path / "asked.jsonl", {"question": "1+1?", "answer": "2"}, {"question": "2+2?"})
    faults = found("sft", f"evaluate.target={entries.replace('FOLDER', str(tmp_path))}")
    assert faults == [] if not said else said in faults[0]
