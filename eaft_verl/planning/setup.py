"""A resolved configuration -> what the formulas ask of it."""

import math
from dataclasses import dataclass
from typing import Any

from eaft_verl.errors import ConfigError
from eaft_verl.objectives import Objective
from eaft_verl.planning.amount import Amount, amount_of
from eaft_verl.planning.architectures import Architecture, architecture_of
from eaft_verl.planning.formulas import OPTIMIZERS, Rollout, Setup
from eaft_verl.planning.units import one_unit
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.matching import GRPO
from eaft_verl.recipe.views import anchor_reference, objective_of, world_size

_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}


@dataclass(frozen=True)
class Arm:
    """One arm ready to be planned. passes: forward passes over all data before the first step."""

    name: str
    config: Config
    setup: Setup
    amount: Amount
    updates_per_epoch: int | None
    updates: int | None
    reference_tokens: float
    passes: int
    notes: tuple[str, ...]


def arm_of(config: Config) -> Arm:
    """What the formulas need of a resolved configuration; ConfigError for what cannot be sized."""
    amount, trainer = amount_of(config), config.verl.trainer
    objective = None if config.trainer == GRPO else objective_of(config)
    setup = setup_of(config, amount, objective)
    per_epoch, size = None, config.verl.data.train_batch_size
    if amount.examples is not None:  # verl drops the smaller last batch of prompts
        per_epoch = -(-amount.examples // size) if objective else max(1, amount.examples // size)
    updates = trainer.total_training_steps
    if updates is None and per_epoch is not None:
        updates = per_epoch * trainer.total_epochs
    return Arm(
        name=config.arm,
        config=config,
        setup=setup,
        amount=amount,
        updates_per_epoch=per_epoch,
        updates=updates,
        reference_tokens=(amount.trained or 0.0) if setup.cache_k else 0.0,
        passes=(setup.cache_k > 0) + (objective is not None and objective.needs_base),
        notes=tuple(note for note, holds in _notes(config, amount, setup, objective).items() if holds),
    )


def setup_of(config: Config, amount: Amount, objective: Objective | None) -> Setup:
    """The formulas' view of one arm; objective None: GRPO."""
    model, engine, data = config.verl.model, config.verl.engine, config.verl.data
    architecture, devices = architecture_of(config.model), world_size(config)
    precision = engine.mixed_precision or {}
    rollout = None if objective else _rollout(config)
    longest, mean, sequences = amount.longest, amount.mean, data.train_batch_size
    if rollout:
        longest, mean, sequences = (whole := rollout.prompt + rollout.response), whole, rollout.responses
    tokens, micro_batches = micro_batch(config, sequences, mean, longest, devices)
    if (optimizer := config.verl.optim.optimizer) not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ConfigError(f"verl.optim.optimizer={optimizer!r} cannot be sized; `eaft plan` knows {known}")
    master = _BYTES[engine.model_dtype or "fp32"]
    return Setup(
        model=architecture,
        devices=devices,
        nodes=config.verl.trainer.nnodes,
        cuda=config.device == "cuda",
        shards=devices if engine.fsdp_size in (-1, None) else min(engine.fsdp_size, devices),
        tokens=tokens,
        update_tokens=sequences * mean,
        attended=mean if rollout else amount.attended,
        micro_batches=micro_batches,
        sequence_parallel=engine.ulysses_sequence_parallel_size,
        packed=tokens * engine.ulysses_sequence_parallel_size > longest,
        checkpointing=model.enable_gradient_checkpointing,
        attention=(model.override_config or {}).get("attn_implementation", "flash_attention_2"),
        compute=_BYTES[precision.get("param_dtype", "bf16")],
        master=master,
        reduce=_BYTES[precision.get("reduce_dtype", "fp32")],
        **_update(config, optimizer),
        **_sharding(config),
        adapter=architecture.adapter(model.lora_rank, model.target_modules) if model.lora_rank else 0,
        parked=_parked(config, master, OPTIMIZERS[optimizer] or 2 * master) if rollout else 0,
        rollout=rollout,
        **_loss_terms(config, architecture, objective, rollout),
        extra_forwards=_extra_forwards(objective, rollout),
    )


def _update(config: Config, optimizer: str) -> dict[str, Any]:
    options = config.verl.optim.override_optimizer_config or {}
    return {"optimizer": optimizer, "one_pass": bool(options.get("fused"))}


def _sharding(config: Config) -> dict[str, Any]:
    engine = config.verl.engine
    return {
        "offload_policy": engine.offload_policy,
        "unsynced": engine.use_no_sync_for_gradient_accumulation,
        "one_unit": one_unit(config, config.model),
    }


def micro_batch(config: Config, sequences: int, mean: float, longest: int, devices: int) -> tuple[int, int]:
    """(tokens of the longest micro-batch on one device, micro-batches per device and update).

    verl packs up to max_token_len_per_gpu * sequence parallel tokens for each data-parallel rank and gives every device
    of the rank an equal share; a micro-batch holds at least one whole sequence.
    """
    data, parallel = config.verl.data, config.verl.engine.ulysses_sequence_parallel_size
    rank_sequences = max(1, sequences // max(1, devices // parallel))
    if not data.use_dynamic_bsz:
        size = min(data.micro_batch_size_per_gpu, rank_sequences)
        return -(-size * longest // parallel), -(-rank_sequences // size)
    limit = data.max_token_len_per_gpu * parallel
    whole = max(longest, min(limit, math.ceil(rank_sequences * longest)))
    per_batch = max(1, limit // max(1, math.ceil(mean)))  # sequences of mean length that fit
    batches = max(math.ceil(rank_sequences * mean / limit), -(-rank_sequences // per_batch))
    return -(-whole // parallel), batches


def _rollout(config: Config) -> Rollout:
    policy, data = config.verl.actor_rollout_ref, config.verl.data
    return Rollout(
        responses=data.train_batch_size * policy.rollout.n,
        prompt=data.max_prompt_length or config.data.max_length - data.max_response_length,
        response=data.max_response_length,
        tensor_parallel=policy.rollout.tensor_model_parallel_size,
        share=policy.rollout.gpu_memory_utilization if policy.rollout.name == "vllm" else 0.0,
        reference=bool(policy.actor.use_kl_loss or config.verl.algorithm.use_kl_in_reward),
        frees_cache=policy.rollout.free_cache_engine,
    )


def _loss_terms(
    config: Config, model: Architecture, objective: Objective | None, rollout: Rollout | None
) -> dict[str, Any]:
    """Fused head, or second engine, full logits, candidates on disk; under LoRA the model without its adapter is the
    reference."""
    from_start = config.start and objective and objective.anchor and objective.anchor.reference is None
    own = None if config.verl.model.lora_rank and not from_start else model
    if objective is None:
        return {"reference": own if rollout and rollout.reference else None}
    if (anchor := objective.divergence) is None:
        fused = bool(config.fused_head and config.verl.model.use_remove_padding)
        return {"fused": fused, "held": objective.anchor is not None}
    if not anchor.full:
        return {"cache_k": anchor.k}  # a reference of another model is loaded for the one pass, before Adam exists
    reference = anchor_reference(config)
    return {"reference": architecture_of(reference) if reference else own, "anchored": True}


def _extra_forwards(objective: Objective | None, rollout: Rollout | None) -> float:
    """Forward passes over the batch besides the trained one: old and reference log-probabilities, statistics."""
    if objective is None:
        return 1.0 + (rollout is not None and rollout.reference)
    exact_tau = "tau" in objective.needs and vars(objective).get("tau") == "batch" and objective.stats == "current"
    return float((objective.weight_norm == "batch_mean") + exact_tau + ("old_logprob" in objective.needs))


def _parked(config: Config, master: int, moments: float) -> int:
    """Bytes per parameter on the host while vLLM is awake. In other training verl brings all back for the step."""
    engine = config.verl.engine
    trained = 0 if config.verl.model.lora_rank else 1  # an adapter's moments are small
    return int(master * engine.param_offload + moments * engine.optimizer_offload * trained)


def _notes(config: Config, amount: Amount, setup: Setup, objective: Objective | None) -> dict[str, Any]:
    """{what the reader must know: whether it holds for this arm}."""
    engine, needs = config.verl.engine, objective.needs if objective else ()
    moved = (
        "verl.engine.param_offload and optimizer_offload bring everything back for the whole step: they do not lower "
        "the peak of training; verl.engine.offload_policy does"
    )
    of = config.budget.of if config.budget else None
    length = "every response is taken to be as long as verl.data.max_response_length allows: an upper bound"
    package = f"{setup.optimizer} needs verl.optim.optimizer_impl to name an installed package (torchao.optim)"
    return {
        f"data: {amount.origin}": True,
        moved: objective and (engine.param_offload or engine.optimizer_offload),
        "use_no_sync_for_gradient_accumulation keeps whole gradients on every device": setup.unsynced,
        package: setup.optimizer.endswith("8bit"),
        f"its length is set by the finished run of arm {of}; the recipe's own is planned": of,
        length: setup.rollout,
        "the objective's own forward passes are counted": "tau" in needs or "old_logprob" in needs,
        "the l2 anchor keeps a second copy of the weights": setup.held,
        "the model is one FSDP unit: a faster step for more memory; not with verl.engine.wrap_policy.disable=false": (
            setup.one_unit
        ),
        "stats=base: the starting model passes over the data once": objective and objective.stats == "base",
    }
