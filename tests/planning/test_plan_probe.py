"""Planned beside measured: a real training step of the longest micro-batch in a process of its own."""

from pathlib import Path

import pytest
import tiny

from eaft_verl.errors import ConfigError, RunError
from eaft_verl.models import check_model
from eaft_verl.planning.formulas import GIB
from eaft_verl.planning.probe import alone, probe
from eaft_verl.planning.setup import arm_of
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.smollm2 import SMOLLM2

RECIPE = """
device: cpu
model: {model}
output: {folder}/out
data: {{train: org/data, max_length: {length}}}
evaluate: {{target: [sums]}}
verl: {{data: {{train_batch_size: 8, max_token_len_per_gpu: {tokens}}}}}
arms:
  eaft: {{objective: {{name: eaft}}}}
  kl: {{objective: {{name: sft_kl}}}}
  grpo: {{trainer: grpo}}
"""
TOLERANCE = 0.10  # planned peak against measured


def recipe(folder: Path, model: str, length: int, tokens: int) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, model=model, length=length, tokens=tokens))
    return path


def test_the_planned_peak_is_the_measured_one(tmp_path: Path) -> None:
    """Activations, not weights: two layers of width 256, 2048 tokens in one sequence."""
    path = recipe(tmp_path, str(tiny.tiny_model(tmp_path / "model", hidden=256)), 2048, 2048)
    found = probe(resolve(load_recipe(path), "eaft"))
    assert found["tokens"] == 2048 and found["flops"] > 0
    assert found["planned"] == pytest.approx(found["peak"], rel=TOLERANCE), found


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["eaft", "kl"])
@pytest.mark.parametrize("extra", [[], ["verl.model.lora_rank=8"], ["verl.model.enable_gradient_checkpointing=true"]])
def test_the_planned_peak_of_smollm2(tmp_path: Path, arm: str, extra: list[str]) -> None:
    try:
        check_model(SMOLLM2)
    except ConfigError as error:
        pytest.skip(str(error))
    found = probe(resolve(load_recipe(recipe(tmp_path, SMOLLM2, 512, 1024)), arm, ["compare.match=none", *extra]))
    assert found["planned"] == pytest.approx(found["peak"], rel=TOLERANCE), found
    assert found["peak"] > 0.5 * GIB


def test_one_device_does_the_longest_micro_batch(tmp_path: Path, tiny_model_path: Path) -> None:
    path = recipe(tmp_path, str(tiny_model_path), 300, 1000)
    setup, lengths = alone(arm_of(resolve(load_recipe(path), "eaft")).setup, 300)
    assert lengths == [300, 300, 300, 100] and setup.packed and setup.tokens == 1000
    assert setup.attended == (3 * 300**2 + 100**2) / 1000


def test_a_probe_that_cannot_run_says_why(tmp_path: Path, tiny_model_path: Path) -> None:
    path = recipe(tmp_path, str(tiny_model_path), 300, 1000)
    with pytest.raises(ConfigError, match="arm grpo has trainer=grpo"):
        probe(resolve(load_recipe(path), "grpo", ["compare.match=none"]))
    broken = tiny.tiny_model(tmp_path / "broken")
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"silu"', '"no_such"'))
    path = recipe(tmp_path, str(broken), 300, 1000)
    with pytest.raises(RunError, match="probe of arm eaft, 1000 tokens on one device, ended with 1"):
        probe(resolve(load_recipe(path), "eaft"))
