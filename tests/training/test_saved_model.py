"""A model from a saved state in one process: the weights themselves, and base plus adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from eaft_verl.training.saved_model import export_saved
from eaft_verl.training.states import SHARDS

SETTINGS = {"lora_rank": 0, "lora_adapter_path": None, "model_dtype": "fp32"}
LORA = {**SETTINGS, "lora_rank": 4, "lora_alpha": 8, "target_modules": "all-linear"}
IDS = torch.arange(3, 13)[None]


def state(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Weights halved between two workers' files as DCP writes them: offsets in the header."""
    folder.mkdir()
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    offsets: list[dict[str, Any]] = [{}, {}]
    for name, value in weights.items():
        rows = 0
        for rank, half in enumerate(value.detach().chunk(2)):
            parts[rank][f"model.{name}"] = half.contiguous()
            offsets[rank][f"model.{name}"] = {"saved_offsets": [rows, *[0] * (value.dim() - 1)]}
            rows += half.shape[0]
    for rank in range(2):
        header = {"DCP_SHARDING_INFO": json.dumps(offsets[rank]), "DCP_VERSION": "1.0", "format": "pt"}
        save_file(parts[rank], folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", header)
    (folder / SHARDS).write_text("{}")
    return folder


def test_a_state_of_every_weight_is_the_model(tmp_path: Path, tiny_model_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    trained = {name: value.detach() * 1.25 for name, value in model.named_parameters()}
    export_saved(state(tmp_path / "state", trained), tmp_path / "out", str(tiny_model_path), SETTINGS, "float32")
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert found.keys() == trained.keys() and all(torch.equal(found[name], trained[name]) for name in trained)


def test_a_state_of_an_adapter_is_base_plus_adapter(tmp_path: Path, tiny_model_path: Path) -> None:
    torch.manual_seed(1)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in trained.values():
            value.normal_(std=0.1)
        expected = model(IDS).logits
    saved = state(tmp_path / "state", trained)
    export_saved(saved, tmp_path / "out", str(tiny_model_path), LORA, "float32")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    with torch.no_grad(), model.disable_adapter():
        assert (found - base(IDS).logits).abs().max() > 1e-2
    with pytest.raises(ValueError, match="the adapter saved is not the configured one"):
        export_saved(saved, tmp_path / "other", str(tiny_model_path), {**LORA, "target_modules": ["q_proj"]}, "float32")
