"""What rows begin with goes through a model once: the tree against its definition, whole models against row by row."""

import copy
import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from eaft_verl.attention import packed as packed_attention
from eaft_verl.attention.tree import MODELS, SHORTEST, each_once, tree_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
BEGIN = [7 + number % 31 for number in range(40)]
ROWS = [
    [*BEGIN[:30], 5, 6, 8],
    [50, 51, 52, 53],
    [*BEGIN[:30], 5, 6, 9, 10],
    [*BEGIN, *range(60, 80), 1],
    [*BEGIN, *range(60, 80), 2, 3],
    [*BEGIN[:30], 5, 6, 8],  # a row twice
    [*BEGIN[:20]],  # and one that others go on from
]

row = st.lists(st.integers(0, 1), min_size=1, max_size=24)
tails = st.lists(st.tuples(st.integers(0, 60), row), min_size=1, max_size=9)


@settings(max_examples=150)
@given(tails=tails, trunk=st.lists(st.integers(0, 1), min_size=60, max_size=60), shuffle=st.randoms())
def test_every_token_sees_what_is_before_it_in_its_row(
    tails: list[tuple[int, list[int]]], trunk: list[int], shuffle: Any
) -> None:
    rows = [trunk[:kept] + tail for kept, tail in tails]
    shuffle.shuffle(rows)
    tree = tree_of([np.array(one) for one in rows])
    tokens = [token for one in rows for token in one]
    assert [tokens[place] for place in tree.source_S.tolist()] == [
        tokens[(tree.place_T == place).nonzero()[0, 0]] for place in range(len(tree.source_S))
    ]
    mask_SS = packed_attention.mask_of(tree.pieces)[0, 0]
    assert len(mask_SS) == len(tree.source_S) <= len(tokens)
    assert sorted(set(tree.place_T.tolist())) == list(range(len(tree.source_S)))  # nothing is computed for nobody
    start = 0
    for one in rows:
        path = tree.place_T[start : start + len(one)].tolist()
        assert [tokens[tree.source_S[place]] for place in path] == one
        for position, place in enumerate(path):
            assert sorted(mask_SS[place].nonzero()[:, 0].tolist()) == sorted(path[: position + 1])
        start += len(one)
    used = {number for piece in tree.pieces for number in piece.before}
    assert all(sum(tree.pieces[number].sizes) >= SHORTEST for number in used)


def test_long_rows_that_are_the_same_cost_one() -> None:
    same = np.arange(3000)
    assert len(tree_of([same] * 5).source_S) == 3000
    assert len(tree_of([same, same[:2990], np.flip(same)]).source_S) == 6000
    assert len(tree_of([same[:15], same[:15]]).source_S) == 30  # too short to be worth a piece


def model_of(kind: str, **named: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **named, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def packed(rows: list[list[int]]) -> tuple[dict[str, Any], Tensor]:
    ids = torch.tensor([token for one in rows for token in one])[None]
    positions = torch.cat([torch.arange(len(one)) for one in rows])[None]
    offsets = torch.tensor([0, *np.cumsum([len(one) for one in rows])])
    return {"input_ids": ids, "attention_mask": None, "position_ids": positions}, offsets


def one_by_one(model: Any, rows: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """[T, V] of plain transformers, a row at a time, in float64 where the model has it, and all gradients."""
    exact = copy.deepcopy(model)
    if not any(
        "experts" in name for name, _ in model.named_parameters()
    ):  # torch multiplies experts in float32 at most
        exact = exact.double()
    exact.set_attn_implementation("eager")
    logits = torch.cat([exact(torch.tensor([one]), use_cache=False).logits[0] for one in rows])
    loss(logits).backward()
    return logits, {name: weight.grad for name, weight in exact.named_parameters() if weight.grad is not None}


def loss(logits_TV: Tensor) -> Tensor:
    return (logits_TV.log_softmax(-1) * torch.linspace(-1, 1, logits_TV.numel()).view_as(logits_TV)).sum()


def agree(model: Any, rows: list[list[int]] = ROWS, shared: bool = True, call: Any = None) -> None:
    packed_attention.register()
    inputs, offsets = packed(rows)
    found = each_once(model, inputs, offsets)
    assert (found["input_ids"].numel() < inputs["input_ids"].numel()) == shared and (found is not inputs) == shared
    if not shared:
        return
    truth, grads = one_by_one(model, rows)
    logits = (call or model)(**found, use_cache=False).logits[0]
    torch.testing.assert_close(logits.double(), truth.double(), rtol=1e-4, atol=1e-4)
    model.zero_grad()
    loss(logits).backward()
    ours = {name: weight.grad.double() for name, weight in model.named_parameters() if weight.grad is not None}
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        assert (ours[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-6, name


SHARING = {
    "llama": ("llama", {**GROUPED}),
    "llama tied": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**GROUPED}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 8}),
    "glm4": ("glm4", {**GROUPED, "head_dim": 8}),
    "phi3": ("phi3", {**GROUPED}),
    "smollm3": ("smollm3", {**GROUPED}),  # a layer without positions
    "granite": ("granite", {**GROUPED}),
    "gpt2 without dropout": (
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 128}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    ),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "mistral without window": ("mistral", {**GROUPED, "sliding_window": None}),
}
NOT = {
    "mistral": ("mistral", {**GROUPED, "sliding_window": 16}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {**GROUPED, "head_dim": 8, "sliding_window": 16}),
    "qwen2 with window": (
        "qwen2",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 128}),
    "attention dropout": ("llama", {**GROUPED, "attention_dropout": 0.1}),
    "falcon with alibi": ("falcon", {**SIZES, "alibi": True}),
    "bert": (
        "bert",
        {**SIZES, "intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "roberta": ("roberta", {**SIZES, "intermediate_size": 48, "is_decoder": True, "hidden_dropout_prob": 0.0}),
    "looks ahead": ("llama", {**GROUPED, "is_causal": False}),
    "residual dropout": ("starcoder2", {**GROUPED, "residual_dropout": 0.1}),
    "embedding dropout": ("starcoder2", {**GROUPED, "embedding_dropout": 0.1}),
    "router losses": (
        "mixtral",
        {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
    "jitter": ("mixtral", {**GROUPED, "num_local_experts": 3, "router_jitter_noise": 0.1}),
}


@pytest.mark.parametrize("name", SHARING)
def test_logits_and_gradients_are_those_of_row_by_row(name: str) -> None:
    kind, sizes = SHARING[name]
    agree(model_of(kind, **sizes).train())


MOE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
RATES = {"attention_dropout": 0.0, "residual_dropout": 0.0, "classifier_dropout": 0.0, "sliding_window": None}


@pytest.mark.parametrize("kind", sorted(MODELS - {"gpt2", "mixtral"}))
def test_every_model_that_shares_is_itself_row_by_row(kind: str) -> None:
    known = AutoConfig.for_model(kind)
    named = {name: value for name, value in (GROUPED | MOE | RATES | {"head_dim": 8}).items() if hasattr(known, name)}
    agree(model_of(kind, **named).train())


@pytest.mark.parametrize("name", NOT)
def test_models_that_look_elsewhere_are_left_alone(name: str) -> None:
    kind, sizes = NOT[name]
    agree(model_of(kind, **sizes).train(), shared=False)


def test_dropout_does_not_matter_where_nothing_is_trained() -> None:
    agree(model_of("llama", **GROUPED, attention_dropout=0.1).eval())


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_activations_computed_again_beside_another_model(reentrant: bool) -> None:
    """The reference looks at the same rows between forward and backward, with a mask of its own."""
    model, reference = model_of("llama", **GROUPED).train(), model_of("llama", **GROUPED).eval()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()

    def call(**inputs: Any) -> Any:
        made = model(**inputs)
        other, offsets = packed(ROWS[:3])
        with torch.no_grad():
            reference(**each_once(reference, other, offsets), use_cache=False)
        return SimpleNamespace(logits=made.logits)

    agree(model, call=call)


def test_an_adapter_is_trained_the_same() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of("llama", **GROUPED), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    packed_attention.register()
    inputs, offsets = packed(ROWS)
    found = each_once(model, inputs, offsets)
    assert found["input_ids"].numel() < inputs["input_ids"].numel()
    grads = []
    for each in (found, inputs):
        model.zero_grad()
        loss(model(**each, use_cache=False).logits[0]).backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    for name, grad in grads[1].items():
        assert (grads[0][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-6, name


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.ones(1, 9)},
        {"pixel_values": torch.ones(1)},
        {"position_ids": torch.zeros(3, 1, 9)},
    ],
    ids=["padded rows", "images", "positions of three kinds"],
)
def test_other_inputs_are_left_alone(change: dict[str, Any]) -> None:
    packed_attention.register()
    inputs, offsets = packed(ROWS)
    changed = inputs | change
    assert each_once(model_of("llama", **GROUPED), changed, offsets) is changed


def test_positions_that_are_not_the_rows_own_are_left_alone() -> None:
    packed_attention.register()
    inputs, offsets = packed(ROWS)
    inputs["position_ids"][0, offsets[2] + 3] += 1
    assert each_once(model_of("llama", **GROUPED), inputs, offsets) is inputs


def test_other_attention_or_a_padded_end_is_left_alone() -> None:
    packed_attention.register()
    model = model_of("llama", **GROUPED)
    inputs, offsets = packed(ROWS)
    assert each_once(model, inputs, offsets[:-1]) is inputs  # tokens behind the last row
    model.set_attn_implementation("eager")
    assert each_once(model, inputs, offsets) is inputs


def test_no_mask_outlives_its_batch() -> None:
    packed_attention.register()
    model = model_of("llama", **GROUPED)
    gc.collect()
    before = len(packed_attention._known)
    for _ in range(3):
        inputs, offsets = packed(ROWS)
        model(**each_once(model, inputs, offsets), use_cache=False).logits.sum().backward()
        model(**inputs, use_cache=False)  # and one that transformers makes
    del inputs
    gc.collect()
    assert len(packed_attention._known) <= before + 1
