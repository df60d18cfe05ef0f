"""Attention over packed rows: transformers' `sdpa` takes all of them at once and multiplies what the mask forbids.

On a GPU all rows go through torch's own flash kernel, which knows where each begins: no mask is read and no key is
repeated, without the package flash-attn. On a CPU they go piece by piece, a row or a part of the tree that rows of one
beginning make, and in float32, as torch's bfloat16 kernel is slower there, backward above all. Dimension letters: B
batch, H heads, T tokens of a packed micro-batch, D of a head, N rows.
"""

import inspect
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None  # type: ignore[assignment]

_GROUPED: dict[str, Any] = {}  # said by newer torch only, though older shares keys as well
if varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters:
    _GROUPED["enable_gqa"] = True
_CAUSAL = (-1, 0)  # varlen_attn's word for it: all of the row before a token, and nothing after it
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_HEAD = 256  # the kernel takes heads up to this size, in steps of 8


class Piece(NamedTuple):
    """Tokens of one call of attention. sizes: of its parts, which do not see each other, each token all of its part
    before it; before: the pieces that all of them come after, the first one first."""

    sizes: tuple[int, ...]
    before: tuple[int, ...] = ()


class _Calls(NamedTuple):
    """The pieces that a mask keeps apart, and each one's part of it: None where a token sees all that is before it."""

    pieces: list[Piece]
    masks: list[Tensor | None]
    ends_N: Tensor | None = None  # where rows end, 0 first, as the flash kernel wants them; None where a row has a mask


_ALL = _Calls([], [])  # of a mask that keeps nothing apart, or is none of one packed batch
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by mask: all layers that attend alike are given the same


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
    """As `sdpa_attention_forward`, [B, T, H, D]: the same sums, on a CPU rounded less."""
    found = _calls(attention_mask) if attention_mask is not None else _ALL
    parts = (query_BHTD, key_BHTD, value_BHTD)
    if query_BHTD.device.type == "cpu":
        return _piece_by_piece(module, parts, attention_mask, found, options).to(query_BHTD.dtype), None
    parts = _autocast(parts)
    if found.ends_N is not None and _fits_flash(parts, options):
        return _flash(parts, found, options.get("scaling")), None
    return sdpa_attention_forward(module, *parts, attention_mask, **options)[0], None


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


def _piece_by_piece(
    module: torch.nn.Module,
    parts: tuple[Tensor, Tensor, Tensor],
    attention_mask: Tensor | None,
    found: _Calls,
    options: dict[str, Any],
) -> Tensor:
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    query, key, value = (part.to(wide) for part in parts)
    with torch.autocast("cpu", enabled=False):  # it would make them bfloat16 again
        if not found.pieces:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
        options = {**options, "is_causal": True}  # where there is no mask; torch reads no more than half then
        # split, not sliced: a slice's gradient is a zero tensor as large as the batch
        sizes = [sum(piece.sizes) for piece in found.pieces]
        queries, keys, values = (part.split(sizes, dim=2) for part in (query, key, value))
        made = []
        for number, (piece, mask) in enumerate(zip(found.pieces, found.masks, strict=True)):
            seen = [*piece.before, number]
            key, value = (
                torch.cat([part[one] for one in seen], dim=2) if seen[1:] else part[number] for part in (keys, values)
            )
            made.append(sdpa_attention_forward(module, queries[number], key, value, mask, **options)[0])
        return torch.cat(made, dim=1)


def _autocast(parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype in which autocast would run scaled_dot_product_attention."""
    device = parts[0].device.type
    if not torch.is_autocast_enabled(device):
        return parts
    query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in parts)
    return query, key, value


def _fits_flash(parts: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> bool:
    query, _, value = parts
    size = query.shape[-1]
    return (
        varlen_attn is not None
        and query.dtype in _FLASH_DTYPES
        and size % 8 == 0
        and size <= _FLASH_HEAD
        and value.shape[-1] == size
        and not options.get("dropout", 0.0)
    )


def _flash(parts: tuple[Tensor, Tensor, Tensor], found: _Calls, scaling: float | None) -> Tensor:
    query_THD, key_THD, value_THD = (part.squeeze(0).transpose(0, 1) for part in parts)
    longest = max(piece.sizes[0] for piece in found.pieces)
    places: Any = (found.ends_N, found.ends_N, longest, longest)
    made_THD: Any = varlen_attn(
        *(query_THD, key_THD, value_THD, *places),
        scale=scaling,
        window_size=_CAUSAL,
        **_GROUPED,
    )
    return made_THD[None]


def _calls(mask: Tensor) -> _Calls:
    if mask not in _known:
        _known[mask] = _found(mask)
    return _known[mask]


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
    parts = [None if causal else mask[:, :, one, one].clone() for one in rows]  # a view would keep the mask alive
    ends_N = torch.tensor(ends, dtype=torch.int32, device=mask.device) if causal else None
    return _Calls([Piece((one.stop - one.start,)) for one in rows], parts, ends_N)
