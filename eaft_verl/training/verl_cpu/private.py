"""Everything of verl 0.9.1 that has no public hook and that GRPO on CPU needs. Nothing else may touch verl's insides.

`tests/training/test_contract.py` asserts that each of these places is still as it was; another version is refused.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from typing import Any

from eaft_verl.errors import ConfigError

VERL_VERSION = "0.9.1"
CPU_BACKEND = "cpu:gloo"
# Ray's resource that a CPU worker takes, CPU where not set: main_ppo counts GPU only, which on CPU is just a number
SLOT_VARIABLE = "EAFT_RAY_SLOT"


def require_version() -> None:
    """ConfigError where another verl is installed than the one these places were read in, or a TRL that it asks for
    something that is no longer there."""
    installed = importlib.metadata.version("verl")
    if installed != VERL_VERSION:
        raise ConfigError(f"verl {installed} is installed; this project is made for exactly verl=={VERL_VERSION}")
    if importlib.util.find_spec("trl") and not importlib.util.find_spec("trl.experimental.ppo"):
        trl = importlib.metadata.version("trl")
        raise ConfigError(
            f"trl {trl} is installed, and verl {VERL_VERSION} cannot build a model beside it: uninstall trl here, and "
            "keep an environment of its own for it"
        )


def name_cpu_backend_once() -> None:
    """Let verl's workers form a process group on CPU: it writes 'cpu:gloo,cpu:gloo', which torch refuses."""
    require_version()
    from verl.utils import distributed

    original = distributed.initialize_global_process_group_ray

    @functools.wraps(original)
    def initialize(timeout_second: float | None = None, backend: str | None = None) -> None:
        original(timeout_second, backend or CPU_BACKEND)

    distributed.initialize_global_process_group_ray = initialize


def register_adapter(name: str, target: str) -> None:
    """Make `target` ('package.module.Class') the worker's side of the rollout `name`; verl has no function for it."""
    require_version()
    from verl.workers.rollout import base

    base._ROLLOUT_REGISTRY[(name, "async")] = target


@contextlib.contextmanager
def unpinned_offload() -> Iterator[None]:
    """Within the block verl's engine offloads without pinned memory, which exists only beside an accelerator."""
    require_version()
    from verl.workers.engine.fsdp import transformer_impl

    original = transformer_impl.CPUOffloadPolicy
    transformer_impl.CPUOffloadPolicy = lambda pin_memory: original(pin_memory=False)
    try:
        yield
    finally:
        transformer_impl.CPUOffloadPolicy = original


def cpu_vllm_replica() -> Any:
    """verl's vLLM replica for a CPU build of vLLM: its workers keep the weights that synchronisation writes to."""
    require_version()
    import ray
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

    class CPUServer(vLLMHttpServer):
        def _get_worker_extension_cls(self) -> str:
            return "eaft_verl.training.grpo.vllm_cpu_worker.WorkerExtension"

    class CPUReplica(vLLMReplica):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.server_class = ray.remote(CPUServer)

    return CPUReplica


def keep_weights_beside_packed() -> None:
    """vLLM's linear layers on the CPU pack their weights and drop them, so that no other ones can be loaded."""
    require_version()
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm

    @functools.wraps(original)
    def dispatch(layer: Any, remove_weight: bool = False) -> None:
        original(layer, remove_weight=False)

    utils.dispatch_cpu_unquantized_gemm = dispatch


def group_of(key: str) -> tuple[str, int]:
    """(prompt uid, number of the sample) of a trajectory's key in TransferQueue: 'uid_sample_output'."""
    uid, sample, _output = key.rsplit("_", 2)
    return uid, int(sample)


def frozen_engine(engine_class: type, dtype: Any) -> type:
    """The engine class for a model that is never trained: its weights in `dtype`, its buffers as they were computed.

    verl's `model_dtype` casts the rotary frequencies too, which changes every logit of a long text.
    """
    require_version()

    class FrozenEngine(engine_class):
        def _build_module(self) -> Any:
            module = super()._build_module()
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)
            return module

    return FrozenEngine


def trainer_actor() -> Any:
    """main_ppo's own trainer actor: `run(config)` is what `python -m verl.trainer.main_ppo` waits for."""
    require_version()
    from verl.trainer.main_ppo import TaskRunnerV1

    return TaskRunnerV1
