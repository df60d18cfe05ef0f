"""The planner's formulas against hand computation, models built by transformers, and published figures."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_setups import QWEN_32B, paper_setup, peak_gib

from eaft_verl.planning.architectures import KNOWN, Architecture, from_config
from eaft_verl.planning.formulas import (
    GIB,
    Rollout,
    Setup,
    kv_bytes,
    rollout_phase,
    training_phases,
)
from eaft_verl.planning.speed import SPEED, forward_flops, update_flops, update_seconds
from eaft_verl.planning.storage import cache_bytes, checkpoint_bytes, export_bytes, host_bytes

LLAMA_8B = Architecture("llama", 128256, 4096, 14336, 32, 32, 8, 128, tied=False)
FUSED, LLAMA_FACTORY = "fused head, 2048 rows at a time", "LLaMA-Factory's EAFT"
# design study of this project: 32B, 16384 tokens per micro-batch, GiB of tensors by sequence parallel 1, 2, 4, 8
PUBLISHED = [
    (FUSED, {}, (86.0, 77.2, 72.9, 70.7)),
    (FUSED, {"optimizer": "AdamW8bit"}, (63.1, 54.4, 50.0, 47.8)),
    (FUSED, {"master": 2}, (55.5, 46.7, 42.3, 40.1)),
    (FUSED, {"offload_policy": True}, (25.0, 16.2, 11.8, 9.6)),
    (FUSED, {"devices": 16, "shards": 16}, (55.5, 46.7, 42.3, 40.1)),
    (FUSED, {"devices": 32, "shards": 32}, (40.2, 31.5, 27.1, 24.9)),
    (LLAMA_FACTORY, {}, (109.5, 88.9, 78.6, 73.4)),
    (LLAMA_FACTORY, {"optimizer": "AdamW8bit"}, (86.6, 66.0, 55.7, 50.5)),
]


def loss_of(kind: str, vocab: int, tokens: int) -> float:
    """Closed forms of the study: one chunk in the compute dtype; 6.66 times the bf16 logits."""
    return 2 * 2048 * vocab if kind == FUSED else 6.66 * 2 * tokens * vocab


@pytest.mark.parametrize(("kind", "changes", "rows"), PUBLISHED, ids=str)
def test_the_published_table_of_the_32b_model(kind: str, changes: dict, rows: tuple[float, ...]) -> None:
    for split, published in zip((1, 2, 4, 8), rows, strict=True):
        tokens = 16384 // split
        setup = paper_setup(tokens=tokens, sequence_parallel=split, **changes)
        planned = training_phases(setup, loss_of(kind, QWEN_32B.vocab, tokens))
        planned.pop("optimizer")  # the study left the optimizer's temporaries out
        largest = max(sum(parts.values()) for parts in planned.values()) / GIB
        assert largest == pytest.approx(published, rel=0.05, abs=0.6), (split, largest, published)


def test_the_published_peak_of_torchtitan() -> None:
    """Llama-3.1-8B, 8 H100, full recomputation, 32768 tokens, fp32 cross-entropy: 83.9 GiB."""
    setup = replace(paper_setup(), model=LLAMA_8B, tokens=32768, micro_batches=1)
    assert peak_gib(setup, loss_of(LLAMA_FACTORY, LLAMA_8B.vocab, 32768)) == pytest.approx(83.9, rel=0.10)


def test_torchtitans_speed_is_the_share_of_the_h100_that_was_read_from_it() -> None:
    """5,762 and 6,667 tokens/s per GPU at length 8192 are 30.0 % and 34.7 % with causal attention."""
    layers, head = forward_flops(LLAMA_8B, 1.0, 8192)
    for speed, share in ((5762, 0.300), (6667, 0.347)):
        assert 3 * (layers + head) * speed / SPEED["H100"].peak == pytest.approx(share, abs=0.002)


def test_a_step_of_the_paper_is_the_published_arithmetic() -> None:
    """64 sequences of 16384 tokens: 235 PFLOP, 312 with recomputation, 209-269 s on 8 A100."""
    setup = paper_setup()
    assert update_flops(replace(setup, checkpointing=False)) == pytest.approx(235e15, rel=0.01)
    assert update_flops(setup) == pytest.approx(312e15, rel=0.01)
    assert 209 < sum(update_seconds(setup, SPEED["A100"]).values()) < 269


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_parameter_counts_are_those_of_transformers(name: str) -> None:
    assert KNOWN[name].parameters == _built(KNOWN[name], bias=KNOWN[name].attention_bias)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "glm4"])
@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_parameter_counts_of_any_model_of_a_family(family: str, tied: bool, bias: bool) -> None:
    bias = (bias and family != "mistral") or family == "qwen2"  # mistral never has biases, qwen2 always
    model = Architecture(family, 384, 64, 96, 3, 4, 2, 24, tied, attention_bias=bias)
    assert model.parameters == _built(model, bias=bias)


def _built(model: Architecture, *, bias: bool) -> int:
    """Parameters of the model as transformers builds it without memory; its config read back must agree too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    numbers = {"vocab_size": model.vocab, "hidden_size": model.hidden, "intermediate_size": model.intermediate}
    numbers |= {"num_hidden_layers": model.layers, "num_attention_heads": model.heads, "head_dim": model.head_dim}
    numbers |= {"num_key_value_heads": model.kv_heads, "tie_word_embeddings": model.tied, "pad_token_id": None}
    config = AutoConfig.for_model(
        model.family, **numbers, **({} if model.family == "qwen2" else {"attention_bias": bias})
    )
    assert from_config(config.to_dict(), "x") == model
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def test_a_lora_adapter_is_counted_as_peft_counts_it() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    small = Architecture("llama", 384, 64, 96, 3, 4, 2, 16, tied=True)
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        with torch.device("meta"):
            lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
            model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
        assert small.adapter(4, targets) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_states_of_zero_by_hand() -> None:
    """16 bytes a parameter over eight devices; 8-bit Adam 10.03; a bf16 LoRA base 2 and 8 for the adapter."""
    states = ("parameters", "gradients", "optimizer")
    params = QWEN_32B.parameters
    phase = training_phases(paper_setup())["optimizer"]
    assert sum(phase[name] for name in states) == pytest.approx(16 * params / 8)
    assert phase["scratch"] == 4 * params / 8
    assert training_phases(paper_setup(one_pass=True))["optimizer"]["scratch"] == 0
    eight = training_phases(paper_setup(optimizer="AdamW8bit"))["optimizer"]
    assert sum(eight[name] for name in states) == pytest.approx(10.03125 * params / 8)
    adapter = QWEN_32B.adapter(32, "all-linear")
    lora = training_phases(paper_setup(adapter=adapter, master=2))["optimizer"]
    assert sum(lora[name] for name in states) == pytest.approx((2 * params + 8 * adapter) / 8)


def test_logits_by_hand() -> None:
    """bf16 logits and their gradient, and 10 bytes for each of 1024 rows; an anchor adds its gradient and logits."""
    whole = 2 * 16384 * 152064
    setup = paper_setup()
    assert training_phases(setup)["loss"]["logits"] == 2 * whole + 10 * 1024 * 152064
    assert training_phases(replace(setup, cache_k=64))["head"]["logits"] == 3 * whole
    anchored = training_phases(replace(setup, anchored=True, reference=QWEN_32B))["head"]
    assert anchored["logits"] == 4 * whole
    assert anchored["reference"] == 2 * QWEN_32B.parameters / 8


def test_a_fused_head_holds_one_chunk_and_its_gradients_by_hand() -> None:
    """bf16 on a GPU: 448 MiB at 2 bytes a logit are 1,536 rows of 152,064; dX of all tokens twice, dW once."""
    phases = training_phases(paper_setup(fused=True))
    rows, dx, dw = 1536, 2 * 16384 * 5120, 2 * 152064 * 5120
    assert phases["loss"]["logits"] == 2 * rows * 152064 + 2 * dx + dw
    assert phases["head"]["logits"] == 2 * dx  # the head's gradient is a unit of FSDP's by then
    frozen = training_phases(paper_setup(fused=True, adapter=QWEN_32B.adapter(32, "all-linear")))
    assert frozen["loss"]["logits"] == 2 * rows * 152064 + 2 * dx


QWEN_HALF_B = Architecture("qwen2", 151936, 896, 4864, 24, 14, 2, 64, tied=True, attention_bias=True)
BENCHMARK: dict[str, Any] = {  # tests/benchmarks/step_time.py on an H100, recipes/results/gpu_h100.json
    **{"model": QWEN_HALF_B, "devices": 1, "nodes": 1, "cuda": True, "shards": 1, "tokens": 8192, "fused": True},
    **{"update_tokens": 8192, "attended": 512, "micro_batches": 1, "checkpointing": False, "attention": "sdpa"},
    "one_pass": True,
}


@pytest.mark.parametrize(("one_unit", "measured"), [(False, 17.12), (True, 17.79)])
def test_the_measured_peaks_of_a_step_with_layers_and_as_one_unit(one_unit: bool, measured: float) -> None:
    assert QWEN_HALF_B.parameters == 494_032_768 and QWEN_HALF_B.embedding == 136_134_656
    setup = Setup(**BENCHMARK, one_unit=one_unit)
    phases = {name: sum(parts.values()) for name, parts in training_phases(setup).items()}
    assert max(phases, key=lambda name: phases[name]) == "loss"
    assert phases["loss"] / GIB == pytest.approx(measured, rel=0.01)


def test_one_unit_by_hand() -> None:
    """Layers and norm of 357,898,112 parameters in bf16 are 0.67 GiB, in every phase until their gradients are reduced:
    4 bytes each once more, 8 where there are gradients of an earlier micro-batch, and 2 beside a cast to bf16."""
    embedding, layers, layer = 136_134_656, 357_898_112, 14_912_384
    setup = Setup(**BENCHMARK, one_unit=True)
    extra = {name: parts.get("unsharded", 0.0) for name, parts in training_phases(setup).items()}
    assert extra["loss"] == 2 * embedding + 2 * layers
    assert extra["head"] == 4 * embedding + 2 * layers
    assert extra["last layer"] == 4 * embedding + 2 * layers + 2 * layer
    assert extra["first layer"] == 4 * embedding + 2 * layers + 2 * 24 * layer
    assert extra["root"] == 4 * (embedding + layers)
    assert training_phases(setup)["first layer"]["gradients"] == 0.0  # all of them are in bf16 yet
    again = training_phases(replace(setup, micro_batches=4))
    assert again["first layer"]["gradients"] == 4 * (embedding + layers)
    assert again["root"]["unsharded"] == 8 * (embedding + layers)
    assert training_phases(replace(setup, master=2))["root"]["unsharded"] == 8 * (embedding + layers)
    untied = replace(setup, model=replace(QWEN_HALF_B, tied=False))
    assert training_phases(untied)["root"]["unsharded"] == 4 * layers  # embedding and head are units of their own
    whole = training_phases(replace(setup, fused=False))
    assert whole["loss"]["unsharded"] == 2 * embedding  # the forward pass is over
    assert whole["head"]["unsharded"] == 4 * embedding + 2 * layers


def test_disk_and_cache_by_hand() -> None:
    setup, params = paper_setup(), QWEN_32B.parameters
    assert checkpoint_bytes(setup) == 12 * params
    assert export_bytes(QWEN_32B, 2) == 2 * params
    assert cache_bytes(1000, 64) == 1000 * (64 * 8 + 4)
    assert kv_bytes(QWEN_32B, 1, 1) == 262144  # 2 * 64 layers * 8 heads * 128 * 2 bytes


def test_the_host_holds_what_offloading_takes_from_the_devices() -> None:
    offloaded = host_bytes(paper_setup(offload_policy=True), 2)
    assert offloaded["offloaded"] == 16 * QWEN_32B.parameters  # 524 GB
    assert offloaded["loading or export"] == 4 * QWEN_32B.parameters
    tied = KNOWN["qwen3-4b-instruct-2507"]
    assert host_bytes(paper_setup(model=tied), 2)["loading or export"] == 8 * 4 * tied.parameters


def test_vllm_wakes_beside_what_training_left() -> None:
    rollout = Rollout(512, 1024, 4096, tensor_parallel=4, share=0.6, reference=False)
    setup, params = paper_setup(rollout=rollout), QWEN_32B.parameters
    awake = rollout_phase(setup, 80 * GIB)
    assert awake["parameters"] == 12 * params / 8  # gradients are gone
    assert awake["vLLM weights"] == 2 * params / 4
    assert awake["vLLM weights"] + awake["vLLM KV cache"] == pytest.approx((0.6 * 80 - 2.5) * GIB)
    assert rollout_phase(replace(setup, parked=12), 80 * GIB)["parameters"] == 0
    assert rollout_phase(replace(setup, offload_policy=True), 80 * GIB)["parameters"] == 0


MODELS = st.sampled_from(sorted({model.parameters: model for model in KNOWN.values()}.values(), key=str))
SETUPS = st.builds(
    Setup,
    model=MODELS,
    devices=st.just(8),
    nodes=st.just(1),
    cuda=st.booleans(),
    shards=st.just(8),
    tokens=st.integers(128, 40000),
    update_tokens=st.integers(40000, 10**7),
    attended=st.integers(64, 40000),
    micro_batches=st.integers(1, 16),
    packed=st.booleans(),
    checkpointing=st.booleans(),
    attention=st.sampled_from(["flash_attention_2", "sdpa", "eager"]),
    compute=st.sampled_from([2, 4]),
    master=st.sampled_from([2, 4]),
    optimizer=st.sampled_from(["AdamW", "AdamW8bit"]),
    reference=st.one_of(st.none(), MODELS),
    anchored=st.booleans(),
)


@settings(max_examples=200)
@given(setup=SETUPS, factor=st.integers(2, 8))
def test_more_devices_never_need_more_of_each(setup: Setup, factor: int) -> None:
    more = replace(setup, devices=8 * factor, shards=8 * factor)
    assert peak_gib(more) <= peak_gib(setup)
    assert update_seconds(more, SPEED["A100"])["arithmetic"] < update_seconds(setup, SPEED["A100"])["arithmetic"]


@settings(max_examples=200)
@given(setup=SETUPS, more=st.integers(1, 40000))
def test_memory_grows_with_tokens(setup: Setup, more: int) -> None:
    assert peak_gib(replace(setup, tokens=setup.tokens + more)) >= peak_gib(setup)


@settings(max_examples=200)
@given(setup=SETUPS, rank=st.sampled_from([1, 8, 64]))
def test_lora_needs_less_than_full_training(setup: Setup, rank: int) -> None:
    lora = replace(setup, adapter=setup.model.adapter(rank, "all-linear"))
    assert peak_gib(lora) < peak_gib(setup)
    assert checkpoint_bytes(lora) < checkpoint_bytes(setup)
    assert update_flops(lora) < update_flops(setup)


@settings(max_examples=200)
@given(setup=SETUPS)
def test_offloading_moves_bytes_from_devices_to_hosts(setup: Setup) -> None:
    setup = replace(setup, cuda=True)
    offloaded = replace(setup, offload_policy=True)
    assert peak_gib(offloaded) < peak_gib(setup)
    assert sum(host_bytes(offloaded, 2).values()) > sum(host_bytes(setup, 2).values())
    assert sum(update_seconds(offloaded, SPEED["A100"]).values()) > sum(update_seconds(setup, SPEED["A100"]).values())


@settings(max_examples=100)
@given(setup=SETUPS)
def test_recomputation_trades_time_for_memory(setup: Setup) -> None:
    kept, again = (replace(setup, checkpointing=flag) for flag in (False, True))
    assert peak_gib(again) <= peak_gib(kept)
    assert update_flops(again) > update_flops(kept)


def test_a_held_start_is_one_more_copy_of_the_weights() -> None:
    plain, held = (training_phases(paper_setup(held=held)) for held in (False, True))
    for name, parts in held.items():
        assert parts.pop("starting weights") == 4 * QWEN_32B.parameters / 8
        assert parts == plain[name]
    offloaded = paper_setup(held=True, offload_policy=True)
    assert training_phases(offloaded)["loss"]["starting weights"] == 0
    more = host_bytes(offloaded, 2)["offloaded"] - host_bytes(paper_setup(offload_policy=True), 2)["offloaded"]
    assert more == 4 * QWEN_32B.parameters
