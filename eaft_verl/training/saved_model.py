"""A Hugging Face folder from a saved state, in one process: no Ray, no worker, memory for the model twice."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from eaft_verl.training.dcp import read_model
from eaft_verl.training.export import export_weights


def export_saved(
    state: Path, target: Path, base_model: str, settings: Mapping[str, Any], dtype: str, ends: Sequence[str] = ()
) -> None:
    """Write the model of the state's shards to `target`, an adapter merged, as a worker's export would.

    settings: `verl.model` of the run, and `model_dtype` of its engine; dtype, ends: see `export_weights`.
    """
    weights = read_model(state)
    if settings["lora_rank"]:
        weights = _merged(weights, base_model, settings)
    export_weights(weights.items(), target, base_model, dtype, write=True, ends=ends)


def _merged(adapter: Mapping[str, Tensor], base_model: str, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Base plus adapter, in the dtype that training kept its weights in."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM
    from verl.utils.torch_dtypes import PrecisionType

    dtype = PrecisionType.to_dtype(settings["model_dtype"])
    base: Any = AutoModelForCausalLM.from_pretrained(base_model, dtype=dtype)
    if settings["lora_adapter_path"]:
        model: Any = PeftModel.from_pretrained(base, settings["lora_adapter_path"])
    else:
        names = ("target_modules", "target_parameters", "exclude_modules")
        chosen: dict[str, Any] = {name: settings.get(name) for name in names}
        config: Any = LoraConfig(r=settings["lora_rank"], lora_alpha=settings["lora_alpha"], bias="none", **chosen)
        model = get_peft_model(base, config)
    found = model.load_state_dict(dict(adapter), strict=False)
    own = {name for name in model.state_dict() if "lora_" in name}
    if found.unexpected_keys or own - adapter.keys():
        raise ValueError(
            f"the adapter saved is not the configured one: {found.unexpected_keys or own - adapter.keys()}"
        )
    return dict(model.merge_and_unload().state_dict())
