"""Which of verl 0.9.1's PPO keys a GRPO arm may set besides the ones that all arms share, and their defaults.

Shared keys keep their meaning: verl.model, verl.engine, verl.optim and verl.data act on the policy. What this trainer
would have to ignore is not in the tree, and OURS_INSTEAD says where it is set.
"""

import copy
import functools
import importlib.util
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from eaft_verl.errors import ConfigError

PPO_TREE = "ppo_trainer"
KEYS: dict[str, tuple[str, ...]] = {
    "actor_rollout_ref.actor": (
        *("ppo_mini_batch_size", "ppo_epochs", "shuffle", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c"),
        *("policy_loss", "loss_agg_mode", "loss_scale_factor", "entropy_coeff"),
        *("use_kl_loss", "kl_loss_coef", "kl_loss_type"),
    ),
    "actor_rollout_ref.ref": ("fsdp_config",),
    "actor_rollout_ref.rollout": (
        *("name", "n", "temperature", "top_k", "top_p", "ignore_eos", "max_num_seqs", "max_num_batched_tokens"),
        *("tensor_model_parallel_size", "gpu_memory_utilization", "enforce_eager", "free_cache_engine"),
        *("enable_chunked_prefill", "enable_prefix_caching", "engine_kwargs", "agent", "checkpoint_engine"),
    ),
    "algorithm": (
        *("norm_adv_by_std_in_grpo", "use_kl_in_reward", "kl_penalty", "kl_ctrl"),
        *("filter_groups", "rollout_correction"),
    ),
    "reward": ("num_workers",),
}
NESTED: dict[str, tuple[str, ...]] = {  # of a kept mapping, the keys that act
    "actor_rollout_ref.ref.fsdp_config": ("param_offload", "model_dtype", "reshard_after_forward"),
    "actor_rollout_ref.rollout.agent": ("num_workers",),
    "actor_rollout_ref.rollout.checkpoint_engine": ("update_weights_bucket_megabytes",),
    "actor_rollout_ref.rollout.engine_kwargs": ("vllm",),
    "algorithm.filter_groups": ("enable", "metric", "max_num_gen_batches", "max_inflight_gen_batches"),
    "algorithm.rollout_correction": (
        *("bypass_mode", "rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize"),
        *("rollout_rs", "rollout_rs_threshold"),
    ),
}
REWARD_FIELDS = ("score", "acc", "format", "reward_timeouts", "reward_errors")  # of training.reward.compute_score
_ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
_KL = (*_ESTIMATORS, *(f"{name}+" for name in _ESTIMATORS))  # "+": the gradient of k2 whatever the value
CHOICES: dict[str, tuple[str | None, ...]] = {  # what verl only tells once it runs; a test holds these to its own
    "actor_rollout_ref.actor.loss_agg_mode": (
        *("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    ),
    "actor_rollout_ref.actor.kl_loss_type": _KL,
    "actor_rollout_ref.actor.policy_loss.loss_mode": (
        *("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo"),
    ),
    "algorithm.kl_penalty": _KL,
    "algorithm.kl_ctrl.type": ("fixed", "adaptive"),
    "algorithm.filter_groups.metric": ("reward", *REWARD_FIELDS),
    "algorithm.rollout_correction.rollout_is": (None, "token", "sequence"),
}
REJECTIONS = (  # algorithm.rollout_correction.rollout_rs: some of these, comma-separated
    *("token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3"),
    *("seq_mean_k1", "seq_mean_k2", "seq_mean_k3", "seq_max_k2", "seq_max_k3"),
)
VLLM_ONLY = (  # keys of the rollout that the server for CPUs has no use for
    *("tensor_model_parallel_size", "gpu_memory_utilization", "enforce_eager", "free_cache_engine"),
    *("enable_chunked_prefill", "enable_prefix_caching", "engine_kwargs"),
)
GRPO_DEFAULTS: dict[str, Any] = {
    "actor_rollout_ref": {
        "actor": {"ppo_mini_batch_size": None, "entropy_coeff": 0.0},  # null: verl.data.train_batch_size, on-policy
        "rollout": {"n": 8, "top_p": 1.0, "tensor_model_parallel_size": 1},
        "ref": {"fsdp_config": {"model_dtype": "bf16"}},
    },
    "algorithm": {"filter_groups": {"max_num_gen_batches": 10}},  # verl: no limit, and its trainer keeps none
}
CUDA_DEFAULTS: dict[str, Any] = {
    "actor_rollout_ref": {
        "rollout": {"name": "vllm", "gpu_memory_utilization": 0.6},
        "ref": {"fsdp_config": {"param_offload": True}},
    },
}
CPU_DEFAULTS: dict[str, Any] = {  # one process of each kind; the server's log-probs are the policy's to 1e-4
    "actor_rollout_ref": {
        "rollout": {"name": "hf", "agent": {"num_workers": 1}},
        "ref": {"fsdp_config": {"model_dtype": "fp32"}},
    },
    "algorithm": {"rollout_correction": {"bypass_mode": True}},
    "reward": {"num_workers": 1},
}
_A, _R = "verl.actor_rollout_ref.actor", "verl.actor_rollout_ref.rollout"
OURS_INSTEAD = {
    "verl.actor_rollout_ref.model": "verl.model",
    f"{_A}.optim": "verl.optim",
    f"{_A}.clip_ratio": "clip_ratio_low` and `clip_ratio_high",
    f"{_A}.grad_clip": "verl.optim.clip_grad",
    f"{_A}.fsdp_config": "verl.engine",
    f"{_A}.strategy": "verl.engine.strategy",
    f"{_A}.use_torch_compile": "verl.engine.use_torch_compile",
    f"{_A}.ulysses_sequence_parallel_size": "verl.engine.ulysses_sequence_parallel_size",
    f"{_A}.use_remove_padding": "verl.model.use_remove_padding",
    f"{_A}.use_dynamic_bsz": "verl.data.use_dynamic_bsz",
    f"{_A}.ppo_micro_batch_size_per_gpu": "verl.data.micro_batch_size_per_gpu",
    f"{_A}.ppo_max_token_len_per_gpu": "verl.data.max_token_len_per_gpu",
    f"{_A}.checkpoint": "verl.trainer.save_freq",
    f"{_A}.data_loader_seed": "seed",
    f"{_R}.seed": "seed",
    f"{_R}.dtype": "verl.engine.mixed_precision.param_dtype",
    f"{_R}.prompt_length": "verl.data.max_prompt_length",
    f"{_R}.response_length": "verl.data.max_response_length",
    f"{_R}.max_model_len": "data.max_length",
    f"{_R}.log_prob_use_dynamic_bsz": "verl.data.use_dynamic_bsz",
    f"{_R}.log_prob_micro_batch_size_per_gpu": "verl.data.micro_batch_size_per_gpu",
    f"{_R}.log_prob_max_token_len_per_gpu": "verl.data.max_token_len_per_gpu",
    "verl.reward.custom_reward_function": "reward.grader",
    "verl.algorithm.adv_estimator": "trainer",
    "verl.data.seed": "seed",
}


@functools.cache  # a quarter of a second, for every arm and seed
def compose_verl(name: str) -> DictConfig:
    """The tree of verl's `trainer/config/NAME.yaml`, references not yet resolved; read-only: all share it."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    found = importlib.util.find_spec("verl")
    if found is None or found.origin is None:
        raise ConfigError("verl is not installed in this environment; run `pip install verl==0.9.1`")
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(Path(found.origin).parent / "trainer" / "config"), version_base=None):
        tree = compose(name)
    OmegaConf.set_readonly(tree, True)
    return tree


def extension(ppo: dict[str, Any], device: str) -> dict[str, Any]:
    """What a GRPO arm's `verl` tree has besides an SFT arm's, from verl's composed PPO tree."""
    tree: dict[str, Any] = {"data": {"max_prompt_length": None, "max_response_length": 512}}
    for dotted, keys in KEYS.items():
        source = _at(ppo, dotted)
        parent, _, name = dotted.rpartition(".")
        holder = tree.setdefault(parent, {}) if parent else tree
        holder[name] = {key: copy.deepcopy(source[key]) for key in keys}
    for dotted, keys in NESTED.items():
        parent, _, name = dotted.rpartition(".")
        holder = _at(tree, parent)
        holder[name] = {key: holder[name][key] for key in keys}
    for layer in (GRPO_DEFAULTS, CPU_DEFAULTS if device == "cpu" else CUDA_DEFAULTS):
        lay(tree, layer)
    return tree


def verl_defaults(name: str) -> dict[str, Any]:
    """The tree of verl's `trainer/config/NAME.yaml`, references resolved; the caller's own."""
    return copy.deepcopy(_resolved(name))


@functools.cache
def _resolved(name: str) -> Any:
    return OmegaConf.to_container(compose_verl(name), resolve=True, throw_on_missing=False)


def grpo_tree(device: str) -> dict[str, Any]:
    """What a GRPO arm's `verl` tree has besides, with the defaults of the device."""
    return extension(_resolved(PPO_TREE), device)


def lay(tree: dict[str, Any], layer: dict[str, Any]) -> None:
    """Write the leaves of `layer` over those of `tree`, in place."""
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            lay(tree[key], value)
        else:
            tree[key] = copy.deepcopy(value)


def _at(tree: dict[str, Any], dotted: str) -> dict[str, Any]:
    for key in dotted.split("."):
        tree = tree[key]
    return tree
