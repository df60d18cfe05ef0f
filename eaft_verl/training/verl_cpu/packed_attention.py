"""Attention over packed rows on a CPU: row by row and in float32, where transformers' `sdpa` takes all of them at once.

torch multiplies what the mask forbids as well, and its bfloat16 kernel is slower than its float32 one, backward above
all. Dimension letters: B batch, H heads, T tokens of a packed micro-batch, D of a head.
"""

import weakref
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class _Rows(NamedTuple):
    """Where the rows of a packed batch end, 0 first, and whether each token sees all of its row before it."""

    ends: list[int]
    causal: bool


_NONE = _Rows([], False)  # of a mask that does not keep rows apart, or is none of one packed batch
_last: tuple[weakref.ref[Tensor], _Rows] | None = None  # every layer is given the same mask


def register() -> None:
    """Make it what this process means by `attn_implementation=sdpa`."""
    AttentionInterface.register("sdpa", packed_sdpa)


def packed_sdpa(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`, [B, T, H, D]: the same sums, rounded less."""
    query, key, value = (part.float() for part in (query_BHTD, key_BHTD, value_BHTD))
    found = _rows(attention_mask) if attention_mask is not None else _NONE
    if found.causal:  # then torch needs no mask, and reads no more than half
        options["is_causal"] = True

    def attend(rows: slice, mask: Tensor | None) -> Tensor:
        parts = (query[:, :, rows], key[:, :, rows], value[:, :, rows])
        return sdpa_attention_forward(module, parts[0], parts[1], parts[2], mask, **options)[0]

    with torch.autocast("cpu", enabled=False):  # it would make them bfloat16 again
        if not found.ends or attention_mask is None:
            return attend(slice(None), attention_mask).to(query_BHTD.dtype), None
        places = [slice(*pair) for pair in pairwise(found.ends)]
        made = [attend(rows, None if found.causal else attention_mask[:, :, rows, rows]) for rows in places]
        return torch.cat(made, dim=1).to(query_BHTD.dtype), None


def _rows(mask: Tensor) -> _Rows:
    global _last
    if _last is None or _last[0]() is not mask:
        _last = weakref.ref(mask), _found(mask)
    return _last[1]


def _found(mask: Tensor) -> _Rows:
    if mask.dtype != torch.bool or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return _NONE
    seen_TT = mask[0, 0]
    follows_T = torch.cat([seen_TT.new_zeros(1), seen_TT.diagonal(-1)])  # whether a token sees the one before it
    row_T = (~follows_T).cumsum(0)
    within_TT = row_T[:, None] == row_T[None]
    if bool((seen_TT & ~within_TT).any()):
        return _NONE
    ends = [*(~follows_T).nonzero().squeeze(-1).tolist(), len(seen_TT)]
    return _Rows(ends, torch.equal(seen_TT, within_TT.tril_()))
