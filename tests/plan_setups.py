"""Setups of the planner's tests: small recipes, and Qwen2.5-32B as the paper trains it."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from eaft_verl.planning.architectures import KNOWN
from eaft_verl.planning.formulas import GIB, Setup, training_phases
from eaft_verl.recipe.resolve import load_recipe, resolve

QWEN_32B = KNOWN["qwen2.5-32b-instruct"]
RECIPE = """
model: Qwen/Qwen2.5-32B-Instruct
output: {folder}/out
data: {{train: org/data, max_length: 16384, rows: 6400}}
evaluate: {{target: [sums]}}
arms:
  sft: {{objective: {{name: sft}}}}
  kl: {{objective: {{name: sft, anchor: {{kind: forward_kl, coef: 0.5}}}}}}
  topk: {{objective: {{name: sft, anchor: {{kind: forward_kl_topk, coef: 0.5, k: 64}}}}}}
  lora: {{objective: {{name: eaft}}, verl: {{model: {{lora_rank: 32}}, engine: {{model_dtype: bf16}}}}}}
  lora_kl:
    objective: {{name: sft, anchor: {{kind: reverse_kl, coef: 0.5}}}}
    verl: {{model: {{lora_rank: 32}}, engine: {{model_dtype: bf16}}}}
"""
GRPO = """  grpo:
    trainer: grpo
    verl:
      data: {max_prompt_length: 1024, max_response_length: 4096}
      actor_rollout_ref: {rollout: {n: 8, tensor_model_parallel_size: 4}}
"""


def write_recipe(folder: Path, *, grpo: bool = False) -> Path:
    """The recipe of a 32B model with one arm of each kind."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder) + (GRPO if grpo else ""), encoding="utf-8")
    return path


def config(path: Path, arm: str, *overrides: str, nodes: int = 1) -> DictConfig:
    """One arm on nodes of eight GPUs."""
    placed = ["device=cuda", "verl.trainer.n_gpus_per_node=8", f"verl.trainer.nnodes={nodes}"]
    return resolve(load_recipe(path), arm, [*placed, *overrides])


def paper_setup(**changes: Any) -> Setup:
    """Qwen2.5-32B, eight GPUs, one sequence of 16384 tokens in a micro-batch, 64 in an update."""
    base: dict[str, Any] = {"model": QWEN_32B, "devices": 8, "nodes": 1, "cuda": True, "shards": 8, "tokens": 16384}
    base |= {"update_tokens": 64 * 16384, "attended": 16384, "micro_batches": 8, "packed": False}
    return Setup(**base | changes)


def peak_gib(setup: Setup, loss: float | None = None) -> float:
    """Largest phase, GiB of tensors."""
    return max(sum(parts.values()) for parts in training_phases(setup, loss).values()) / GIB
