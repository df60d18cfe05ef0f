"""What rows of a batch begin with, a system turn or worked examples, goes through the model once.

A third to nine tenths of the tokens of short questions are such beginnings. Their keys and values depend on nothing
that comes after them, so every score is what it was, but for the rounding that any other batch would bring too. On a
CPU, where `attention.tree` knows the model, it is whatever two rows begin with; else what all of them do.

Dimension letters: B rows of a batch, T tokens of the longest, G key heads, D of a head.
"""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from eaft_verl.attention.tree import laid_out, packed_rows, shares, tree_of
from eaft_verl.models import told

SMALLEST = 16  # tokens: for fewer, a forward pass of their own costs more than it saves
CHANGING = {"longrope", "dynamic"}  # kinds of rotation for which keys of short rows are not those of long ones
TREE_TOKENS = 4096  # of the rows of one tree: its mask has their square


def by_tree(model: PreTrainedModel, longest: int) -> bool:
    """Whether rows of so many tokens at most go through this model as a tree of what they begin with."""
    return model.device.type == "cpu" and longest <= TREE_TOKENS and shares(model) and open_cache(model) is not None


def common_beginning(rows: Sequence[list[int]], limit: int) -> int:
    """Tokens, `limit` at most, that all rows begin with; 0 where it is not worth while."""
    if len(rows) < 2:
        return 0
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    shared = min(limit, sum(1 for _ in alike))
    return shared if shared >= SMALLEST else 0


def open_cache(model: PreTrainedModel) -> DynamicCache | None:
    """An empty memory of keys and values whose rows, with padding between their tokens, stay right.

    None for a model whose memory is another, or that has none: a window that slides, a state that is carried on, an
    index beside the keys, rotations that change when a row becomes long, or positions counted from the keys' places.
    """
    if not {"position_ids", "logits_to_keep", "past_key_values"} <= inspect.signature(model.forward).parameters.keys():
        return None
    rope = told(model.config.get_text_config(), "rope_parameters") or {}
    if CHANGING & {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}:
        return None
    if any(hasattr(module, "_cached_keys") for module in model.modules()):
        return None
    cache = DynamicCache(config=model.config)
    return cache if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers) else None


def beginning(model: PreTrainedModel, tokens: Sequence[int], rows: int) -> DynamicCache | None:
    """Keys and values of the tokens for so many rows; None for a model without such a memory."""
    cache = open_cache(model)
    if cache is None:
        return None
    ids = torch.tensor([list(tokens)], device=model.device)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(rows)
    return cache


@torch.inference_mode()
def prompts(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Any]:
    """Arguments of `generate` for prompts that are padded on the left: input_ids and attention_mask, [B, T] each, and
    past_key_values where rows begin alike; if it is all rows and no tree, their padding then stands behind that."""
    lengths = mask_BT.sum(dim=1).tolist()
    width = ids_BT.shape[1]
    rows = [row[width - length :] for row, length in zip(ids_BT.tolist(), lengths, strict=True)]
    if len(rows) > 1 and min(lengths) > 1 and by_tree(model, width):
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "past_key_values": _all_but_last(model, rows)}
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


def _all_but_last(model: PreTrainedModel, rows: Sequence[list[int]]) -> DynamicCache:
    """Keys and values [B, G, T - 1, D] of all tokens of each row but its last; padding on the left is anything."""
    width = max(map(len, rows)) - 1
    order = sorted(range(len(rows)), key=lambda number: rows[number])  # those that begin alike are neighbours
    known = DynamicCache(config=model.config)
    for chosen in torch.tensor(order).split(max(1, TREE_TOKENS // width)):
        begun = [np.array(rows[number][:-1]) for number in chosen]
        tree, cache = tree_of(begun), DynamicCache(config=model.config)
        model(**laid_out(tree, *packed_rows(begun)), past_key_values=cache, use_cache=True, logits_to_keep=1)
        place_BT = torch.zeros(len(begun), width, dtype=torch.long)
        for row, places_T in enumerate(tree.place_T.split([len(one) for one in begun])):
            place_BT[row, width - len(places_T) :] = places_T
        pairs: Any = zip(known.layers, cache.layers, strict=True)
        for held, found in pairs:
            if not held.is_initialized:
                held.lazy_initialization(found.keys, found.values)
                for name, one in (("keys", found.keys), ("values", found.values)):
                    setattr(held, name, one.new_empty(len(rows), one.shape[1], width, one.shape[3]))
            held.keys[chosen] = found.keys[0][:, place_BT].transpose(0, 1)
            held.values[chosen] = found.values[0][:, place_BT].transpose(0, 1)
    return known
