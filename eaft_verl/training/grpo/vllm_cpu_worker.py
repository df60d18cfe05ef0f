"""The side of vLLM's worker: weights that arrive again find their places. vLLM imports this by name, see `private`."""

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from eaft_verl.training.verl_cpu.private import keep_weights_beside_packed

keep_weights_beside_packed()


class WorkerExtension(vLLMColocateWorkerExtension):
    """verl's, in a process whose layers keep their weights."""
