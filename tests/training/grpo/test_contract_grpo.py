"""What the GRPO arm and the frozen reference rely on in verl 0.9.1, its insides above all."""

import inspect
import re

import pytest
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer import main_ppo
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.trainer.ppo.v1 import agent_loop_tq, trainer_base
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils import distributed
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from eaft_verl.training.grpo import rollout_server as rollout_hf
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
