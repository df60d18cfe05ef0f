"""What all rows of a batch begin with, a system turn or worked examples, goes through the model once.

A third to two thirds of the tokens of short questions are such a beginning. Its keys and values depend on nothing that
comes after it, so every score is what it was, but for the rounding that any other batch would bring too.

Dimension letters: B rows of a batch, T tokens of the longest.
"""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

SMALLEST = 16  # tokens: for fewer, a forward pass of their own costs more than it saves


def common_beginning(rows: Sequence[list[int]], limit: int) -> int:
    """Tokens, `limit` at most, that all rows begin with; 0 where it is not worth while."""
    if len(rows) < 2:
        return 0
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    shared = min(limit, sum(1 for _ in alike))
    return shared if shared >= SMALLEST else 0


def beginning(model: PreTrainedModel, tokens: Sequence[int], rows: int) -> DynamicCache | None:
    """Keys and values of the tokens for so many rows; None for a model whose memory is another than all of them.

    A window that slides, a state that is carried on, or positions that are counted from the keys' places would not be
    right with padding between the beginning and the rest.
    """
    if not {"position_ids", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys():
        return None
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    ids = torch.tensor([list(tokens)], device=model.device)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(rows)
    return cache


@torch.inference_mode()
def prompts(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Any]:
    """Arguments of `generate` for prompts that are padded on the left: input_ids and attention_mask, [B, T] each, and
    past_key_values where the rows begin alike, whose padding then stands behind that beginning."""
    lengths = mask_BT.sum(dim=1).tolist()
    width = ids_BT.shape[1]
    rows = [row[width - length :] for row, length in zip(ids_BT.tolist(), lengths, strict=True)]
    shared = common_beginning(rows, min(lengths) - 1)
    cache = beginning(model, rows[0][:shared], len(rows)) if shared else None
    if cache is None:
        return {"input_ids": ids_BT, "attention_mask": mask_BT}
    ids, mask = ids_BT.clone(), mask_BT.clone()
    ids[:, :shared], mask[:, :shared] = ids_BT[0, width - lengths[0] :][:shared], 1
    for row, length in enumerate(lengths):
        padding = slice(shared, shared + width - length)
        ids[row, padding], mask[row, padding] = ids_BT[row, : width - length], 0
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
