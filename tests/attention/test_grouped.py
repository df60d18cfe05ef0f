"""Attention by groups against transformers' own eager attention, for whatever model has the usual one."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from eaft_verl.attention import grouped as grouped_attention
from eaft_verl.attention.grouped import NAME, use_grouped

SIZES: dict[str, Any] = {
    **{"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2},
    **{"hidden_size": 48, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.4},
}
LINEAR: dict[str, Any] = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"layer_types": ["linear_attention", "full_attention"], "num_experts": 0, "mlp_only_layers": [0, 1]},
}
LATENT: dict[str, Any] = {
    **{"num_key_value_heads": 6, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
    **{"v_head_dim": 6, "head_dim": 4, "first_k_dense_replace": 2},
}
USUAL: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("llama", "qwen2", "qwen3", "gemma", "granite", "olmo2", "phi3", "smollm3", "starcoder2")},
    "mistral": {"sliding_window": 4},
    "glm4": {"partial_rotary_factor": 0.5},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_next": LINEAR,
    "deepseek_v3": LATENT,  # values of another size than keys
    "stablelm": {"num_key_value_heads": 6},  # every query head has keys of its own
}
OWN: dict[str, dict[str, Any]] = {
    **{"gemma2": {"attn_logit_softcapping": 0.5}, "gpt2": {}, "gpt_neox": {}},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23, 24]]


def model_of(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def inputs() -> dict[str, torch.Tensor]:
    """Padded on the left."""
    longest = max(map(len, ROWS))
    ids = [[0] * (longest - len(row)) + row for row in ROWS]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ROWS]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.inference_mode()
def said(model: Any) -> torch.Tensor:
    """Logits of the prompts' tokens that are no padding, and of the steps of an answer that is the same for all."""
    given = inputs()
    first = model(**given, use_cache=True)
    logits = [first.logits[given["attention_mask"].bool()]]
    mask, cache = given["attention_mask"], first.past_key_values
    for token in (31, 32, 33):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        step = model(torch.full((len(ROWS), 1), token), attention_mask=mask, past_key_values=cache, use_cache=True)
        logits.append(step.logits[:, -1])
    return torch.cat(logits)


@pytest.mark.parametrize("kind", USUAL)
def test_the_usual_attention_by_groups_says_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_of(kind, USUAL[kind]), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments[1].shape)
        return original(*arguments, **named)

    original = grouped_attention.grouped_attention
    monkeypatch.setattr(grouped_attention, "grouped_attention", counted)
    expected = said(model)
    assert not calls and use_grouped(model)
    found = said(model)
    assert calls and model.config._attn_implementation == NAME
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert expected.std() > 0.05  # a model that says the same of all words would pass


@pytest.mark.parametrize("kind", OWN)
def test_a_model_with_an_attention_of_its_own_keeps_it(kind: str) -> None:
    model = model_of(kind, OWN[kind])
    before = said(model)
    assert not use_grouped(model)
    assert model.config._attn_implementation == "eager" and said(model).equal(before)


@pytest.mark.parametrize("name", ["eager_attention_forward", "repeat_kv"])
def test_another_code_under_the_usual_names_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3 import modeling_qwen3

    original = getattr(modeling_qwen3, name)
    monkeypatch.setattr(modeling_qwen3, name, lambda *arguments, **named: original(*arguments, **named))
    assert not use_grouped(model_of("qwen3", {}))


def test_weights_and_gradients_are_those_of_the_usual_one() -> None:
    """Also where a mask differs from head to head."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    shapes = ((2, 6, 4, 8), (2, 2, 7, 8), (2, 2, 7, 5))
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for mask in (None, torch.randn(2, 1, 4, 7).double(), torch.randn(1, 6, 4, 7).double()):
        made = [
            attend(module, *parts, mask, scaling=0.3)
            for attend in (modeling_llama.eager_attention_forward, grouped_attention.grouped_attention)
        ]
        for expected, found in zip(*made, strict=True):
            torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(output.square().sum(), parts) for output, _ in made]
        torch.testing.assert_close(grads[1], grads[0])
