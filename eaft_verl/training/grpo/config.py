"""A GRPO arm's resolved configuration -> the configuration of verl's `main_ppo`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from eaft_verl.cluster.demand import STORES
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.verl_keys import PPO_TREE, compose_verl, lay
from eaft_verl.recipe.views import world_size
from eaft_verl.runs import run_name
from eaft_verl.training.grpo.reward import reward_function
from eaft_verl.training.grpo.states import TRAINER, server_name

OURS = "eaft_verl.training"
FLOAT32 = ("fp32", "float32")
KEPT_ROLLOUTS = 16  # per step in rollouts.jsonl


@dataclass(frozen=True)
class RunFiles:
    """What a GRPO run reads and writes: prompts (parquet), model (folder), run (its directory)."""

    prompts: str
    model: str
    run: str

    @property
    def resume(self) -> Path:
        """Where verl keeps its checkpoints."""
        return Path(self.run) / "resume"


@dataclass(frozen=True)
class Schedule:
    """Steps of verl's trainer. steps: all; points: to export after; saves: to keep a resumable state after.

    A state is also kept at every point and whenever the last save is `save_seconds` old.
    """

    steps: int
    points: list[int]
    saves: list[int]
    start: int = 0
    save_seconds: float = math.inf


def updates_per_step(config: Config) -> int:
    """Optimizer updates that one batch of rollouts is used for."""
    actor, prompts = config.verl.actor_rollout_ref.actor, config.verl.data.train_batch_size
    return prompts // (actor.ppo_mini_batch_size or prompts) * actor.ppo_epochs


def prompt_length(config: Config) -> int:
    """Tokens a prompt may have."""
    data = config.verl.data
    return data.max_prompt_length or config.data.max_length - data.max_response_length


def ppo_config(
    config: Config, files: RunFiles, schedule: Schedule, stop_ids: list[int], dtype: str, ends: Sequence[str] = ()
) -> DictConfig:
    """main_ppo's whole configuration, resolved.

    dtype: of the exports; stop_ids: tokens that end a response; ends: those that end the prepared turns, by name.

    Verbatim parts of the arm are laid over verl's own tree; the shared keys are put where main_ppo reads them.
    """
    verl: Any = OmegaConf.to_container(config.verl)
    base: Any = OmegaConf.to_container(compose_verl(PPO_TREE))
    lay(
        base,
        {
            "actor_rollout_ref": {**verl["actor_rollout_ref"], "model": verl["model"]},
            "algorithm": {**verl["algorithm"], "adv_estimator": "grpo"},
            "reward": {**verl["reward"], "custom_reward_function": reward_function(config)},
        },
    )
    tree = OmegaConf.create(base)
    _set_model(tree.actor_rollout_ref, verl, files, config.device)
    _set_actor(tree.actor_rollout_ref.actor, config, verl)
    _set_rollout(tree.actor_rollout_ref.rollout, config)
    _set_reference(tree.actor_rollout_ref.ref, config, verl)
    _set_data(tree.data, config, files)
    _set_trainer(tree.trainer, config, files, schedule)
    tree.trainer.eaft.update(dtype=dtype, model=files.model, ends=list(ends))
    tree.trainer.eaft.stop_ids = [] if tree.actor_rollout_ref.rollout.ignore_eos else stop_ids
    tree.trainer.v1.trainer_mode = TRAINER
    tree.trainer.v1.sampler.update(_sampler(config, files, stop_ids))
    tree.critic.enable = False  # what group advantages imply; left null, verl warns that it infers it
    stores = {"num_data_storage_units": STORES["grpo", config.device], "required_node_resource": "CPU"}
    OmegaConf.update(tree, "transfer_queue.backend.SimpleStorage", stores, force_add=True)  # no store on a bare head
    resolved: Any = OmegaConf.to_container(tree, resolve=True)
    return OmegaConf.create(resolved)


def _set_model(tree: DictConfig, verl: dict[str, Any], files: RunFiles, device: str) -> None:
    own = verl["model"]["external_lib"]
    libraries = [f"{OURS}.grpo.agent_loop", f"{OURS}.engine"]
    if verl["actor_rollout_ref"]["rollout"]["name"] == "hf":
        libraries += [f"{OURS}.grpo.rollout_server", f"{OURS}.verl_cpu.engine"]
    elif device == "cpu":
        libraries += [f"{OURS}.grpo.vllm_cpu", f"{OURS}.verl_cpu.engine"]
    tree.model.path = tree.model.hf_config_path = tree.model.tokenizer_path = files.model
    tree.model.lora.merge = verl["model"]["lora_rank"] > 0  # a rollout takes whole weights; the states keep the adapter
    tree.model.external_lib = libraries + ([own] if isinstance(own, str) else list(own or []))


def _engine(config: Config, verl: dict[str, Any]) -> dict[str, Any]:
    return {**verl["engine"], "seed": config.seed}


def _set_actor(actor: DictConfig, config: Config, verl: dict[str, Any]) -> None:
    data, engine = config.verl.data, config.verl.engine
    actor.optim, actor.fsdp_config = verl["optim"], _engine(config, verl)
    actor.update(
        strategy=engine.strategy,
        grad_clip=config.verl.optim.clip_grad,
        ppo_mini_batch_size=config.verl.actor_rollout_ref.actor.ppo_mini_batch_size or data.train_batch_size,
        ppo_micro_batch_size_per_gpu=data.micro_batch_size_per_gpu,
        use_dynamic_bsz=data.use_dynamic_bsz,
        ppo_max_token_len_per_gpu=data.max_token_len_per_gpu,
        use_torch_compile=verl["engine"]["use_torch_compile"],
        ulysses_sequence_parallel_size=engine.ulysses_sequence_parallel_size,
        data_loader_seed=config.seed,
        calculate_entropy=True,
        rollout_n=config.verl.actor_rollout_ref.rollout.n,
    )


def _set_rollout(rollout: DictConfig, config: Config) -> None:
    data, precision = config.verl.data, config.verl.engine.mixed_precision or {}
    rollout.update(
        dtype="float32" if precision.get("param_dtype", "bf16") in FLOAT32 else "bfloat16",
        seed=config.seed,
        prompt_length=prompt_length(config),
        response_length=data.max_response_length,
        max_model_len=prompt_length(config) + data.max_response_length,
        log_prob_use_dynamic_bsz=data.use_dynamic_bsz,
        log_prob_micro_batch_size_per_gpu=data.micro_batch_size_per_gpu,
        log_prob_max_token_len_per_gpu=data.max_token_len_per_gpu,
        calculate_log_probs=True,
    )
    rollout.agent.default_agent_loop = "eaft_single_turn"
    if config.device == "cpu":
        rollout.update(load_format="auto", free_cache_engine=False)
        if rollout.name == "vllm":  # what a CPU has not: memory to give back, graphs to capture
            rollout.update(enable_sleep_mode=False, enforce_eager=True)


def _set_reference(ref: DictConfig, config: Config, verl: dict[str, Any]) -> None:
    data, own = config.verl.data, verl["actor_rollout_ref"]["ref"]["fsdp_config"]
    ref.fsdp_config = {**_engine(config, verl), "forward_only": True, **own}
    ref.update(
        strategy=config.verl.engine.strategy,
        log_prob_use_dynamic_bsz=data.use_dynamic_bsz,
        log_prob_micro_batch_size_per_gpu=data.micro_batch_size_per_gpu,
        log_prob_max_token_len_per_gpu=data.max_token_len_per_gpu,
    )


def _set_data(data: DictConfig, config: Config, files: RunFiles) -> None:
    data.update(
        train_files=files.prompts,
        val_files=files.prompts,  # verl opens one whether it validates or not
        train_batch_size=config.verl.data.train_batch_size,
        max_prompt_length=prompt_length(config),
        max_response_length=config.verl.data.max_response_length,
        seed=config.seed,
        shuffle=True,
        dataloader_num_workers=0,
    )


def _set_trainer(trainer: DictConfig, config: Config, files: RunFiles, schedule: Schedule) -> None:
    shared = config.verl.trainer
    trainer.update(
        total_training_steps=schedule.steps,
        total_epochs=max(schedule.steps, shared.total_epochs),  # the steps decide; an epoch has at least one
        nnodes=shared.nnodes,
        n_gpus_per_node=shared.n_gpus_per_node,
        balance_batch=shared.balance_batch,
        project_name=config.name,
        experiment_name=run_name(config.arm, config.seed),
        logger=["file"],
        save_freq=-1,  # SavingTrainer does
        test_freq=-1,
        val_before_train=False,
        default_local_dir=str(files.resume),
        resume_mode="auto" if schedule.start else "disable",
        checkpoint_callback_class=f"{OURS}.grpo.export.ExportCallback",
        device=config.device,
        eaft={
            **asdict(schedule),
            "run": files.run,
            "seed": config.seed,
            "updates": updates_per_step(config),
            "keep": shared.max_ckpt_to_keep,
            "world_size": world_size(config),
        },
    )


def _sampler(config: Config, files: RunFiles, stop_ids: list[int]) -> dict[str, Any]:
    """Our sampler, and in `verl` the settings that verl gives to its own sampler only."""
    filtering, data = config.verl.algorithm.filter_groups, config.verl.data
    rollout = config.verl.actor_rollout_ref.rollout
    ours = {
        "run": files.run,
        "tokenizer": files.model,
        "updates": updates_per_step(config),
        "kept": KEPT_ROLLOUTS,
        "stop_ids": [] if rollout.ignore_eos else stop_ids,
        "longest": data.max_response_length,
        "most_batches": filtering.max_num_gen_batches,
        "servers": [server_name(rank) for rank in range(world_size(config))] if rollout.name == "hf" else [],
    }
    theirs = {
        "filter_groups_metric": filtering.metric if filtering.enable else None,
        "train_batch_size": data.train_batch_size,
        "gen_batch_size": 1 if filtering.enable else data.train_batch_size,
        "max_inflight_gen_batches": filtering.max_inflight_gen_batches,
    }
    return {
        "custom_sampler": {"path": f"pkg://{OURS}.grpo.sampler", "name": "RolloutBuffer"},
        "sampler_kwargs": {"ours": ours, "verl": theirs},
    }


def total_ppo_steps(config: Config, prompts: int) -> int:
    """Batches of rollouts of the arm; verl drops the last, smaller batch of an epoch."""
    trainer = config.verl.trainer
    return trainer.total_training_steps or prompts // config.verl.data.train_batch_size * trainer.total_epochs


def save_steps(config: Config, steps: int, prompts: int) -> list[int]:
    """Steps after which a resumable state is kept; the last has nothing to resume."""
    frequency: Any = config.verl.trainer.save_freq
    if frequency == "after_each_epoch":
        frequency = prompts // config.verl.data.train_batch_size
    every = math.inf if frequency == -1 else frequency
    return [step for step in range(1, steps) if step % every == 0]


def stop_ids(model: str, ends: Sequence[str] = ()) -> list[int]:
    """Tokens that end a response: the tokenizer's, the generation config's, and those that end the prepared turns."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    trained: Any = tokenizer.convert_tokens_to_ids(list(ends))
    found = {tokenizer.eos_token_id, *trained}
    try:
        config: Any = GenerationConfig.from_pretrained(model)
    except OSError:  # many base models carry none; transformers then takes the model's
        config = AutoConfig.from_pretrained(model)
    ended = config.eos_token_id
    found.update(ended if isinstance(ended, list) else [ended])
    return sorted(found - {None})
