"""Attention row by row against transformers' over the whole mask, in float64: values, gradients, when it is used."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eaft_verl.attention import packed as packed_attention
from eaft_verl.attention.packed import packed_sdpa

HEADS, SIZE = 4, 8


class Layer(torch.nn.Module):
    """As much of a layer as attention asks for; two heads share a key."""

    num_key_value_groups = 2
    is_causal = True


def mask_of(lengths: list[int], window: int = 10**6) -> Tensor:
    """[1, 1, T, T] causal within each row, as far back as the window."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(row))
    behind = place[:, None] - place[None]
    return ((row[:, None] == row[None]) & (behind >= 0) & (behind < window))[None, None]


def inputs(tokens: int, dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(batch, heads, tokens, SIZE, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (HEADS, HEADS // 2, HEADS // 2)
    ]


def both(function: Any, parts: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    out = function(Layer(), *parts, mask, scaling=0.3)[0]
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), parts)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """How many tokens transformers' function was given, and whether a mask, call by call."""
    seen: list[tuple[int, bool]] = []

    def counted(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        seen.append((query.shape[2], mask is not None))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setattr(packed_attention, "sdpa_attention_forward", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [10**6, 3], ids=["causal", "window"])
@pytest.mark.parametrize("lengths", [[7, 1, 12, 2], [5, 5], [9]], ids=str)
def test_rows_are_what_the_mask_says(
    lengths: list[int], window: int, dtype: torch.dtype, calls: list[tuple[int, bool]]
) -> None:
    mask, parts = mask_of(lengths, window), inputs(sum(lengths), dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):  # as verl's engine runs a model
        ours = both(packed_sdpa, parts, mask)
    assert [tokens for tokens, _ in calls] == lengths
    assert all(masked == (window == 3) for _, masked in calls)  # no mask is needed where a row sees all before it
    exact = [part.detach().double().requires_grad_() for part in parts]
    for one, truth in zip(ours, both(sdpa_attention_forward, exact, mask), strict=True):
        assert one.dtype == dtype
        error = (one.double() - truth).norm() / truth.norm()
        assert error < (1e-6 if dtype == torch.float32 else 4e-3)  # bf16: half a unit in the last place of the result


def seen_by_the_next() -> Tensor:
    mask = mask_of([4, 6])
    mask[0, 0, 7, 2] = True  # a token of the second row sees the first row
    return mask


@pytest.mark.parametrize(
    ("mask", "batch"),
    [
        (seen_by_the_next(), 1),
        (torch.where(mask_of([4, 6]), 0.0, -1e9), 1),
        (mask_of([4, 6]).expand(2, -1, -1, -1), 2),
        (None, 1),
    ],
    ids=["rows that see each other", "numbers", "a batch", "none"],
)
def test_other_masks_are_left_to_transformers(mask: Tensor | None, batch: int, calls: list[tuple[int, bool]]) -> None:
    parts = inputs(10, torch.float32, batch)
    ours = both(packed_sdpa, parts, mask)
    assert calls == [(10, mask is not None)]
    for one, truth in zip(ours, both(sdpa_attention_forward, parts, mask), strict=True):
        torch.testing.assert_close(one, truth)


def test_another_mask_of_the_same_size_is_looked_at_again(calls: list[tuple[int, bool]]) -> None:
    parts = inputs(10, torch.float32)
    for lengths in ([4, 6], [7, 3], [4, 6]):
        packed_sdpa(Layer(), *parts, mask_of(lengths), scaling=0.3)
    assert [tokens for tokens, _ in calls] == [4, 6, 7, 3, 4, 6]
