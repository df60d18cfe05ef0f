"""The GRPO arm of a recipe generates and updates twice on a tiny Qwen2, through verl's own main_ppo."""

import math
from pathlib import Path

import pytest
from family_models import family_model
from recipe_data import math_rows, write_rows

from eaft_verl.experiment.train import train
from eaft_verl.files import read_jsonl
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import declared_keys, load_recipe, resolve

FOLDER = Path(__file__).parents[3] / "recipes"
SMALL = [
    *("device=cpu", "data.max_length=256", "evaluate.target=[sums]", "evaluate.general=[]", "evaluate.drift=null"),
    *("evaluate.backend=hf", "evaluate.backend_args=null", "evaluate.points=1", "reward.grader=number"),
    *("verl.trainer.n_gpus_per_node=1", "verl.trainer.total_training_steps=2", "verl.trainer.save_freq=-1"),
    *("verl.data.train_batch_size=4", "verl.data.max_prompt_length=200", "verl.data.max_response_length=12"),
    *("verl.data.max_token_len_per_gpu=1024", "verl.engine.offload_policy=false", "verl.optim.lr=1.0e-3"),
    "verl.engine.mixed_precision={param_dtype: fp32, reduce_dtype: fp32}",
    *("verl.actor_rollout_ref.actor.ppo_mini_batch_size=4", "verl.actor_rollout_ref.rollout.n=2"),
    # settings of vLLM, which is not there on a CPU
    *(
        "verl.actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "verl.actor_rollout_ref.rollout.gpu_memory_utilization=0.5",
    ),
]


@pytest.mark.slow
def test_generates_and_updates_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    family_model(tmp_path / "model", "qwen2_5")
    data = write_rows(tmp_path / "math.jsonl", math_rows(8))
    recipe = load_recipe(FOLDER / "math_qwen2_5_32b.yaml")
    paths = [f"model={tmp_path / 'model'}", f"data.train={data}", f"output={tmp_path / 'out'}"]
    config = resolve(recipe, "grpo", [*SMALL, *paths])
    check(config)
    run = train(config, declared_keys(recipe, "grpo"))
    rows = [row for row in run.metrics() if row["split"] == "train"]
    assert run.info["status"] == "finished" and run.info["total_steps"] == 2
    assert [row["step"] for row in rows] == [1, 2] and [row["samples"] for row in rows] == [8, 16]
    assert all(math.isfinite(row["grad_norm"]) and 0 < row["generated_tokens"] <= 8 * 12 * row["step"] for row in rows)
    assert len(read_jsonl(run.path / "rollouts.jsonl")) > 0
    assert list(run.checkpoints()) == [1, 2]
