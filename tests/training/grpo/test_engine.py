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


@pytest.mark.parametrize("shared", [0, 20])  # tokens that all prompts begin with
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_head_sees_the_rows_of_the_responses_only(temperature: float, shared: int) -> None:
    """Log-probabilities, entropy and every gradient are verl's own, whose logits are of the whole sequences, also
    where a CPU takes what the prompts share once."""
    import verl.utils.torch_functional as verl_F
    from tensordict import TensorDict
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from eaft_verl.attention import packed as packed_attention
    from eaft_verl.training.engine import SavingEngine, response_rows
    from eaft_verl.training.verl_cpu.engine import CpuEngine

    packed_attention.register()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, attn_implementation="sdpa", initializer_range=0.2, **sizes))
    begin = list(range(40, 40 + shared))
    prompts = [[*begin, 5, 6, 7, 8, 9], [*begin, 10, 11, 12], [*begin, 5, 6, 7, 8, 9]]
    responses = [[20, 21], [30, 31, 32, 33], [20, 34]]

    def nested(rows: list[list[int]]) -> torch.Tensor:
        return torch.nested.nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    whole = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    batch = TensorDict(
        {"input_ids": nested(whole), "position_ids": nested([list(range(len(row))) for row in whole])}
        | {"prompts": nested(prompts), "responses": nested(responses)},
        batch_size=[3],
    )
    for name, value in {"use_remove_padding": True, "calculate_entropy": True, "temperature": temperature}.items():
        tu.assign_non_tensor(batch, **{name: value})
    places = [*(4, 5), *(shared + place for place in (9, 10, 11, 12)), *(2 * shared + place for place in (18, 19))]
    assert response_rows(batch).tolist() == [shared + place for place in places]  # one before each of the answers'

    seen = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1]))
    found, tokens = {}, []
    for kind in (FSDPEngineWithLMHead, SavingEngine, CpuEngine):
        engine: Any = object.__new__(kind)
        engine.__dict__.update(module=model, use_ulysses_sp=False, pad_to_length=None, _get_packed_pad_size=lambda _: 0)
        engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
        engine.compute_entropy_from_logits = verl_F.entropy_from_logits
        inputs, given = engine.prepare_model_inputs(batch)
        tokens.append(inputs["input_ids"].numel())
        outputs = engine.prepare_model_outputs(model(**inputs, use_cache=False), given, batch, None)
        rows = {
            name: torch.cat([row[-1 - len(answer) : -1] for row, answer in zip(part.unbind(), responses, strict=True)])
            for name, part in outputs.items()
        }
        assert all(part.offsets().diff().tolist() == [shared + 7] * 3 for part in outputs.values())
        model.zero_grad()
        (rows["log_probs"].square().sum() - rows["entropy"].sum()).backward()
        found[kind] = {**rows, **{name: weight.grad.clone() for name, weight in model.named_parameters()}}
    whole_rows = 3 * (shared + 7)
    assert seen == [whole_rows, 8, 8]
    assert tokens == [whole_rows, whole_rows, whole_rows - 2 * shared]  # six more in common are too few for a piece
    theirs, *others = found.values()
    assert {"log_probs", "entropy", "lm_head.weight"} <= theirs.keys()
    assert theirs["log_probs"].abs().min() > 0 and theirs["lm_head.weight"].abs().max() > 0
    for ours in others:
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            assert (ours[name] - value).norm() <= 1e-5 * value.norm() + 1e-6, name
