"""verl's own vLLM rollout on a CPU build of vLLM, to try here what runs on GPUs elsewhere. verl's workers load it.

Only verl's registry is touched when this is imported; vLLM comes with the replica.
"""

from verl.workers.rollout.replica import RolloutReplicaRegistry

from eaft_verl.training.verl_cpu.private import cpu_vllm_replica

RolloutReplicaRegistry.register("vllm", cpu_vllm_replica)
