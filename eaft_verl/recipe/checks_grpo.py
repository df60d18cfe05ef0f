"""Cross-field checks of an arm with `trainer: grpo`, made without torch and before Ray starts."""

from omegaconf import DictConfig, OmegaConf

from eaft_verl.errors import require
from eaft_verl.recipe.verl_keys import VLLM_ONLY, grpo_tree

ROLLOUTS = ("hf", "vllm")


def check_grpo(config: DictConfig) -> None:
    """Raise ConfigError for the first setting that main_ppo would refuse later, ignore, or train wrongly with."""
    _check_rollout(config)
    _check_lengths(config)
    _check_groups(config)
    trainer = config.verl.trainer
    require(
        trainer.test_freq == -1,
        f"verl.trainer.test_freq={trainer.test_freq} has no effect with trainer: grpo; its checkpoints are evaluated "
        "after 1, 2, 4, 8, ... steps",
    )


def _check_rollout(config: DictConfig) -> None:
    rollout, device = config.verl.actor_rollout_ref.rollout, config.device
    key = "verl.actor_rollout_ref.rollout"
    require(rollout.name in ROLLOUTS, f"{key}.name={rollout.name!r} is not one of {', '.join(ROLLOUTS)}")
    require(
        device == "cuda" or rollout.name == "hf",
        f"{key}.name=vllm needs a GPU; on device=cpu use hf, the rollout server on transformers",
    )
    if rollout.name == "hf":
        usual = grpo_tree(device)["actor_rollout_ref"]["rollout"]
        changed = [name for name in VLLM_ONLY if OmegaConf.to_container(rollout)[name] != usual[name]]
        require(not changed, f"{key}.{changed[0] if changed else ''} has no effect with {key}.name=hf; remove it")
    else:
        parallel, devices = rollout.tensor_model_parallel_size, config.verl.trainer.n_gpus_per_node
        require(
            parallel >= 1 and devices % parallel == 0,
            f"{key}.tensor_model_parallel_size={parallel} must divide verl.trainer.n_gpus_per_node={devices}",
        )
    require(
        config.verl.model.lora_rank == 0,
        f"verl.model.lora_rank={config.verl.model.lora_rank}: a GRPO arm trains and exports whole weights (the hf "
        "rollout takes no adapter, and verl would export one unmerged); set it to 0 in this arm",
    )
    require(
        rollout.temperature > 0, f"{key}.temperature={rollout.temperature} must be above 0: equal answers teach nothing"
    )


def _check_lengths(config: DictConfig) -> None:
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


def _check_groups(config: DictConfig) -> None:
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
