"""Attention over packed rows: transformers' `sdpa` takes all of them at once and multiplies what the mask forbids.

On a GPU all rows go through torch's own flash kernel, which knows where each begins: no mask is read and no key is
repeated, without the package flash-attn. On a CPU they go row by row and in float32, as torch's bfloat16 kernel is
slower there, backward above all. Dimension letters: B batch, H heads, T tokens of a packed micro-batch, D of a head, N
rows.
"""

import inspect
from itertools import pairwise
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


class _Rows(NamedTuple):
    """Where the rows of a packed batch end, 0 first, and whether each token sees all of its row before it."""

    ends: list[int]
    causal: bool
    ends_N: Tensor | None = None  # the same, as the kernel wants them


_NONE = _Rows([], False)  # of a mask that does not keep rows apart, or is none of one packed batch
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by mask: all layers that attend alike are given the same


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
    """As `sdpa_attention_forward`, [B, T, H, D]: the same sums, on a CPU rounded less."""
    found = _rows(attention_mask) if attention_mask is not None else _NONE
    parts = (query_BHTD, key_BHTD, value_BHTD)
    if query_BHTD.device.type == "cpu":
        return _row_by_row(module, parts, attention_mask, found, options), None
    parts = _autocast(parts)
    if found.causal and _fits_flash(parts, options):
        return _flash(parts, found, options.get("scaling")), None
    return sdpa_attention_forward(module, *parts, attention_mask, **options)[0], None


def _row_by_row(
    module: torch.nn.Module,
    parts: tuple[Tensor, Tensor, Tensor],
    attention_mask: Tensor | None,
    found: _Rows,
    options: dict[str, Any],
) -> Tensor:
    query, key, value = (part.float() for part in parts)
    if found.causal:  # then torch needs no mask, and reads no more than half
        options = {**options, "is_causal": True}

    def attend(rows: slice, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(module, query[:, :, rows], key[:, :, rows], value[:, :, rows], mask, **options)[0]

    with torch.autocast("cpu", enabled=False):  # it would make them bfloat16 again
        if not found.ends or attention_mask is None:
            return attend(slice(None), attention_mask).to(parts[0].dtype)
        places = [slice(*pair) for pair in pairwise(found.ends)]
        made = [attend(rows, None if found.causal else attention_mask[:, :, rows, rows]) for rows in places]
        return torch.cat(made, dim=1).to(parts[0].dtype)


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


def _flash(parts: tuple[Tensor, Tensor, Tensor], rows: _Rows, scaling: float | None) -> Tensor:
    query_THD, key_THD, value_THD = (part.squeeze(0).transpose(0, 1) for part in parts)
    longest = max(end - start for start, end in pairwise(rows.ends))
    places: Any = (rows.ends_N, rows.ends_N, longest, longest)
    made_THD: Any = varlen_attn(
        *(query_THD, key_THD, value_THD, *places),
        scale=scaling,
        window_size=_CAUSAL,
        **_GROUPED,
    )
    return made_THD[None]


def _rows(mask: Tensor) -> _Rows:
    if mask not in _known:
        _known[mask] = _found(mask)
    return _known[mask]


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
    causal = torch.equal(seen_TT, within_TT.tril_())
    return _Rows(ends, causal, torch.tensor(ends, dtype=torch.int32, device=mask.device))
