"""A trained model as a Hugging Face folder: safetensors, config, generation config, tokenizer."""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_weights(
    weights: Iterable[tuple[str, Tensor]],
    folder: Path,
    base_model: str,
    dtype: str,
    *,
    write: bool,
    ends: Sequence[str] = (),
) -> None:
    """Gather every weight and, on the writing rank, save them beside the base model's config and tokenizer.

    All ranks must walk the iterator: each weight is all-gathered as it is reached. The folder appears under its name
    only when it is complete. ends: tokens that ended the trained turns, which generation has to stop at.
    """
    config = AutoConfig.from_pretrained(base_model)
    state = {}
    for name, weight in weights:
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if write and not tied:  # a tied head is the embedding; saving it twice doubles a small model's file
            state[name] = weight.detach().to("cpu", DTYPES[dtype]).contiguous()
    if not write:
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_torch_state_dict(state, partial, metadata={"format": "pt"})
    config.dtype = dtype
    config.save_pretrained(partial)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.save_pretrained(partial)
    stops: Any = tokenizer.convert_tokens_to_ids(list(ends))
    generation_config(base_model, stops).save_pretrained(partial)
    os.replace(partial, folder)


def generation_config(base_model: str, ends: Sequence[int]) -> GenerationConfig:
    """The base model's, which stops at the trained ends of turn too.

    A base model stops at the end of a document: told to go on where its training taught it to stop, it would write the
    user's next turn itself.
    """
    try:
        config = GenerationConfig.from_pretrained(base_model)
    except OSError:  # many base models carry none
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base_model))
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = [token for token in dict.fromkeys([*known, *ends]) if token is not None]
    if set(stops) != set(known):
        config.eos_token_id = stops
    return config


def export_dtype(base_model: str) -> str:
    """The base model's own dtype: what it is served in."""
    dtype = str(AutoConfig.from_pretrained(base_model).dtype or "bfloat16").removeprefix("torch.")
    return dtype if dtype in DTYPES else "bfloat16"
