"""What GRPO's engine hands to a rollout under LoRA, and which logits it forms."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


def test_merged_weights_stay_merged_after_the_merge_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollout may send its last part when the generator has ended, and with it the merge."""
    from eaft_verl.training import engine

    weight = torch.tensor([1.0, 2.0])

    @contextlib.contextmanager
    def merged(module: Any, backup_adapters: bool) -> Iterator[None]:
        weight.add_(0.25)
        yield
        weight.sub_(0.25)

    monkeypatch.setattr(engine, "merged_lora_context", merged)
    monkeypatch.setattr(engine, "convert_weight_keys", lambda weights, module: weights)
    module = SimpleNamespace(state_dict=lambda: {"base_model.model.q.base_layer.weight": weight})
    for precision, expected in (({"param_dtype": "fp32"}, torch.float32), (None, torch.bfloat16)):
        settings = SimpleNamespace(mixed_precision=precision)
        own: Any = SimpleNamespace(module=module, engine_config=settings, _is_offload_param=False)
        sent = dict(engine.SavingEngine._merged_lora_per_tensor_param(own))
        assert weight.tolist() == [1.0, 2.0]
        assert sent["q.weight"].tolist() == [1.25, 2.25] and sent["q.weight"].dtype == expected


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_head_sees_the_rows_of_the_responses_only(temperature: float) -> None:
    """Log-probabilities, entropy and every gradient are verl's own, whose logits are of the whole sequences."""
    import verl.utils.torch_functional as verl_F
    from tensordict import TensorDict
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from eaft_verl.training.engine import SavingEngine, response_rows

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, attn_implementation="eager", initializer_range=0.2, **sizes))
    prompts, responses = [[5, 6, 7, 8, 9], [10, 11, 12]], [[20, 21], [30, 31, 32, 33]]

    def nested(rows: list[list[int]]) -> torch.Tensor:
        return torch.nested.nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    whole = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    batch = TensorDict(
        {"input_ids": nested(whole), "position_ids": nested([list(range(len(row))) for row in whole])}
        | {"prompts": nested(prompts), "responses": nested(responses)},
        batch_size=[2],
    )
    for name, value in {"use_remove_padding": True, "calculate_entropy": True, "temperature": temperature}.items():
        tu.assign_non_tensor(batch, **{name: value})
    assert response_rows(batch).tolist() == [4, 5, 9, 10, 11, 12]  # one before each of [20, 21] and [30, 31, 32, 33]

    seen = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1]))
    found = {}
    for kind in (FSDPEngineWithLMHead, SavingEngine):
        engine: Any = object.__new__(kind)
        engine.__dict__.update(module=model, use_ulysses_sp=False, pad_to_length=None, _get_packed_pad_size=lambda _: 0)
        engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
        engine.compute_entropy_from_logits = verl_F.entropy_from_logits
        inputs, given = engine.prepare_model_inputs(batch)
        outputs = engine.prepare_model_outputs(model(**inputs, use_cache=False), given, batch, None)
        rows = {
            name: torch.cat([row[-1 - len(answer) : -1] for row, answer in zip(part.unbind(), responses, strict=True)])
            for name, part in outputs.items()
        }
        assert all(part.offsets().tolist() == [0, 7, 14] for part in outputs.values())
        model.zero_grad()
        (rows["log_probs"].square().sum() - rows["entropy"].sum()).backward()
        found[kind] = {**rows, **{name: weight.grad.clone() for name, weight in model.named_parameters()}}
    assert seen == [14, 6]
    theirs, ours = found.values()
    assert theirs.keys() == ours.keys() and {"log_probs", "entropy", "lm_head.weight"} <= ours.keys()
    assert theirs["log_probs"].abs().min() > 0 and theirs["lm_head.weight"].abs().max() > 0
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
