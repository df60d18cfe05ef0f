"""Formulas of `eaft plan`: bytes on a device in every phase of an update. Pure. Hosts and disks: storage.py.

Letters: P parameters, E = vocabulary * width, L layers, N tokens of the longest micro-batch on one device, V
vocabulary, d width, f inner width, h query width, k key width, n devices a parameter is sharded over, c bytes of the
compute dtype.

Sources. [Z] ZeRO, arXiv 1910.02054, Sec. 3: 16 bytes per parameter with fp32 weights, gradients and Adam. [K]
Korthikanti et al., arXiv 2205.05198: what a layer keeps for backward, and what recomputing it costs. [F] torch FSDP2:
two layers gathered, gradient and reduce-scatter input of one; the root and an untied embedding and head are units of
their own, as verl 0.9.1 wraps them (utils/fsdp_utils.py); a small model's layers are in the root (planning/units.py).
[C] this package: tokens/. [V] verl 0.9.1, workers/engine. Compared with published memory (torchtitan: Llama-3.1-8B,
83.9 GiB) in tests/test_plan.py, with measured peaks by `eaft plan --probe`.
"""

from dataclasses import dataclass

from eaft_verl.planning.architectures import Architecture
from eaft_verl.tokens.chunks import CHUNK_TOKENS, bytes_per_logit, head_chunk

GIB = 1 << 30
CONTEXT = {True: 2.5 * GIB, False: 0.0}  # CUDA context, cuBLAS workspaces, NCCL buffers: 2 to 3 GiB; none on a CPU
FRAGMENTATION = 0.05  # of the tensors, on a GPU: blocks that are free and too small
PROCESS = 0.7 * GIB  # host memory of a worker before its model: verl, Ray and torch imported, measured 0.57-0.64 GiB
ADAM_8BIT = 2 + 2 * 4 / 256  # two one-byte moments and two fp32 scales per block of 256 (torchao, bitsandbytes)
OPTIMIZERS = {"AdamW": None, "Adam": None, "_AdamW": None, "AdamW8bit": ADAM_8BIT, "Adam8bit": ADAM_8BIT}


@dataclass(frozen=True)
class Rollout:
    """How a GRPO arm generates: vLLM on the training devices, asleep while the model is updated."""

    responses: int  # per update
    prompt: int  # longest, tokens
    response: int  # longest, tokens
    tensor_parallel: int
    share: float  # of a device's memory that vLLM claims when it wakes
    reference: bool  # a frozen policy is asked for log-probabilities
    frees_cache: bool = True  # sleeps between rollouts


@dataclass(frozen=True)
class Setup:
    """All that the formulas ask of an arm. Tokens are of one device; `update_tokens` of all."""

    model: Architecture
    devices: int
    nodes: int
    cuda: bool
    shards: int
    tokens: int  # N
    update_tokens: float  # mean, all sequences of an optimizer step
    attended: float  # mean number of tokens in the sequence of a token: sum(len^2) / sum(len)
    micro_batches: int  # per device and update
    sequence_parallel: int = 1
    packed: bool = True  # several sequences in a micro-batch
    checkpointing: bool = True
    attention: str = "flash_attention_2"
    compute: int = 2  # c
    master: int = 4  # bytes of a stored weight and its gradient
    reduce: int = 4  # bytes in which gradients are reduced
    optimizer: str = "AdamW"
    one_pass: bool = False  # torch's fused AdamW
    adapter: int = 0  # parameters of a LoRA adapter; 0: every weight is trained
    offload_policy: bool = False
    parked: int = 0  # bytes per parameter that verl moves to the host between training and rollout
    fused: bool = False  # the loss is formed in the head, without whole logits
    unsynced: bool = False  # whole gradients kept over micro-batches
    one_unit: bool = False  # the layers are gathered and reduced together
    reference: Architecture | None = None  # a second engine
    anchored: bool = False  # full reference logits in every step
    held: bool = False  # an l2 anchor keeps the starting weights
    cache_k: int = 0  # candidates of a reference cache on disk
    extra_forwards: float = 0.0  # passes over the batch beside the trained one, per update
    rollout: Rollout | None = None

    @property
    def trained(self) -> int:
        """Parameters with gradient and optimizer state."""
        return self.adapter or self.model.parameters

    @property
    def reference_on_host(self) -> bool:
        """verl keeps a GRPO reference on the hosts, and a second engine shares the first one's offload policy. [V]"""
        return self.cuda and (self.offload_policy or self.rollout is not None)

    @property
    def moments(self) -> float:
        """Optimizer bytes per trained parameter: AdamW keeps two in the dtype of the weight."""
        return OPTIMIZERS[self.optimizer] or 2 * self.master

    @property
    def stored(self) -> dict[str, float]:
        """Bytes of all shards together. [Z]"""
        weights = self.master * (self.model.parameters + self.adapter)
        return {
            "parameters": weights,
            "gradients": self.master * self.trained,
            "optimizer": self.moments * self.trained,
            **({"starting weights": weights} if self.held else {}),
        }


def layer_activations(setup: Setup) -> float:
    """Bytes that one layer keeps for backward when nothing is recomputed. [K], by operation of transformers' layers.

    A norm keeps its fp32 input, its output and (trained weight) what the weight multiplies; projections their inputs;
    attention query, key, value, output; the MLP both halves, the activation and the product.
    """
    d, f, h, k, c = *(setup.model.hidden, setup.model.intermediate), setup.model.query, setup.model.key, setup.compute
    norms = 4 if setup.model.family == "glm4" else 2
    per_token = norms * d * (4 + (c if setup.adapter else 2 * c)) + c * 4 * f
    square = 0.0
    if setup.attention == "sdpa" and not setup.cuda:  # in fp32 and row by row (attention/packed.py)
        per_token += 4 * (2 * h + 2 * k) + (c * h if c < 4 else 0)
    elif setup.attention == "flash_attention_2" or (setup.attention == "sdpa" and (not setup.packed or c < 4)):
        per_token += c * (2 * h + 2 * k)
    elif setup.attention == "sdpa":  # in fp32 several sequences need a mask, for which keys and values are repeated
        per_token += c * 4 * h
        square = c
    else:
        per_token += c * 5 * h
        square = setup.model.heads * (2 * c + 4)  # scores are recomputed by nobody: softmax in fp32, its cast, dropout
    if setup.model.family == "qwen3":
        per_token += (h + k) * (4 + c)
    return setup.tokens * per_token + square * setup.tokens**2


def working_layer(setup: Setup) -> float:
    """Bytes that the backward of one layer adds: gradients of the MLP's three products, less the one that is freed, and
    under checkpointing what the layer keeps, computed again."""
    products = 2 * setup.compute * setup.tokens * setup.model.intermediate
    return products + (layer_activations(setup) if setup.checkpointing else 0.0)


def saved_activations(setup: Setup) -> float:
    """Bytes alive when the loss is computed: inputs of all layers, or everything they keep; the mask of sdpa."""
    mask = setup.tokens**2 if setup.attention == "sdpa" and setup.packed else 0
    final = setup.tokens * setup.model.hidden * (4 + 2 * setup.compute)
    if setup.checkpointing:
        return mask + final + setup.model.layers * setup.tokens * setup.model.hidden * setup.compute
    return mask + final + setup.model.layers * layer_activations(setup)


def logits_bytes(setup: Setup) -> float:
    """Bytes of whole logits and their gradient; an anchor adds a gradient, a full one the reference's logits too. [C]

    GRPO: log-probabilities and entropy by verl's own eager functions, whose graph keeps three tensors. [V]
    Fused: instead of them the gradient of the hidden states, and the trained ones (here: all) by themselves.
    """
    if setup.fused:
        return 2 * setup.compute * setup.tokens * setup.model.hidden
    count = 3 if setup.rollout else 2 + (setup.cache_k > 0) + 2 * setup.anchored
    return count * setup.compute * setup.tokens * setup.model.vocab


def chunk_bytes(setup: Setup) -> float:
    """Bytes of one chunk of rows while the loss is formed: the rows, their fp32 copy, the difference. [C]

    A full anchor comes after it and holds three fp32 tensors: both log-probabilities and the reference's distribution.
    Fused: a smaller chunk, on a GPU worked on in place (where its kernels do not run, 0.8 GiB more); the gradient of
    the head, where it is trained, is there by then.
    """
    if setup.rollout:
        return 0.0
    if setup.fused:
        each = setup.compute if setup.cuda else bytes_per_logit(setup.compute)
        rows = min(setup.tokens, head_chunk(setup.model.vocab, setup.compute, "cpu", in_place=setup.cuda))
        head = 0 if setup.adapter else setup.compute * setup.model.embedding
        return each * setup.model.vocab * rows + head
    per_entry = 12 if setup.anchored else 8 if setup.compute == 4 else 10
    return per_entry * setup.model.vocab * min(setup.tokens, CHUNK_TOKENS)


def gathered_head(setup: Setup) -> float:
    """Bytes of unsharded embedding and head: units of their own, or the root's one matrix where they are tied. [F]"""
    gathered = setup.model.embedding * (1 if setup.model.tied else 2)
    if setup.reference and setup.anchored:
        gathered += setup.reference.embedding * (1 if setup.reference.tied else 2)
    return setup.compute * gathered


def head_units(setup: Setup) -> float:
    """`gathered_head`, the head's gradient and its reduction while its backward runs; all layers as one unit. [F]"""
    if setup.adapter:
        return gathered_head(setup)
    late = setup.model.tied  # a tied matrix is reduced at the very end, with the embedding's part of its gradient
    head = setup.model.embedding * (setup.compute + (0 if late else setup.reduce))
    return gathered_head(setup) + head + gathered_layers(setup)


def gathered_layers(setup: Setup) -> float:
    """c (P - E), untied c (P - 2 E): unsharded weights of all layers where they are one unit, else 0. [F]

    Made by the forward pass, which the fused head is a part of, freed at its end, and made again for all of backward.
    """
    return setup.one_unit * setup.compute * (setup.model.parameters - setup.model.embedding * (2 - setup.model.tied))


def layer_units(setup: Setup, done: int) -> float:
    """Bytes of unsharded weights while a layer's backward runs: two layers, gradient and reduction of one. [F]

    One unit: all layers, and the gradients of the `done` last ones, which wait for the others.
    """
    resident = setup.compute * setup.model.embedding * (1 if setup.model.tied else 2)
    late = setup.compute * setup.model.embedding if setup.model.tied else 0
    if setup.one_unit:
        return resident + late + gathered_layers(setup) + setup.compute * done * setup.model.layer
    layer = 2 * setup.compute * setup.model.layer
    if setup.adapter:
        return resident + layer
    return resident + late + layer + setup.model.layer * (setup.compute + setup.reduce)


def root_units(setup: Setup) -> float:
    """Bytes at the end of backward: the root's weights, gradient and reduction. [F]

    One unit of R parameters: the input of the reduction and its output, r R each, in the place of the weights and
    gradients, c R each. The output of an update's only micro-batch is the sharded gradient, counted as such; an output
    in another dtype than the weights' is cast, and there beside what it is cast to.
    """
    if setup.one_unit:
        root = setup.model.parameters - (0 if setup.model.tied else 2 * setup.model.embedding)
        cast = setup.master if setup.reduce != setup.master else 0
        counted = setup.master if setup.micro_batches == 1 else 0
        return root * (2 * setup.reduce + cast - counted)
    if not setup.model.tied or setup.adapter:
        return 0.0
    return setup.model.embedding * (2 * setup.compute + setup.reduce)


def update_scratch(setup: Setup) -> float:
    """Temporaries of the optimizer: on a GPU AdamW's root of every second moment (foreach), none of a fused one; else
    of one matrix's."""
    largest = setup.model.embedding if not setup.adapter else setup.adapter / setup.model.layers
    if setup.optimizer.endswith("8bit"):
        return 3 * 4 * largest / setup.shards
    if setup.cuda and not setup.offload_policy:
        return 0.0 if setup.one_pass else setup.master * setup.trained / setup.shards
    return 2 * setup.master * largest / setup.shards


def training_phases(setup: Setup, loss: float | None = None) -> dict[str, dict[str, float]]:
    """{phase: {part: bytes on a device}} of an update, backward from the last layer to the first.

    loss: bytes of a loss other than this package's.
    """
    here = {name: 0.0 if setup.offload_policy else size / setup.shards for name, size in setup.stored.items()}
    if setup.reference and not setup.reference_on_host:
        here["reference"] = setup.reference.parameters * setup.compute / setup.shards
    if setup.unsynced:
        here["unsynced gradients"] = setup.trained * setup.reduce
    saved = saved_activations(setup)
    working = working_layer(setup)
    first = working if setup.checkpointing else working + layer_activations(setup)
    # the first backward of an update starts without gradients; they grow as activations go
    before = here if setup.micro_batches > 1 else {**here, "gradients": 0.0}
    whole, chunk = (logits_bytes(setup), chunk_bytes(setup)) if loss is None else (loss, 0.0)
    forward = gathered_head(setup) + (gathered_layers(setup) if setup.fused else 0.0)
    reduced = before if setup.one_unit else here
    return {
        "loss": {**before, "activations": saved, "logits": whole + chunk, "unsharded": forward},
        "head": {**before, "activations": saved, "logits": whole, "unsharded": head_units(setup)},
        "last layer": {**before, "activations": saved + working, "unsharded": layer_units(setup, 1)},
        "first layer": {**reduced, "activations": first, "unsharded": layer_units(setup, setup.model.layers)},
        "root": {**here, "unsharded": root_units(setup)},
        "optimizer": {**here, "scratch": update_scratch(setup)},
    }


def kv_bytes(model: Architecture, tokens: float, tensor_parallel: int) -> float:
    """Key-value cache on a device, bf16: 2 * L * k * 2 bytes per token."""
    return 4 * model.layers * model.key * tokens / tensor_parallel


def rollout_phase(setup: Setup, capacity: float) -> dict[str, float]:
    """Parts while vLLM is awake: what training left on the device, then the share that vLLM claims. [V]

    verl's `param_offload` and `optimizer_offload` park the training state on the host; gradients are freed.
    """
    assert setup.rollout is not None
    kept = 0.0 if setup.offload_policy else setup.stored["parameters"] + setup.stored["optimizer"]
    kept = max(0.0, kept - setup.parked * setup.model.parameters)
    weights = 2 * setup.model.parameters / setup.rollout.tensor_parallel
    claimed = setup.rollout.share * capacity
    return {
        "parameters": kept / setup.shards,
        "vLLM weights": weights,
        "vLLM KV cache": max(claimed - weights - CONTEXT[True], 0.0),
    }
