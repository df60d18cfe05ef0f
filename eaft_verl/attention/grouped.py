"""Eager attention whose key heads are read as they are, not copied once for every query head that shares them.

A step of an answer reads all keys and values so far: for 128 rows of SmolLM2, with three query heads to a key head, the
copies were a third of its attention. The sums are those of transformers' `eager_attention_forward`.

Dimension letters: B batch, H query heads, G key heads, R = H / G, T query tokens, L key tokens, D of a head.
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.models.llama import modeling_llama

from eaft_verl.attention.packed import packed_sdpa

NAME = "eager_grouped"
_READ = ("eager_attention_forward", "repeat_kv")


def use_grouped(model: PreTrainedModel) -> bool:
    """Let a model that was loaded with eager attention attend by groups; false, and no change, where it has its own.

    Models differ in theirs: caps on the logits, sinks. Those that have Llama's are told by its code, of which
    transformers writes a copy into the file of every such model.
    """
    files = {type(part).__module__: vars(sys.modules[type(part).__module__]) for part in model.modules()}
    own = [names for names in files.values() if "eager_attention_forward" in names]
    if not own or any(_says(names.get(each)) != _says(vars(modeling_llama)[each]) for names in own for each in _READ):
        return False
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)
    return True


def _says(function: Any) -> object:
    """All that a function does, whatever file it stands in."""
    if not inspect.isfunction(function):  # a kernel of its own
        return function
    code = function.__code__
    return code.co_code, code.co_names, code.co_consts, code.co_varnames, function.__defaults__, function.__kwdefaults__


def grouped_attention(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """(what every token takes from the values [B, T, H, D], the weights [B, H, T, L]), both in the query's dtype.

    softmax(scaling * q k^T + mask) v, the softmax in float32; mask: [B or 1, 1 or H, T, L], added. A mask of truth
    values is the one of a tree, whose pieces are taken one by one; no weights are given then.
    """
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        return packed_sdpa(module, query_BHTD, key_BGLD, value_BGLD, attention_mask, scaling=scaling, dropout=dropout)
    batch, heads, tokens, size = query_BHTD.shape
    groups = key_BGLD.shape[1]
    together = query_BHTD.reshape(batch, groups, -1, size)  # a group's heads one after the other, R * T rows
    scores_BHTL = torch.matmul(together, key_BGLD.transpose(2, 3)).view(batch, heads, tokens, -1) * scaling
    if attention_mask is not None:
        scores_BHTL = scores_BHTL + attention_mask
    weights_BHTL = torch.nn.functional.softmax(scores_BHTL, dim=-1, dtype=torch.float32).to(query_BHTD.dtype)
    weights_BHTL = torch.nn.functional.dropout(weights_BHTL, p=dropout, training=module.training)
    taken = torch.matmul(weights_BHTL.view(batch, groups, -1, weights_BHTL.shape[-1]), value_BGLD)
    return taken.view(batch, heads, tokens, -1).transpose(1, 2).contiguous(), weights_BHTL
