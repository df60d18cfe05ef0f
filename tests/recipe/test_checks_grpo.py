"""`trainer: grpo` in a recipe: what its tree offers, what main_ppo is given, what is refused before Ray starts."""

from typing import Any

import pytest
from config_fixtures import composed_once  # noqa: F401
from omegaconf import OmegaConf

from eaft_verl.errors import ConfigError
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.training.grpo.config import RunFiles, Schedule, ppo_config, save_steps, total_ppo_steps, updates_per_step

RECIPE = """
model: {folder}/model
device: cpu
seed: 3
data: {{train: {folder}/train.jsonl, max_length: 128}}
evaluate: {{target: [sums]}}
compare: {{match: none}}
verl:
  optim: {{lr: 2.0e-5}}
  data: {{train_batch_size: 8, max_token_len_per_gpu: 256}}
arms:
  sft: {{objective: {{name: sft}}}}
  grpo: {{trainer: grpo, verl: {{data: {{max_response_length: 16}}, actor_rollout_ref: {{rollout: {{n: 4}}}}}}}}
"""
THREE = "verl.trainer.n_gpus_per_node=3"
A, R = "verl.actor_rollout_ref.actor", "verl.actor_rollout_ref.rollout"
F, C = "verl.algorithm.filter_groups", "verl.algorithm.rollout_correction"
BYPASS = f"{C}.bypass_mode=true"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "train.jsonl").write_text("", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return load_recipe(folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"{R}.n=1"], "rollout.n=1 must be at least 2"),
        ([f"{A}.ppo_mini_batch_size=3"], "ppo_mini_batch_size=3 must divide verl.data.train_batch_size=8"),
        ([f"{A}.ppo_epochs=0"], "ppo_epochs=0 must be at least 1"),
        (["verl.data.max_response_length=0"], "max_response_length=0 must be at least 1"),
        (["verl.data.max_response_length=128"], "together exceed data.max_length=128"),
        (["verl.data.max_prompt_length=120"], "max_prompt_length=120 and max_response_length=16 together exceed"),
        ([f"{R}.name=vllm"], "rollout.name=vllm needs a GPU"),
        ([f"{R}.name=sglang"], "rollout.name='sglang' is not one of hf, vllm"),
        ([f"{R}.gpu_memory_utilization=0.9"], f"gpu_memory_utilization has no effect with {R}.name=hf"),
        ([f"{R}.temperature=0.0"], "temperature=0.0 must be above 0"),
        (["verl.trainer.test_freq=2"], "test_freq=2 has no effect with trainer: grpo"),
        ([THREE, "verl.data.train_batch_size=3", f"{A}.ppo_mini_batch_size=1"], "3 data-parallel workers"),
        (["reward.grader=prime_math"], "prime_math"),
        (["objective.name=eaft"], "objective has no effect with trainer: grpo"),
        ([f"{R}.nn=4"], "did you mean verl.actor_rollout_ref.rollout.n"),
        ([f"{A}.optim.lr=1e-6"], f"{A}.optim is set through `verl.optim`"),
        (["device=cuda", f"{R}.tensor_model_parallel_size=2"], "tensor_model_parallel_size=2 must divide"),
        (["device=cuda", f"{R}.name=hf"], "name=hf decodes on the CPU; on device=cuda use vllm"),
        (["device=cuda", BYPASS, f"{R}.top_p=0.9"], "are not the policy's"),
        (["device=cuda", BYPASS, f"{R}.top_k=20"], "are not the policy's"),
        ([f"{R}.top_p=0.0"], "top_p=0.0 must be above 0"),
        ([f"{R}.top_k=0"], "top_k=0 must be -1 (off) or at least 1"),
        ([f"{A}.loss_agg_mode=bogus"], f"{A}.loss_agg_mode='bogus' is not one of token-mean, token-sum, seq-mean"),
        ([f"{A}.kl_loss_type=k9"], f"{A}.kl_loss_type='k9' is not one of kl, k1, abs"),
        ([f"{A}.policy_loss.loss_mode=ppo"], "policy_loss.loss_mode='ppo' is not one of vanilla"),
        ([f"{A}.policy_loss.loss_mode=dro"], "dro_beta=None must be above 0 with loss_mode=dro"),
        (["verl.algorithm.kl_penalty=full"], "kl_penalty='full' is not one of kl, k1"),
        (["verl.algorithm.kl_ctrl.type=pid"], "kl_ctrl.type='pid' is not one of fixed, adaptive"),
        (["verl.algorithm.kl_ctrl={type: adaptive, horizon: 0}"], "horizon=0 must be above 0"),
        ([f"{F}.metric=nosuch"], "filter_groups.metric='nosuch' is not one of reward, score, acc"),
        ([f"{F}.max_num_gen_batches=0"], "max_num_gen_batches=0 must be at least 1"),
        ([f"{C}.rollout_is=tokens", f"{C}.bypass_mode=false"], "rollout_is='tokens' is not one of null, token, seq"),
        ([f"{C}.rollout_is=token"], "rollout_is=token has no effect with bypass_mode=true"),
        ([f"{C}.rollout_is_threshold=0.0"], "rollout_is_threshold=0.0 must be a number above 0"),
        ([f"{C}.loss_type=reinforce"], "loss_type"),
        (["device=cuda", f"{C}.rollout_rs=token_k9"], "rollout_rs='token_k9' is not one of token_k1"),
        (["device=cuda", f"{C}.rollout_rs=token_k2"], "rollout_rs_threshold=None must be a number above 0"),
        (["device=cuda", f"{C}.rollout_rs=token_k2", f"{C}.rollout_rs_threshold='1_2'"], "1_2 must be a number above"),
        (["device=cuda", f"{C}.rollout_rs=token_k1", f"{C}.rollout_rs_threshold='3_2'"], "or LOWER_UPPER, such as"),
        (["device=cuda", f"{C}.rollout_rs='token_k1,seq_sum_k3'", f"{C}.rollout_rs_threshold='1,2,3'"], "one for each"),
    ],
)  # fmt: skip
def test_what_is_refused(recipe: Any, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(resolve(recipe, "grpo", overrides))
    assert words in str(caught.value)


def test_a_key_of_main_ppo_in_an_sft_arm_says_where_it_belongs(recipe: Any) -> None:
    with pytest.raises(ConfigError, match="is for arms with trainer: grpo, and this one has trainer: sft"):
        resolve(recipe, "sft", [f"{R}.n=4"])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["device=cuda"],
        [f"{A}.use_kl_loss=true", f"{A}.kl_loss_type=k3+"],
        [f"{A}.ppo_mini_batch_size=4"],
        [f"{R}.top_p=0.9", f"{R}.top_k=20"],
        ["device=cuda", f"{R}.top_p=0.9"],
        ["device=cuda", f"{C}.rollout_is=token", f"{C}.rollout_is_threshold=5.0"],
        ["device=cuda", f"{C}.rollout_rs='token_k1,seq_max_k3'", f"{C}.rollout_rs_threshold='0.5_2.0,3'"],
        ["device=cuda", f"{C}.rollout_rs='token_k1,seq_max_k3'", f"{C}.rollout_rs_threshold=2.0"],
        [f"{F}.enable=true", f"{F}.metric=acc", f"{F}.max_num_gen_batches=3"],
    ],
)
def test_what_is_accepted(recipe: Any, overrides: list[str]) -> None:
    check(resolve(recipe, "grpo", overrides))


def built(recipe: Any, *overrides: str) -> Any:
    config = resolve(recipe, "grpo", overrides)
    files = RunFiles("/run/prompts.parquet", "/model", "/run")
    return ppo_config(
        config, files, Schedule(10, [5, 10], [3, 6, 9], save_seconds=60 * config.save_minutes), [2], "float32"
    )


def test_shared_keys_mean_the_same_to_main_ppo(recipe: Any) -> None:
    tree = built(recipe)
    actor, rollout = tree.actor_rollout_ref.actor, tree.actor_rollout_ref.rollout
    assert tree.algorithm.adv_estimator == "grpo" and not actor.use_kl_loss
    assert actor.optim.lr == 2e-5 and actor.fsdp_config.strategy == "fsdp2" and actor.fsdp_config.seed == 3
    assert (tree.data.train_batch_size, actor.ppo_mini_batch_size, rollout.n) == (8, 8, 4)
    assert (tree.data.max_prompt_length, tree.data.max_response_length) == (112, 16)
    assert (rollout.prompt_length, rollout.response_length, rollout.max_model_len) == (112, 16, 128)
    assert actor.ppo_max_token_len_per_gpu == 256 and rollout.log_prob_max_token_len_per_gpu == 256
    assert {tree.data.seed, rollout.seed, actor.data_loader_seed, tree.trainer.eaft.seed} == {3}
    assert tree.trainer.total_training_steps == 10 and tree.trainer.save_freq == -1
    ours = tree.trainer.eaft
    assert (ours.points, ours.saves, ours.steps, ours.save_seconds) == ([5, 10], [3, 6, 9], 10, 900)
    assert tree.reward.custom_reward_function.path == "pkg://eaft_verl.training.grpo.reward"
    assert tree.data.train_files == "/run/prompts.parquet" and tree.actor_rollout_ref.model.path == "/model"
    assert not OmegaConf.missing_keys(tree) - {key for key in OmegaConf.missing_keys(tree) if "reward_model" in key}


def test_the_device_decides_the_rollout(recipe: Any) -> None:
    cpu, cuda = built(recipe), built(recipe, "device=cuda")
    assert cpu.actor_rollout_ref.rollout.name == "hf" and cuda.actor_rollout_ref.rollout.name == "vllm"
    assert cpu.algorithm.rollout_correction.bypass_mode and not cuda.algorithm.rollout_correction.bypass_mode
    assert not cpu.actor_rollout_ref.rollout.free_cache_engine and cuda.actor_rollout_ref.rollout.free_cache_engine
    assert cpu.actor_rollout_ref.rollout.dtype == "bfloat16"
    exact = built(recipe, "verl.engine.mixed_precision.param_dtype=fp32")
    assert exact.actor_rollout_ref.rollout.dtype == "float32"


def test_verbatim_keys_reach_main_ppo(recipe: Any) -> None:
    tree = built(recipe, f"{A}.use_kl_loss=true", f"{A}.kl_loss_coef=0.02", f"{A}.clip_ratio_high=0.28", f"{R}.top_k=5")
    actor = tree.actor_rollout_ref.actor
    assert (actor.use_kl_loss, actor.kl_loss_coef, actor.clip_ratio_high) == (True, 0.02, 0.28)
    assert tree.actor_rollout_ref.rollout.top_k == 5


def test_steps_and_updates(recipe: Any) -> None:
    config = resolve(recipe, "grpo", [f"{A}.ppo_mini_batch_size=2", f"{A}.ppo_epochs=3", "verl.trainer.total_epochs=2"])
    assert updates_per_step(config) == 12
    assert total_ppo_steps(config, prompts=20) == 4  # the last, smaller batch of an epoch is dropped
    assert save_steps(config, 4, 20) == []
    every = resolve(recipe, "grpo", ["verl.trainer.save_freq=2"])
    assert save_steps(every, 7, 20) == [2, 4, 6]
    epochs = resolve(recipe, "grpo", ["verl.trainer.save_freq=after_each_epoch"])
    assert save_steps(epochs, 7, 24) == [3, 6]
