"""verl's own SFT trainer with our loss: what it refuses, what its batches carry, and the arm's trajectory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_examples import EXAMPLES, both_calls

from eaft_verl.errors import ConfigError

STEPS, BATCH, RATE = 4, 4, 1e-3
ARGUMENTS = {
    **{"engine.strategy": "fsdp2", "engine.use_torch_compile": "False", "trainer.device": "cpu"},
    **{"+engine.mixed_precision.param_dtype": "fp32", "+engine.mixed_precision.reduce_dtype": "fp32"},
    **{"+model.override_config.attn_implementation": "sdpa", "data.train_batch_size": BATCH, "data.max_length": 256},
    **{"data.max_token_len_per_gpu": 256, "optim.lr": RATE, "optim.lr_scheduler_type": "constant"},
    **{"optim.lr_warmup_steps_ratio": 0, "trainer.total_epochs": 1, "trainer.test_freq": 2, "trainer.save_freq": -1},
    **{"trainer.logger": "[console,file]", "trainer.resume_mode": "disable", "trainer.balance_batch": "False"},
}


@pytest.fixture(scope="module")
def composed() -> Callable[..., Any]:
    """verl's own tree with overrides."""
    from hydra import compose, initialize_config_module

    def of(*overrides: str) -> Any:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("sft_trainer_engine", overrides=["model.path=m", "engine.strategy=fsdp2", *overrides])

    return of


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "add e.g. +objective.name=eaft"),
        (["+objective.name=eeaft"], "is unknown; choose one of"),
        (["+objective.name=eaft", "+objective.powr=2"], "objective.powr is unknown"),
        (["+objective.name=talr"], "give a number, e.g. tau=1"),
        (["+objective.name=prift"], "forward pass of the starting model"),
        (["+objective.name=sft_kl"], "frozen reference"),
        (["+objective.name=eaft", "engine.strategy=megatron"], "engine.strategy='megatron'"),
        (["+objective.name=eaft", "model.use_fused_kernels=true"], "hides the logits"),
        (["+objective.name=eaft", "data.pad_mode=right"], "must be no_padding"),
        (["+objective.name=eaft", "++engine.pad_to_length=true"], "pad_to_length=true"),
    ],
)
def test_what_cannot_run_is_named_before_ray(overrides: list[str], words: str, composed: Callable[..., Any]) -> None:
    from eaft_verl.training.verl_sft import stock_loss

    with pytest.raises(ConfigError) as caught:
        stock_loss(composed(*overrides))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_parameters_reach_the_objective(composed: Callable[..., Any]) -> None:
    from eaft_verl.recipe.objective import build_objective
    from eaft_verl.training.verl_sft import stock_loss

    loss = stock_loss(composed("+objective.name=eaft", "+objective.power=2", "+objective.k=7"))
    assert loss.objective == build_objective("eaft", power=2, k=7)


def test_a_batch_carries_what_the_loss_asks_and_the_loss_is_the_arms() -> None:
    """verl's own batch holds neither weights nor flags; training sums w * nll, validation nll; nothing is kept."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    from eaft_verl.recipe.objective import build_objective
    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.loss import BATCH_FLAGS, TokenLoss
    from eaft_verl.training.verl_sft import StockLoss, flagged

    whole = make_batch(EXAMPLES, [0, 1, 2], {"dp_size": 1}, None)
    stock = TensorDict({name: whole[name] for name in ("input_ids", "position_ids", "loss_mask")}, batch_size=[3])
    batch = flagged(lambda data: data)(stock)
    for name, value in BATCH_FLAGS.items():
        assert tu.get_non_tensor_data(batch, name, None) == value, name
    for one in (batch, whole):
        tu.assign_non_tensor(one, dp_size=1, batch_num_tokens=int(whole["loss_mask"].values().sum()))
    torch.manual_seed(0)
    logits = (torch.randn(1, len(whole["input_ids"].values()), 50) * 3).requires_grad_()
    ours, arm = StockLoss(build_objective("eaft")), TokenLoss(build_objective("eaft"))
    assert both_calls(ours, batch, logits).item() == pytest.approx(both_calls(arm, whole, logits).item(), rel=1e-6)
    assert ours.guarded and not ours.table.parts and arm.table.parts
    with torch.no_grad():
        plain = both_calls(TokenLoss(build_objective("sft")), whole, logits)
        assert both_calls(ours, batch, logits).item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.slow
def test_the_trajectory_is_that_of_the_arms_worker(tiny_model_path: Path, tmp_path: Path) -> None:
    """The command, through Ray, against our worker in this process on the same rows in the same order."""
    import pandas
    import tiny
    from torch.utils.data import DistributedSampler

    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]}
        for row in tiny.sums(STEPS * BATCH, 1)
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    given = ARGUMENTS | {"data.train_files": tmp_path / "train.parquet", "data.val_files": tmp_path / "train.parquet"}
    given |= {"model.path": tiny_model_path, "trainer.default_local_dir": tmp_path / "saved", "+objective.name": "eaft"}
    log = tmp_path / "log.jsonl"
    variables = {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_FILE_LOGGER_PATH": str(log)}
    done = subprocess.run(
        [sys.executable, "-m", "eaft_verl.training.verl_sft", *(f"{key}={value}" for key, value in given.items())],
        env={**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logged = [json.loads(line)["data"] for line in log.read_text().splitlines()]
    theirs = [(row["train/loss"], row["train/grad_norm"]) for row in logged if "train/loss" in row]
    order = list(DistributedSampler(range(len(rows)), num_replicas=1, rank=0, shuffle=True, drop_last=True))
    ours = arm_steps(tiny_model_path, tmp_path, rows, order)
    assert len(theirs) == STEPS
    for step, (mine, found) in enumerate(zip(ours, theirs, strict=True), 1):
        assert found == pytest.approx(mine, rel=1e-4), step
    assert any("val/loss" in row for row in logged)


def arm_steps(model: Path, folder: Path, rows: list[Any], order: list[int]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of our worker's steps with verl's data set in verl's order."""
    from omegaconf import OmegaConf
    from one_worker import start_worker
    from transformers import AutoTokenizer
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    from eaft_verl.cluster.session import verl_variables
    from eaft_verl.data.parquet import Example
    from eaft_verl.recipe.objective import build_objective
    from eaft_verl.recipe.resolve import load_recipe, resolve
    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.inference import rendezvous
    from eaft_verl.training.sft.loss import BATCH_FLAGS, TokenLoss

    data = OmegaConf.create({"max_length": 256, "pad_mode": "no_padding"})
    stock = MultiTurnSFTDataset(str(folder / "train.parquet"), AutoTokenizer.from_pretrained(model), data)
    examples = [
        Example(str(i), [], stock[i]["input_ids"].tolist(), stock[i]["loss_mask"].tolist()) for i in range(len(rows))
    ]
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"device: cpu\nmodel: {model}\ndata: {{train: {recipe}, max_length: 256}}\n"
        "verl: {engine: {mixed_precision: {param_dtype: fp32, reduce_dtype: fp32}}, "
        f"optim: {{lr: {RATE}, lr_scheduler_type: constant, lr_warmup_steps_ratio: 0.0, betas: [0.9, 0.999], "
        "weight_decay: 0.01}}\narms: {sft: {objective: {name: sft}}}\n"
    )
    made = []
    with verl_variables("cpu", 1, rendezvous(str(folder))):
        config = resolve(load_recipe(recipe), "sft")
        group = start_worker(config, str(model), STEPS, TokenLoss(build_objective("eaft")), None)
        try:
            for step in range(STEPS):
                flags = {**BATCH_FLAGS, "use_dynamic_bsz": True, "max_token_len_per_gpu": 256}
                batch = make_batch(examples, order[step * BATCH : (step + 1) * BATCH], flags, None)
                metrics = tu.get(group.train_batch(batch).get(), "metrics")
                made.append((metrics["loss"], metrics["grad_norm"]))
        finally:
            torch.distributed.destroy_process_group()
    return made
