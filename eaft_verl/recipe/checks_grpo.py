"""Cross-field checks of an arm with `trainer: grpo`, made without torch and before Ray starts."""

import importlib.metadata

from eaft_verl.errors import require
from eaft_verl.recipe.config import Config, value_of
from eaft_verl.recipe.verl_keys import CHOICES, REJECTIONS, VLLM_ONLY, grpo_tree

ROLLOUTS = {"cpu": "hf", "cuda": "vllm"}
_ROLLOUT = "verl.actor_rollout_ref.rollout"


def check_grpo(config: Config) -> None:
    """Raise ConfigError for the first setting that main_ppo would refuse later, ignore, or train wrongly with."""
    _check_choices(config)
    _check_rollout(config)
    _check_sampling(config)
    _check_correction(config)
    _check_lengths(config)
    _check_groups(config)
    trainer = config.verl.trainer
    require(
        trainer.test_freq == -1,
        f"verl.trainer.test_freq={trainer.test_freq} has no effect with trainer: grpo; its checkpoints are evaluated "
        "after 1, 2, 4, 8, ... steps",
    )


def _cpu_build_of_vllm() -> bool:
    """Whether a CPU build of vLLM is installed: for trials of what a GPU run would do (examples/setup_vllm_cpu.sh)."""
    try:
        return importlib.metadata.version("vllm").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _check_choices(config: Config) -> None:
    for key, allowed in CHOICES.items():
        value = value_of(config, f"verl.{key}")
        names = ", ".join(name or "null" for name in allowed)
        require(value in allowed, f"verl.{key}={value!r} is not one of {names}")
    actor, algorithm = config.verl.actor_rollout_ref.actor, config.verl.algorithm
    loss, penalty, groups = actor.policy_loss, algorithm.kl_ctrl, algorithm.filter_groups
    require(
        loss.loss_mode != "dro" or (loss.dro_beta or 0) > 0,
        f"verl.actor_rollout_ref.actor.policy_loss.dro_beta={loss.dro_beta} must be above 0 with loss_mode=dro",
    )
    require(
        penalty.type != "adaptive" or penalty.horizon > 0,
        f"verl.algorithm.kl_ctrl.horizon={penalty.horizon} must be above 0 with type=adaptive",
    )
    for name in ("max_num_gen_batches", "max_inflight_gen_batches"):
        require(groups[name] >= 1, f"verl.algorithm.filter_groups.{name}={groups[name]} must be at least 1")


def _check_rollout(config: Config) -> None:
    rollout, device = config.verl.actor_rollout_ref.rollout, config.device
    known = ROLLOUTS.values()
    require(rollout.name in known, f"{_ROLLOUT}.name={rollout.name!r} is not one of {', '.join(known)}")
    why = "vllm needs a GPU" if device == "cpu" else "hf decodes on the CPU"
    require(
        rollout.name == ROLLOUTS[device] or (rollout.name == "vllm" and _cpu_build_of_vllm()),
        f"{_ROLLOUT}.name={why}; on device={device} use {ROLLOUTS[device]}",
    )
    if rollout.name == "hf":
        usual = grpo_tree(device)["actor_rollout_ref"]["rollout"]
        changed = [name for name in VLLM_ONLY if rollout[name] != usual[name]]
        require(not changed, f"{_ROLLOUT}.{changed[0] if changed else ''} has no effect with {_ROLLOUT}.name=hf")
    else:
        parallel, devices = rollout.tensor_model_parallel_size, config.verl.trainer.n_gpus_per_node
        require(
            parallel >= 1 and devices % parallel == 0,
            f"{_ROLLOUT}.tensor_model_parallel_size={parallel} must divide verl.trainer.n_gpus_per_node={devices}",
        )


def _check_sampling(config: Config) -> None:
    rollout = config.verl.actor_rollout_ref.rollout
    heat, top_k, top_p = rollout.temperature, rollout.top_k, rollout.top_p
    require(heat > 0, f"{_ROLLOUT}.temperature={heat} must be above 0: equal answers teach nothing")
    require(top_k == -1 or top_k >= 1, f"{_ROLLOUT}.top_k={top_k} must be -1 (off) or at least 1")
    require(0 < top_p <= 1, f"{_ROLLOUT}.top_p={top_p} must be above 0 and at most 1 (off)")
    bypass = config.verl.algorithm.rollout_correction.bypass_mode
    require(
        rollout.name == "hf" or not bypass or (top_k == -1 and top_p == 1),
        f"verl.algorithm.rollout_correction.bypass_mode=true trains on vllm's log-probabilities, which under {_ROLLOUT}"
        f".top_k={top_k}, top_p={top_p} are not the policy's; switch it off, or leave top_k at -1 and top_p at 1.0",
    )


def _check_correction(config: Config) -> None:
    """rollout_correction: importance weights and rejection act where old log-probabilities are computed again."""
    key, block = "verl.algorithm.rollout_correction", config.verl.algorithm.rollout_correction
    for name in ("rollout_is", "rollout_rs"):
        require(
            block[name] is None or not block.bypass_mode,
            f"{key}.{name}={block[name]} has no effect with bypass_mode=true; set that to false or remove it",
        )
    _check_bounds(f"{key}.rollout_is_threshold", block.rollout_is_threshold, pair=False)
    if block.rollout_rs is None:
        return
    chosen = [name.strip() for name in str(block.rollout_rs).split(",")]
    for name in chosen:
        require(name in REJECTIONS, f"{key}.rollout_rs={name!r} is not one of {', '.join(REJECTIONS)}")
    bounds = str(block.rollout_rs_threshold).split(",")
    require(
        len(bounds) in (1, len(chosen)),
        f"{key}.rollout_rs_threshold={block.rollout_rs_threshold} must be one bound, or one for each of rollout_rs",
    )
    for name, bound in zip(chosen, bounds * (len(chosen) // len(bounds)), strict=True):
        _check_bounds(f"{key}.rollout_rs_threshold", bound.strip(), pair=name.endswith("k1"))


def _check_bounds(key: str, value: object, *, pair: bool) -> None:
    """UPPER, or where a pair is allowed LOWER_UPPER; all above 0."""
    try:
        numbers = [float(part) for part in str(value).split("_")]
    except ValueError:
        numbers = [0.0]
    require(
        len(numbers) <= 1 + pair and 0 < numbers[0] <= numbers[-1],
        f"{key}={value} must be a number above 0" + (" or LOWER_UPPER, such as 0.5_2.0" if pair else ""),
    )


def _check_lengths(config: Config) -> None:
    data, longest = config.verl.data, config.data.max_length
    response, prompt = data.max_response_length, data.max_prompt_length
    require(type(response) is int and response >= 1, f"verl.data.max_response_length={response!r} must be at least 1")
    require(
        prompt is None or (type(prompt) is int and prompt >= 1),
        f"verl.data.max_prompt_length={prompt!r} must be null (data.max_length less the response) or at least 1",
    )
    room = longest - response
    require(
        room >= (prompt or 1),
        f"verl.data.max_prompt_length={prompt} and max_response_length={response} together exceed "
        f"data.max_length={longest}; raise data.max_length or lower one of them",
    )


def _check_groups(config: Config) -> None:
    rollout, actor = config.verl.actor_rollout_ref.rollout, config.verl.actor_rollout_ref.actor
    trainer, prompts = config.verl.trainer, config.verl.data.train_batch_size
    require(
        type(rollout.n) is int and rollout.n >= 2,
        f"verl.actor_rollout_ref.rollout.n={rollout.n!r} must be at least 2: an advantage is the distance from the "
        "mean reward of the prompt's group",
    )
    mini = actor.ppo_mini_batch_size or prompts
    require(
        prompts % mini == 0,
        f"verl.actor_rollout_ref.actor.ppo_mini_batch_size={mini} must divide verl.data.train_batch_size={prompts} "
        "(both count prompts)",
    )
    ranks = trainer.nnodes * trainer.n_gpus_per_node // config.verl.engine.ulysses_sequence_parallel_size
    require(
        mini * rollout.n % ranks == 0,
        f"a mini-batch of {mini} prompts x rollout.n={rollout.n} responses cannot be split over {ranks} data-parallel "
        "workers; change one of them",
    )
    require(actor.ppo_epochs >= 1, f"verl.actor_rollout_ref.actor.ppo_epochs={actor.ppo_epochs} must be at least 1")
