"""What the GRPO arm and the frozen reference rely on in verl 0.9.1, its insides above all."""

import ast
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer import main_ppo
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.trainer.ppo.v1 import agent_loop_tq, get_trainer_cls, trainer_base
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import distributed
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput
from verl.workers.utils import losses, padding

from eaft_verl.recipe.verl_keys import CHOICES, REJECTIONS
from eaft_verl.training.grpo import rollout_server as rollout_hf
from eaft_verl.training.grpo.reward import compute_score
from eaft_verl.training.grpo.states import TRAINER
from eaft_verl.training.grpo.trainer import SavingTrainer
from eaft_verl.training.verl_cpu.private import frozen_engine, group_of, trainer_actor, unpinned_offload


def source(item: object) -> str:
    return inspect.getsource(item)


def test_the_process_group_is_made_by_the_function_that_is_wrapped() -> None:
    wrapped = inspect.unwrap(distributed.initialize_global_process_group_ray)
    assert list(inspect.signature(wrapped).parameters) == ["timeout_second", "backend"]
    assert 'f"cpu:gloo,{' in source(wrapped)


def test_the_rollout_is_registered_where_verl_looks() -> None:
    assert base._ROLLOUT_REGISTRY[(rollout_hf.NAME, "async")] == "eaft_verl.training.grpo.rollout_server.HfAdapter"
    assert "_ROLLOUT_REGISTRY[(rollout_name, mode)]" in source(base)
    assert RolloutReplicaRegistry.get(rollout_hf.NAME) is rollout_hf.HfReplica


def test_the_reference_is_offloaded_through_the_name_that_is_swapped() -> None:
    original = transformer_impl.CPUOffloadPolicy
    assert "CPUOffloadPolicy(pin_memory=True)" in source(transformer_impl.FSDPEngine._build_fsdp_module)
    with unpinned_offload():
        assert transformer_impl.CPUOffloadPolicy(pin_memory=True).pin_memory is False
    assert transformer_impl.CPUOffloadPolicy is original


def test_the_engine_casts_buffers_and_builds_where_it_is_overridden() -> None:
    """Why the frozen model is loaded in float32 and its weights cast afterwards."""
    build = transformer_impl.FSDPEngine._build_module
    assert list(inspect.signature(build).parameters) == ["self"]
    assert "module.to(torch_dtype)" in source(build)
    assert "self._build_module()" in source(transformer_impl.FSDPEngine._build_model_optimizer)
    assert issubclass(frozen_engine(transformer_impl.FSDPEngineWithLMHead, None), transformer_impl.FSDPEngineWithLMHead)


def test_log_probabilities_are_read_where_responses_are_predicted() -> None:
    """Why the engine forms no others, and what of a micro-batch it is told that by."""
    engine = transformer_impl.FSDPEngineWithLMHead
    assert list(inspect.signature(engine.prepare_model_inputs).parameters) == ["self", "micro_batch"]
    wanted = ["self", "output", "output_args", "micro_batch", "logits_processor_func"]
    assert list(inspect.signature(engine.prepare_model_outputs).parameters) == wanted
    assert "self.module(" in source(engine.forward_step) and "**model_inputs" in source(engine.forward_step)
    assert 'log_prob = no_padding_2_padding(model_output["log_probs"], data)' in source(losses.ppo_loss)
    assert "values[seq_offset - resp_len - 1 : seq_offset - 1]" in source(padding.no_padding_2_padding)


def test_trajectories_are_named_as_they_are_read() -> None:
    assert 'f"{uid}_{session_id}_{i}"' in source(agent_loop_tq)
    assert group_of("a_b-c_7_0") == ("a_b-c", 7)


def test_the_trainer_actor_is_what_main_ppo_starts() -> None:
    assert trainer_actor() is main_ppo.TaskRunnerV1
    assert "run_ppo(config, task_runner_class=TaskRunnerV1)" in source(main_ppo)
    assert "ray.get(runner.run.remote(config))" in source(main_ppo.run_ppo)


def test_the_replay_buffer_is_what_ours_extends() -> None:
    assert {"poll_interval", "sampler_kwargs"} <= set(inspect.signature(ReplayBuffer.__init__).parameters)
    assert list(inspect.signature(ReplayBuffer.sample).parameters)[1:] == ["global_steps", "partition_id", "batch_size"]
    assert "self.failure_keys" in source(ReplayBuffer.__init__)
    assert "custom_sampler" in source(trainer_base)


def test_callbacks_and_loops_have_the_signatures_that_are_overridden() -> None:
    assert list(inspect.signature(CheckpointCallback.on_save).parameters)[:4] == [
        *("self", "trainer", "global_step", "checkpoint_dir")
    ]
    assert list(inspect.signature(SingleTurnAgentLoop.run).parameters)[:3] == ["self", "sampling_params", "priority"]
    assert {"token_ids", "log_probs", "stop_reason", "extra_fields"} <= set(TokenOutput.model_fields)
    assert re.search(r"async def launch_servers\(self\)", source(RolloutReplica))


@pytest.mark.parametrize("name", ["clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "global_batch_info"])
def test_the_policy_loss_reads_what_psft_sets(name: str) -> None:
    assert name in source(compute_policy_loss_vanilla)


def test_the_trainer_is_extended_at_its_public_hook() -> None:
    """A save is made as fit() makes it, the step counts as the last, and the mode is renamed before it is read."""
    assert get_trainer_cls(TRAINER) is SavingTrainer and issubclass(SavingTrainer, PPOTrainerSync)
    fit = source(trainer_base.PPOTrainer.fit)
    assert "self._save_checkpoint()" in fit and 'with marked_timer("save_checkpoint"' in fit
    order = ["self._save_checkpoint()", "self.on_step_end()", "self.logger.log(data=metrics, step=self.global_steps)"]
    assert [fit.index(call) for call in order] == sorted(map(fit.index, order))
    assert "self.global_steps <= self.total_training_steps" in fit
    assert "self.checkpoint_callback.on_save(" in source(trainer_base.PPOTrainer._save_checkpoint)
    assert "self.trainer_mode = self.config.trainer.v1.trainer_mode" in source(trainer_base.PPOTrainer.__init__)
    assert "get_trainer_cls(config.trainer.v1.trainer_mode)" in source(main_ppo)
    assert "refill_fn=self._add_prompts_to_generate" in source(trainer_base.PPOTrainer._build_replay_buffer)
    assert "self.refill_fn(dispatch_count)" in source(ReplayBuffer.sample)


def test_importance_weights_and_rejection_act_without_bypass_only() -> None:
    """And `loss_type`, which the recipe's tree leaves out, nowhere in this trainer."""
    assert "and not bypass_recomputing_logprobs" in source(trainer_base.PPOTrainer._compute_advantage)
    assert "loss_type" not in source(trainer_base) and "rollout_correction" not in source(losses)


def accepts(call: Callable[[], object]) -> bool:
    try:
        call()
    except (ValueError, NotImplementedError):
        return False
    return True


def words(item: object) -> set[str]:
    """Every string in a function's source: among them all that it could accept."""
    return {node.value for node in ast.walk(ast.parse(textwrap.dedent(source(item)))) if isinstance(node, ast.Constant)}


def test_the_choices_are_verl_s_own() -> None:
    zero, mask = torch.zeros(1, 2), torch.ones(1, 2)
    one = {"dp_size": 1, "batch_num_tokens": 2, "global_batch_size": 1, "loss_scale_factor": 1}
    known = {
        "actor_rollout_ref.actor.loss_agg_mode": {
            word
            for word in words(core_algos.agg_loss)
            if isinstance(word, str) and accepts(lambda word=word: core_algos.agg_loss(zero, mask, word, **one))
        },
        "actor_rollout_ref.actor.policy_loss.loss_mode": set(core_algos.POLICY_LOSS_REGISTRY) - {"bypass_mode"},
        "algorithm.kl_ctrl.type": {"fixed", "adaptive"},
        "algorithm.filter_groups.metric": {"reward", *compute_score("", "1", "1", grader="number")},
        "algorithm.rollout_correction.rollout_is": {None, "token", "sequence"},
    }
    names = {word for word in words(core_algos.kl_penalty_forward) if isinstance(word, str)}
    plain = {word for word in names if accepts(lambda word=word: core_algos.kl_penalty(zero, zero, word))}
    for key in ("actor_rollout_ref.actor.kl_loss_type", "algorithm.kl_penalty"):
        known[key] = plain | {f"{word}+" for word in plain}
    assert {key: set(names) for key, names in CHOICES.items()} == known
    assert set(REJECTIONS) == rollout_corr_helper.SUPPORTED_ROLLOUT_RS_OPTIONS
    for name in CHOICES["algorithm.kl_ctrl.type"]:
        core_algos.get_kl_controller(OmegaConf.create({"type": name, "kl_coef": 0.1, "target_kl": 0.1, "horizon": 9}))
    assert 'valid_is_levels = {"token", "sequence"}' in source(rollout_corr_helper)
    assert source(core_algos.get_kl_controller).count("if kl_ctrl.type ==") == 2


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_grpo_worker_gets_the_engine_that_saves(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Beside the engine of SFT arms, which is registered for the same devices."""
    from verl.workers.engine import EngineRegistry

    from eaft_verl.training.engine import SavingEngine
    from eaft_verl.training.grpo.session import environment
    from eaft_verl.training.sft.fused_head import FusedHeadEngine
    from eaft_verl.training.verl_cpu.engine import CpuEngine

    for name, value in environment(device, 1, "metrics").items():
        if name.startswith("VERL_ENGINE_"):
            monkeypatch.setenv(name, value)
    if device == "cuda":
        monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")  # which this machine has not
    found = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    assert found is {"cuda": SavingEngine, "cpu": CpuEngine}[device] and not issubclass(found, FusedHeadEngine)


def test_the_driver_on_a_cpu_has_verls_platform_for_it_and_says_nothing() -> None:
    """verl asks once, when it is imported, and warns that there is no accelerator where nobody told it."""
    code = """
from eaft_verl.training.grpo.session import environment, ray_runtime
ray_runtime("cpu", 1, environment("cpu", 1, "metrics"))
from verl.plugin.platform import get_platform
print(type(get_platform()).__module__)
"""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "eaft_verl.training.verl_cpu.platform"
    assert "accelerator" not in done.stdout + done.stderr and "PlatformCUDA" not in done.stdout + done.stderr
