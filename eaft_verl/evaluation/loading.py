"""A checkpoint as a model of transformers, ready to evaluate."""

import gc
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eaft_verl.attention.grouped import use_grouped
from eaft_verl.evaluation.model_files import check_checksums, require_all
from eaft_verl.evaluation.quiet import quiet
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.models import hub_arguments, told

SMALL = 10**9  # weights of a model that is evaluated in float32 on any device


def load_model(path: Path | str, settings: EvaluateSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready to evaluate, and its tokenizer (left padding).

    float32 on the CPU and for small models; else bfloat16 with a float32 head: in bfloat16 logits the likeliest two
    words are often exactly equal, and batch size and kernel then choose the answer. Eager attention on the CPU, by
    groups of heads where the model's is the usual one, the model's default elsewhere. One GPU if there is one, spread
    over all if there are several; `backend_args` of hf override.
    """
    check_checksums(Path(path))
    given = settings.backend_args if settings.backend == "hf" else {}
    device = str(given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    exact = device == "cpu" or _parameters(path) <= SMALL
    options: dict[str, Any] = {"dtype": given.get("dtype", "float32" if exact else "bfloat16")}
    asked = given.get("attn_implementation")
    if attention := asked or ("eager" if device == "cpu" else None):
        options["attn_implementation"] = attention
    if device == "cuda" and torch.cuda.device_count() > 1:
        options["device_map"] = "auto"
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(**hub_arguments(path), **options, output_loading_info=True)
        model: PreTrainedModel = loaded[0]
        tokenizer = AutoTokenizer.from_pretrained(**hub_arguments(path), padding_side="left")
    require_all(path, loaded[1])  # of a hub id that was not at hand when the evaluation began
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = _greedy(model, tokenizer)
    _leave_out_router_losses(model)
    _widen_head(model)
    if device == "cpu" and not asked:
        use_grouped(model)
    if "device_map" not in options:
        cast(torch.nn.Module, model).to(device)
    return model.eval(), tokenizer


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """End tokens and nothing else: a shipped repetition penalty would apply to the base and not to its checkpoints."""
    shipped = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(shipped if isinstance(shipped, list) else [shipped])} - {None}
    return GenerationConfig(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id)


def _parameters(path: Path | str) -> int:
    """Number of weights, from the configuration alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**hub_arguments(path))).num_parameters()


def _widen_head(model: PreTrainedModel) -> None:
    """Logits in float32 from the last hidden state on; a head tied to the embedding gets a copy of its own."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.weight.dtype == torch.float32:
        return
    model.config.get_text_config().tie_word_embeddings = False  # the harness ties the weights of what it is given
    head.weight = torch.nn.Parameter(head.weight.float(), requires_grad=False)
    if head.bias is not None:
        head.bias = torch.nn.Parameter(head.bias.float(), requires_grad=False)
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def _leave_out_router_losses(model: PreTrainedModel) -> None:
    """Nobody asks for them here, and they fail beside a cache."""
    text = model.config.get_text_config()
    if told(text, "output_router_logits"):
        text.output_router_logits = False


def release() -> None:
    """Give memory back after the last reference to a model is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
