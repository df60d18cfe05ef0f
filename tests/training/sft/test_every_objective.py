"""Every objective with every kind of anchor, end to end: two real steps, what run.json keeps, an export."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from one_worker import without_ray

from eaft_verl.experiment.train import train
from eaft_verl.objectives import KINDS, L2_KIND, OBJECTIVES
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import declared_keys, load_recipe, resolve
from eaft_verl.runs import Run

RECIPE = """
model: {model}
device: cpu
data: {{train: {train}, max_length: 128}}
evaluate: {{target: [sums], points: 1}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  optim: {{lr: 1.0e-3, lr_scheduler_type: constant}}
  data: {{train_batch_size: 4, max_token_len_per_gpu: 128}}
  trainer: {{total_training_steps: 2}}
arms:
"""
# those that look at the base model first crashed with an anchor after that pass; the others are for completeness
QUICK = {("masked", "forward_kl"), ("flow", "forward_kl_topk")}
PAIRS = [
    pytest.param(name, kind, marks=[] if (name, kind) in QUICK else [pytest.mark.slow])
    for name in OBJECTIVES
    for kind in KINDS
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Iterator[Callable[[str, str], Run]]:
    """All of them in this process."""
    folder = tmp_path_factory.mktemp("objectives")
    tiny.write_sums(folder / "train.jsonl", 8, seed=1)
    arms = [
        f"  {name}-{kind}: {{objective: {{name: {name}, anchor: {{kind: {kind}, coef: 0.5}}}}}}"
        for name in OBJECTIVES
        for kind in KINDS
    ]
    text = RECIPE.format(model=tiny_model_path, train=folder / "train.jsonl") + "\n".join(arms)
    (folder / "r.yaml").write_text(text)
    recipe = load_recipe(folder / "r.yaml")

    def run(name: str, kind: str) -> Run:
        config = resolve(recipe, f"{name}-{kind}", [f"output={folder / 'out'}"])
        check(config)
        return train(config, declared_keys(recipe, f"{name}-{kind}"))

    with without_ray(folder):
        yield run


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_two_steps_of_an_anchored_objective(trained: Callable[[str, str], Run], name: str, kind: str) -> None:
    run = trained(name, kind)
    rows = [row for row in run.metrics() if row["split"] == "train"]
    assert run.info["status"] == "finished" and [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "nll", "grad_norm"))
    if kind == L2_KIND:
        assert 0 < rows[0]["anchor_l2"] < rows[1]["anchor_l2"]  # after the step
    else:
        assert rows[0]["anchor_kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is the model itself before a step
        assert rows[1]["anchor_kl"] > 1e-6, "the first step moved the model"
    assert json.loads((run.path / "run.json").read_text())["objective"]["anchor"]["kind"] == kind
    if calibrated := run.info.get("calibrated"):
        assert calibrated["anchor"] == {"kind": kind, "coef": 0.5, "k": 64, "reference": None}
    assert list(run.checkpoints()) == [1, 2]
