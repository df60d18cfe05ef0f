"""Attention over packed rows on a CPU: row by row and in float32, where transformers' `sdpa` takes all of them at once.

torch multiplies what the mask forbids as well, and its bfloat16 kernel is slower than its float32 one, backward above
all. Dimension letters: B batch, H heads, T tokens of a packed micro-batch, D of a head.
"""

import weakref
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_last: tuple[weakref.ref[Tensor], list[int]] | None = None  # every layer is given the same mask


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

    def attend(rows: slice, mask: Tensor | None) -> Tensor:
        parts = (query[:, :, rows], key[:, :, rows], value[:, :, rows])
        return sdpa_attention_forward(module, parts[0], parts[1], parts[2], mask, **options)[0]

    ends = _ends(attention_mask) if attention_mask is not None else []
    with torch.autocast("cpu", enabled=False):  # it would make them bfloat16 again
        if len(ends) < 3 or attention_mask is None:  # one row
            found = attend(slice(None), attention_mask)
        else:
            places = [slice(*pair) for pair in pairwise(ends)]
            found = torch.cat([attend(rows, attention_mask[:, :, rows, rows]) for rows in places], dim=1)
    return found.to(query_BHTD.dtype), None


def _ends(mask: Tensor) -> list[int]:
    """[0, end of each row] where the mask keeps rows apart; [] where it does not, or is none of one packed batch."""
    global _last
    if _last is None or _last[0]() is not mask:
        _last = weakref.ref(mask), _found(mask)
    return _last[1]


def _found(mask: Tensor) -> list[int]:
    if mask.dtype != torch.bool or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return []
    seen_TT = mask[0, 0]
    follows_T = torch.cat([seen_TT.new_zeros(1), seen_TT.diagonal(-1)])  # whether a token sees the one before it
    row_T = (~follows_T).cumsum(0)
    if bool((seen_TT & (row_T[:, None] != row_T[None])).any()):
        return []
    return [*(~follows_T).nonzero().squeeze(-1).tolist(), len(seen_TT)]
