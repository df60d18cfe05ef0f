"""What GRPO's engine hands to a rollout under LoRA."""

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
