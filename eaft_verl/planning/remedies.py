"""The nearest settings that fit, as overrides: first what trains the same thing on the same machine."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from eaft_verl.errors import ConfigError
from eaft_verl.planning.amount import amount_of
from eaft_verl.planning.arm_plan import ArmPlan, Machine, plan_arm
from eaft_verl.planning.setup import GRPO
from eaft_verl.recipe.checks import start_problem

LORA_RANK = 32
SPLITS = (1, 2, 4, 8)
NODES = (2, 4, 8)
SHARES = (0.5, 0.4, 0.3)  # of a device for vLLM
OFFLOAD = {"verl.engine.offload_policy": True}
EIGHT_BIT = {"verl.optim.optimizer": "AdamW8bit", "verl.optim.optimizer_impl": "torchao.optim"}
LORA = {"verl.model.lora_rank": LORA_RANK, "verl.engine.model_dtype": "bf16"}
Overrides = dict[str, Any]


def remedies(config: DictConfig, machine: Machine) -> list[dict[str, Any]]:
    """For each way, the least change that fits: {way, overrides, peak, host, step_s}; a way that does not help is left
    out. Every one passes the checks that the configuration itself passes."""
    found = []
    for way, families in _ways(config):
        for overrides in families:
            if plan := _fits(config, machine, overrides):
                found.append(
                    {
                        "way": way,
                        "overrides": [f"{key}={_word(value)}" for key, value in overrides.items()],
                        "peak": plan.peak,
                        "host": plan.needed,
                        "step_s": plan.step_s,
                    }
                )
                break
    return found


def _ways(config: DictConfig) -> Iterator[tuple[str, Iterator[Overrides]]]:
    """Ways in order of preference, each with its candidates from the least change to the greatest."""
    cuda = config.device == "cuda"
    yield "smaller micro-batches", (layout for layout in _layouts(config) if layout)
    if not config.verl.model.enable_gradient_checkpointing:
        on = {"verl.model.enable_gradient_checkpointing": True}
        yield "gradient checkpointing", ({**on, **layout} for layout in _layouts(config))
    if cuda and config.trainer == GRPO:
        yield "less for vLLM, training state parked while it generates", _shares(config)
    if cuda and not config.verl.engine.offload_policy:
        yield "weights, gradients and optimizer on the hosts", ({**OFFLOAD, **layout} for layout in _layouts(config))
    full = not config.verl.model.lora_rank and not config.verl.engine.offload_policy
    if cuda and config.verl.optim.optimizer == "AdamW" and full:
        yield "8-bit Adam", ({**EIGHT_BIT, **layout} for layout in _layouts(config))
    if cuda:
        nodes = [{"verl.trainer.nnodes": config.verl.trainer.nnodes * times} for times in NODES]
        yield "more nodes", ({**more, **layout} for more in nodes for layout in _layouts(config))
    if not config.verl.model.lora_rank:
        yield "LoRA: trains another set of weights", ({**LORA, **layout} for layout in _layouts(config))


def _layouts(config: DictConfig) -> Iterator[Overrides]:
    """As it is, then one longest example per micro-batch, split over 1, 2, 4 and 8 devices."""
    yield {}
    data = config.verl.data
    longest = config.data.max_length if config.trainer == GRPO else amount_of(config).longest
    longest = max(longest, config.data.max_length) if data.use_dynamic_bsz else longest
    for split in SPLITS:
        if split > 1 and not _can_split(config, split):
            continue
        layout: Overrides = {}
        if data.use_dynamic_bsz and (share := -(-longest // split)) < data.max_token_len_per_gpu:
            layout["verl.data.max_token_len_per_gpu"] = share
        elif not data.use_dynamic_bsz and data.micro_batch_size_per_gpu > 1:
            layout["verl.data.micro_batch_size_per_gpu"] = 1
        if split > config.verl.engine.ulysses_sequence_parallel_size:
            layout["verl.engine.ulysses_sequence_parallel_size"] = split
        if layout:
            yield layout


def _can_split(config: DictConfig, split: int) -> bool:
    """Ulysses cuts heads: query heads must divide, and key heads divide or be repeated evenly."""
    from eaft_verl.planning.architectures import architecture_of

    model = architecture_of(config.model)
    even = model.heads % split == 0 and (model.kv_heads % split == 0 or split % model.kv_heads == 0)
    return even and config.device == "cuda" and split <= config.verl.trainer.n_gpus_per_node


def _shares(config: DictConfig) -> Iterator[Overrides]:
    parked = {"verl.engine.param_offload": True, "verl.engine.optimizer_offload": True}
    key = "verl.actor_rollout_ref.rollout.gpu_memory_utilization"
    yield parked
    for share in SHARES:
        if share < config.verl.actor_rollout_ref.rollout.gpu_memory_utilization:
            yield {key: share}
            yield {**parked, key: share}
            for layout in _layouts(config):
                yield {**parked, key: share, **layout}


def _fits(config: DictConfig, machine: Machine, overrides: Overrides) -> ArmPlan | None:
    """The plan with these overrides when it fits and is as legal as the configuration itself."""
    changed = OmegaConf.create(OmegaConf.to_container(config))
    for key, value in overrides.items():
        OmegaConf.update(changed, key, value, merge=False)
    nodes = changed.verl.trainer.nnodes
    wider = Machine(nodes, machine.devices, machine.gib, machine.kind, machine.host_gib)
    try:
        plan = plan_arm(changed, wider)
    except ConfigError:
        return None
    legal = start_problem(changed, elsewhere=True) in (None, start_problem(config, elsewhere=True))
    return plan if plan.verdict == "fits" and legal else None


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
