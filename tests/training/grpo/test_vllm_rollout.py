"""verl's own vLLM rollout, where a Python with a CPU build of vLLM is named (bash examples/setup_vllm_cpu.sh)."""

import os
import subprocess
from pathlib import Path

import grpo_fixtures
import pytest
from test_grpo import RECIPE

from eaft_verl.errors import ConfigError
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.runs import Run

ROOT = Path(__file__).parents[3]
VLLM = "verl.actor_rollout_ref.rollout.name=vllm"


def laboratory(folder: Path) -> Path:
    grpo_fixtures.character_model(folder / "model", [2, 11], hidden=128)
    grpo_fixtures.write_questions(folder / "questions.jsonl", 64)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return folder / "recipe.yaml"


def test_a_cpu_build_is_what_allows_vllm_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = resolve(load_recipe(laboratory(tmp_path)), "grpo", [VLLM])
    version = "importlib.metadata.version"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(version, lambda name: "0.24.0")
    with pytest.raises(ConfigError, match="name=vllm needs a GPU"):
        check(config, dry_run=True)
    monkeypatch.setattr(version, lambda name: "0.28.0+cpu")
    check(config, dry_run=True)


@pytest.mark.slow
def test_weights_reach_vllm_and_the_reward_rises(tmp_path: Path):
    python = os.environ.get("EAFT_VLLM_PYTHON")
    if not python:
        pytest.skip("EAFT_VLLM_PYTHON names no Python with vLLM; bash examples/setup_vllm_cpu.sh makes one")
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    command = [python, "-m", "eaft_verl.cli", "train", str(laboratory(tmp_path)), "--arm", "grpo", VLLM]
    given = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=given, check=True, timeout=3000)
    (folder,) = (tmp_path / "out").glob("grpo-seed*")
    rows = Run(folder).metrics()
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert len(rewards) >= 6 and rewards[-1] > rewards[0] + 0.2
