"""Attention over packed rows on a CPU: piece by piece and in float32, where transformers' `sdpa` takes all at once.

A piece is a row, or a part of the tree that rows of one beginning make. torch multiplies what the mask forbids as well,
and its bfloat16 kernel is slower than its float32 one, backward above all. Letters: B batch, H heads, T tokens of a
packed micro-batch, D of a head.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class Piece(NamedTuple):
    """Tokens of one call of attention. sizes: of its parts, which do not see each other, each token all of its part
    before it; before: the pieces that all of them come after, the first one first."""

    sizes: tuple[int, ...]
    before: tuple[int, ...] = ()


class _Calls(NamedTuple):
    """The pieces that a mask keeps apart, and each one's part of it; None where a token sees all that is before it."""

    pieces: list[Piece]
    masks: list[Tensor | None]


_ALL = _Calls([], [])  # of a mask that keeps nothing apart, or is none of one packed batch
_known: Any = WeakTensorKeyDictionary()  # every layer is given the same mask, and a checkpoint's second pass too


def register() -> None:
    """Make it what this process means by `attn_implementation=sdpa`."""
    AttentionInterface.register("sdpa", packed_sdpa)


def registered() -> bool:
    """Whether it is."""
    return bool(AttentionInterface()["sdpa"] is packed_sdpa)


def packed_sdpa(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`, [B, T, H, D]: the same sums, rounded less."""
    parts = [part.float() for part in (query_BHTD, key_BHTD, value_BHTD)]
    pieces, masks = _calls(attention_mask) if attention_mask is not None else _ALL
    with torch.autocast("cpu", enabled=False):  # it would make them bfloat16 again
        if not pieces:
            whole = sdpa_attention_forward(module, parts[0], parts[1], parts[2], attention_mask, **options)[0]
            return whole.to(query_BHTD.dtype), None
        # split, not sliced: a slice's gradient is a zero tensor as large as the batch
        queries, keys, values = (part.split([sum(piece.sizes) for piece in pieces], dim=2) for part in parts)
        options["is_causal"] = True  # where there is no mask; torch reads no more than half then
        made = []
        for number, (piece, mask) in enumerate(zip(pieces, masks, strict=True)):
            seen = [*piece.before, number]
            key, value = (
                torch.cat([part[one] for one in seen], dim=2) if seen[1:] else part[number] for part in (keys, values)
            )
            made.append(sdpa_attention_forward(module, queries[number], key, value, mask, **options)[0])
        return torch.cat(made, dim=1).to(query_BHTD.dtype), None


def mask_of(pieces: Sequence[Piece]) -> Tensor:
    """[1, 1, T, T], true where a token sees another; `packed_sdpa` takes it, as long as it lives, piece by piece."""
    ends = list(accumulate((sum(piece.sizes) for piece in pieces), initial=0))
    whole_TT, masks = torch.zeros(ends[-1], ends[-1], dtype=torch.bool), []
    for number, piece in enumerate(pieces):
        rows = slice(ends[number], ends[number + 1])
        whole_TT[rows, rows] = torch.block_diag(*(torch.ones(size, size).tril_() for size in piece.sizes)).bool()
        for one in piece.before:
            whole_TT[rows, ends[one] : ends[one + 1]] = True
        columns = [torch.arange(ends[one], ends[one + 1]) for one in (*piece.before, number)]
        plain = not piece.before and len(piece.sizes) == 1
        masks.append(None if plain else whole_TT[rows][:, torch.cat(columns)][None, None])
    made = whole_TT[None, None]
    _known[made] = _Calls(list(pieces), masks)
    return made


def _calls(mask: Tensor) -> _Calls:
    if mask not in _known:
        _known[mask] = _found(mask)
    found: _Calls = _known[mask]
    return found


def _found(mask: Tensor) -> _Calls:
    """Of a mask that transformers made of positions: rows, each of which sees nothing of the others."""
    if mask.dtype != torch.bool or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return _ALL
    seen_TT = mask[0, 0]
    follows_T = torch.cat([seen_TT.new_zeros(1), seen_TT.diagonal(-1)])  # whether a token sees the one before it
    row_T = (~follows_T).cumsum(0)
    within_TT = row_T[:, None] == row_T[None]
    if bool((seen_TT & ~within_TT).any()):
        return _ALL
    ends = [*(~follows_T).nonzero().squeeze(-1).tolist(), len(seen_TT)]
    causal = torch.equal(seen_TT, within_TT.tril_())
    rows = [slice(*pair) for pair in pairwise(ends)]
    pieces = [Piece((one.stop - one.start,)) for one in rows]
    parts = [None if causal else mask[:, :, one, one].clone() for one in rows]  # a view would keep the mask alive
    return _Calls(pieces, parts)
