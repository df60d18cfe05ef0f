"""What verl's engine and the model in it can be asked for, looked at without torch."""

from eaft_verl.errors import ConfigError, require
from eaft_verl.recipe.checks_values import choice
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.views import layers_wrapped

PRECISIONS = ("fp32", "bf16", "fp16", "float32", "bfloat16", "float16")
OFFLOADS = ("param_offload", "optimizer_offload", "offload_policy")


def check_engine(config: Config) -> None:
    """Raise ConfigError for a strategy, head, precision, wrapping or attention that would not train as asked."""
    model, engine = config.verl.model, config.verl.engine
    require(
        engine.strategy == "fsdp2",
        f"verl.engine.strategy={engine.strategy!r}: only fsdp2 is supported (fsdp cannot run on CPU, "
        "the others have no logits hook for the objectives)",
    )
    require(
        not model.use_fused_kernels,
        "verl.model.use_fused_kernels=true hides the logits: the objective would silently be ignored; set it to false",
    )
    require(
        not engine.pad_to_length,
        "verl.engine.pad_to_length=true moves tokens under the objective; verl refuses it at run time; set it to false",
    )
    require(
        not engine.forward_only and not engine.qat.enable and not model.mtp.enable,
        "verl.engine.forward_only, engine.qat and model.mtp do not train with these objectives; set them to false",
    )
    require(model.lora_rank >= 0, f"verl.model.lora_rank={model.lora_rank} must be 0 (train every weight) or more")
    require(
        model.lora_adapter_path is None or model.lora_rank > 0,
        f"verl.model.lora_adapter_path={model.lora_adapter_path!r} is read only where verl.model.lora_rank is that of "
        "the adapter; with lora_rank=0 the bare base model would be trained",
    )
    for key, dtype in (engine.mixed_precision or {}).items():
        choice(f"verl.engine.mixed_precision.{key}", dtype, PRECISIONS)
    _check_wrapping(config)
    _check_attention(config)


def _check_wrapping(config: Config) -> None:
    disabled = config.verl.engine.wrap_policy["disable"]
    require(
        disabled is None or isinstance(disabled, bool),
        f"verl.engine.wrap_policy.disable={disabled!r} must be true (the model is one FSDP unit), false "
        "(each layer is one) or null (as `eaft plan` says)",
    )
    if disabled and (reason := layers_wrapped(config)):
        raise ConfigError(f"verl.engine.wrap_policy.disable=true makes the model one FSDP unit, which {reason}")


def _check_attention(config: Config) -> None:
    """What sequence parallelism needs, and what a CPU does not have."""
    model, engine = config.verl.model, config.verl.engine
    attention = (model.override_config or {}).get("attn_implementation", "flash_attention_2")
    if engine.ulysses_sequence_parallel_size > 1:
        require(
            attention == "flash_attention_2" and model.use_remove_padding,
            f"verl.engine.ulysses_sequence_parallel_size={engine.ulysses_sequence_parallel_size} with attention "
            f"{attention!r} trains on wrong logits without a word; it needs flash_attention_2 and use_remove_padding",
        )
    if config.device == "cpu":
        chosen = (engine.param_offload, engine.optimizer_offload, engine.offload_policy)
        bad = [name for name, on in zip(OFFLOADS, chosen, strict=True) if on] or [""]
        require(not bad[0], f"verl.engine.{bad[0]}=true has nothing to offload to on device=cpu")
        require(
            attention != "flash_attention_2" and not model.use_liger,
            "flash_attention_2 and liger need a GPU; on device=cpu use attn_implementation sdpa or eager",
        )
