"""The nearest settings that fit, as overrides: first what trains the same thing on the same machine."""

from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from eaft_verl.errors import ConfigError
from eaft_verl.planning.amount import amount_of
from eaft_verl.planning.architectures import architecture_of
from eaft_verl.planning.arm_plan import ArmPlan, plan_arm
from eaft_verl.planning.machine import Machine
from eaft_verl.planning.units import one_unit
from eaft_verl.recipe.checks import start_problem
from eaft_verl.recipe.config import Config, changed
from eaft_verl.recipe.matching import GRPO

LORA_RANK = 32
SPLITS = (1, 2, 4, 8)
NODES = (2, 4, 8)
SHARES = (0.5, 0.4, 0.3)  # of a device for vLLM
PARKED = ("verl.engine.param_offload=true", "verl.engine.optimizer_offload=true")
EIGHT_BIT = ("verl.optim.optimizer=AdamW8bit", "verl.optim.optimizer_impl=torchao.optim")
LORA = (f"verl.model.lora_rank={LORA_RANK}", "verl.engine.model_dtype=bf16")
Overrides = tuple[str, ...]
AS_IS: Overrides = ()


def remedies(config: Config, machine: Machine) -> list[dict[str, Any]]:
    """For each way, the least change that fits: {way, overrides, peak, host, step_s}; a way that does not help is left
    out. Every one passes the checks that the configuration itself passes."""
    found, layouts = [], [AS_IS, *_layouts(config)]
    for way, changes in _ways(config):
        candidates = ((*change, *layout) for change in changes for layout in layouts)
        fitting = ((tried, plan) for tried in candidates if tried and (plan := _fits(config, machine, tried)))
        if best := next(fitting, None):
            overrides, plan = best
            sizes = {"peak": plan.peak, "host": plan.needed, "step_s": plan.step_s}
            found.append({"way": way, "overrides": list(overrides), **sizes})
    return found


def _ways(config: Config) -> list[tuple[str, list[Overrides]]]:
    """(way, what it sets, the least change first), in order of preference; layouts are tried with each of them."""
    verl, cuda, grpo = config.verl, config.device == "cuda", config.trainer == GRPO
    full, here = not verl.model.lora_rank, not verl.engine.offload_policy
    plain = not verl.model.enable_gradient_checkpointing
    adam = verl.optim.optimizer == "AdamW"
    more: list[Overrides] = [(f"verl.trainer.nnodes={verl.trainer.nnodes * times}",) for times in NODES]
    table: list[tuple[bool, str, list[Overrides]]] = [
        (True, "smaller micro-batches", [AS_IS]),
        (one_unit(config, config.model), "every layer an FSDP unit", [("verl.engine.wrap_policy.disable=false",)]),
        (plain, "gradient checkpointing", [("verl.model.enable_gradient_checkpointing=true",)]),
        (cuda and grpo, "less for vLLM, training state parked while it generates", _shares(config) if grpo else []),
        (cuda and here, "weights, gradients and optimizer on the hosts", [("verl.engine.offload_policy=true",)]),
        (cuda and here and full and adam, "8-bit Adam", [EIGHT_BIT]),
        (cuda, "more nodes", more),
        (full, "LoRA: trains another set of weights", [LORA]),
    ]
    return [(way, changes) for possible, way, changes in table if possible]


def _layouts(config: Config) -> list[Overrides]:
    """One longest example per micro-batch, split over 1, 2, 4 and 8 devices."""
    data, engine = config.verl.data, config.verl.engine
    longest = max(config.data.max_length, 0 if config.trainer == GRPO else amount_of(config).longest)
    found = []
    for split in SPLITS:
        layout = []
        if data.use_dynamic_bsz and (share := -(-longest // split)) < data.max_token_len_per_gpu:
            layout.append(f"verl.data.max_token_len_per_gpu={share}")
        elif not data.use_dynamic_bsz and data.micro_batch_size_per_gpu > 1:
            layout.append("verl.data.micro_batch_size_per_gpu=1")
        if split > engine.ulysses_sequence_parallel_size:
            layout.append(f"verl.engine.ulysses_sequence_parallel_size={split}")
        if layout and (split == 1 or _can_split(config, split)):
            found.append(tuple(layout))
    return found


def _can_split(config: Config, split: int) -> bool:
    """Ulysses cuts heads: query heads must divide, and key heads divide or be repeated evenly."""
    model = architecture_of(config.model)
    even = model.heads % split == 0 and (model.kv_heads % split == 0 or split % model.kv_heads == 0)
    return even and config.device == "cuda" and split <= config.verl.trainer.n_gpus_per_node


def _shares(config: Config) -> list[Overrides]:
    key = "verl.actor_rollout_ref.rollout.gpu_memory_utilization"
    less = [
        f"{key}={share}" for share in SHARES if share < config.verl.actor_rollout_ref.rollout.gpu_memory_utilization
    ]
    return [PARKED, *(change for share in less for change in ((share,), (*PARKED, share)))]


def _fits(config: Config, machine: Machine, overrides: Overrides) -> ArmPlan | None:
    """The plan with these overrides when it fits and is as legal as the configuration itself."""
    said = (override.partition("=") for override in overrides)
    nearer = changed(config, {key: OmegaConf.from_dotlist([f"value={value}"]).value for key, _, value in said})
    try:
        plan = plan_arm(nearer, replace(machine, nodes=nearer.verl.trainer.nnodes))
    except ConfigError:
        return None
    legal = start_problem(nearer, elsewhere=True) in (None, start_problem(config, elsewhere=True))
    return plan if plan.verdict == "fits" and legal else None
