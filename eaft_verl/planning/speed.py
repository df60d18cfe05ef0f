"""Formulas of time: operations of an update, traffic beside them, and what a device is assumed to do. Pure.

An estimate by assumption: SPEED says which share of the peak is reached and where that number comes from; `--probe`
replaces it by a measurement.
"""

from dataclasses import dataclass

from eaft_verl.errors import ConfigError
from eaft_verl.planning.architectures import Architecture
from eaft_verl.planning.formulas import Rollout, Setup, kv_bytes

HOST_LINK = 25e9  # bytes/s of PCIe 4 x16, one way, pinned memory
HOST_MEMORY = 200e9  # bytes/s that Adam on the host's cores reaches
NODE_LINK = 25e9  # bytes/s between nodes for every device: one 200 Gbit/s adapter each
DECODE_SHARE = 0.6  # of the memory bandwidth, while decoding
ADAM_TRAFFIC = (
    28  # bytes per parameter of an fp32 step: weight, gradient, two moments read; all but the gradient written
)


@dataclass(frozen=True)
class Speed:
    """Peak of a device and the share assumed of it; `source` is printed with every estimate."""

    peak: float  # FLOP/s, dense bf16
    share: float  # of the peak, recomputation counted as work
    memory: float  # bytes/s
    link: float  # bytes/s that a collective reaches within a node
    source: str

    @property
    def flops(self) -> float:
        """FLOP/s assumed."""
        return self.peak * self.share


DEFAULT = "A100"
SPEED = {
    # peak and memory: NVIDIA's data sheets, of the SXM modules where there are any; dense bf16 summed in fp32. The
    # share of the A100 is an assumption (0.35-0.45 without recomputation, which is 0.47-0.60 with it). The H100's
    # follows torchtitan's Llama-3.1-8B on 8 of them, where 5,762 to 6,667 tokens/s are 30-35 % of the peak without
    # recomputation (benchmarks/llama3_h100_202412).
    # Links: order of magnitude of nccl-tests for 600 GB/s NVLink, scaled to 900.
    "A100": Speed(312e12, 0.50, 2.0e12, 230e9, "A100: 50 % of 312 TFLOP/s, assumed"),
    "H100": Speed(989e12, 0.40, 3.35e12, 345e9, "H100: 40 % of 989 TFLOP/s, after torchtitan's published 8B run"),
    "H200": Speed(989e12, 0.40, 4.8e12, 345e9, "H200: 40 % of 989 TFLOP/s, as for the H100"),
    "B200": Speed(2250e12, 0.40, 8.0e12, 690e9, "B200: 40 % of 2,250 TFLOP/s, as for the H100"),
    "H20": Speed(148e12, 0.60, 4.0e12, 345e9, "H20: 60 % of 148 TFLOP/s, assumed"),
    # without NVLink: half of PCIe's 32 (4.0) or 64 (5.0) GB/s, through the host
    "L40S": Speed(362e12, 0.40, 0.864e12, 16e9, "L40S: 40 % of 362 TFLOP/s, assumed"),
    "L40": Speed(181e12, 0.50, 0.864e12, 16e9, "L40: 50 % of 181 TFLOP/s, assumed"),
    "L4": Speed(121e12, 0.40, 0.300e12, 16e9, "L4: 40 % of 121 TFLOP/s, assumed"),
    "A10": Speed(125e12, 0.50, 0.600e12, 16e9, "A10: 50 % of 125 TFLOP/s, assumed"),
    "A10G": Speed(70e12, 0.50, 0.600e12, 16e9, "A10G: 50 % of 70 TFLOP/s, assumed"),
    "RTX3090": Speed(71e12, 0.50, 0.936e12, 16e9, "RTX3090: 50 % of 71 TFLOP/s, assumed"),
    "RTX4090": Speed(165e12, 0.50, 1.008e12, 16e9, "RTX4090: 50 % of 165 TFLOP/s, assumed"),
    "RTX5090": Speed(209e12, 0.50, 1.792e12, 32e9, "RTX5090: 50 % of 209 TFLOP/s, assumed"),
    # one thread of a shared AMD EPYC, SmolLM2-135M in bf16
    "CPU": Speed(0.1e12, 1.0, 10e9, 10e9, "CPU: 0.1 TFLOP/s per process, one EPYC core; --probe measures yours"),
}


def speed_of(kind: str) -> Speed:
    """The assumptions for a kind of device; ConfigError lists those there are."""
    if kind.upper() not in SPEED:
        raise ConfigError(f"--gpus: no speed is known for {kind!r}; one of {', '.join(SPEED)}, or none for {DEFAULT}")
    return SPEED[kind.upper()]


def forward_flops(model: Architecture, tokens: float, attended: float) -> tuple[float, float]:
    """(layers, head) of a forward pass over tokens whose causal attention sees half of `attended` on average.

    2 * tokens * weights; attention 2 * tokens * attended * query width per layer. The embedding is a look-up: no FLOP.
    """
    layers = 2 * tokens * model.layers * (model.layer + attended * model.query)
    return layers, 2 * tokens * model.embedding


def update_flops(setup: Setup) -> float:
    """All devices' FLOP of an update: forward, backward (2x; 1x where weights are frozen), layers once more under
    checkpointing, the reference's and the objective's own forward passes."""
    layers, head = forward_flops(setup.model, setup.update_tokens, setup.attended)
    backward = 1 if setup.adapter else 2
    total: float = (1 + backward) * (layers + head) + (layers if setup.checkpointing else 0)
    total += setup.extra_forwards * (layers + head)
    if setup.anchored:
        total += sum(forward_flops(setup.reference or setup.model, setup.update_tokens, setup.attended))
    return total


def update_seconds(setup: Setup, speed: Speed) -> dict[str, float]:
    """{what: seconds} of an update. A micro-batch takes the longer of arithmetic and FSDP's traffic, which overlap:
    two gathers of the weights in the compute dtype and one reduction of the gradients per device and micro-batch."""
    arithmetic = update_flops(setup) / (setup.devices * speed.flops)
    parts = {"arithmetic": arithmetic}
    if setup.shards > 1:
        per_node = setup.devices / setup.nodes
        link = speed.link if setup.nodes == 1 else min(speed.link, NODE_LINK * per_node)
        moved = 2 * setup.compute * setup.model.parameters + setup.reduce * setup.trained
        if setup.anchored and setup.reference:
            moved += setup.compute * setup.reference.parameters
        parts["waiting for the network"] = max(0.0, setup.micro_batches * moved / link - arithmetic)
    if setup.offload_policy:
        each = (2 * setup.stored["parameters"] + setup.stored["gradients"]) / setup.shards
        parts["host link"] = setup.micro_batches * each / HOST_LINK
        parts["Adam on the host"] = ADAM_TRAFFIC * setup.trained / setup.nodes / HOST_MEMORY
    else:
        parts["optimizer"] = ADAM_TRAFFIC * setup.trained / setup.shards / speed.memory
    if setup.rollout:
        parts["rollout"] = rollout_seconds(setup, setup.rollout, speed)
    return parts


def concurrent(setup: Setup, rollout: Rollout, cache: float) -> int:
    """Responses of full length that a replica's KV cache holds at once (at least one, or it does not fit at all)."""
    each = kv_bytes(setup.model, rollout.prompt + rollout.response, rollout.tensor_parallel)
    replicas = setup.devices / rollout.tensor_parallel
    return max(1, min(int(cache // each), -(-rollout.responses // int(replicas))))


def rollout_seconds(setup: Setup, rollout: Rollout, speed: Speed, cache: float = 30e9) -> float:
    """Upper bound of generation: every response as long as it may be. Each decoded token of a wave reads the replica's
    weights and caches once; waves follow one another where the cache is too small; prompts are a forward pass."""
    replicas = setup.devices / rollout.tensor_parallel
    at_once = concurrent(setup, rollout, cache)
    waves = -(-rollout.responses // (at_once * replicas))
    mean = rollout.prompt + rollout.response / 2
    read = 2 * setup.model.parameters / rollout.tensor_parallel
    read += at_once * kv_bytes(setup.model, mean, rollout.tensor_parallel)
    work = 2 * setup.model.parameters * at_once / rollout.tensor_parallel / speed.flops
    decode = waves * rollout.response * max(read / (speed.memory * DECODE_SHARE), work)
    prompts = sum(forward_flops(setup.model, rollout.responses * rollout.prompt, rollout.prompt))
    return decode + prompts / (setup.devices * speed.flops)
