"""Attention over packed rows by torch's flash kernel on a GPU: the numbers of float64, and when it is used."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eaft_verl.attention import packed as packed_attention
from eaft_verl.attention.packed import packed_sdpa

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = [130, 1, 700, 33, 64]


class Layer(torch.nn.Module):
    """As much of a layer as attention asks for; seven heads share a key, as in Qwen2.5-0.5B."""

    num_key_value_groups = 7
    is_causal = True


def mask_of(window: int = 10**6) -> Tensor:
    """[1, 1, T, T] causal within each row, as far back as the window."""
    row = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).cuda()
    place = torch.arange(len(row), device="cuda")
    behind = place[:, None] - place[None]
    return ((row[:, None] == row[None]) & (behind >= 0) & (behind < window))[None, None]


def inputs(dtype: torch.dtype, size: int) -> list[Tensor]:
    """Query, key and value as a model hands them over: views of [B, T, H, D]."""
    torch.manual_seed(0)
    made = [torch.randn(1, sum(LENGTHS), heads, size, device="cuda", dtype=dtype) for heads in (14, 2, 2)]
    return [part.transpose(1, 2).requires_grad_() for part in made]


def both(function: Any, parts: list[Tensor], mask: Tensor, **options: Any) -> list[Tensor]:
    out = function(Layer(), *parts, mask, scaling=0.2, **options)[0]
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device="cuda").view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), parts)]


def eager(parts: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Attention written out, in float64."""

    def attend(_: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float) -> tuple[Tensor, None]:
        key, value = (part.repeat_interleave(7, dim=1) for part in (key, value))
        scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen, float("-inf"))
        return (scores.softmax(dim=-1) @ value).transpose(1, 2), None

    return both(attend, [part.detach().double().requires_grad_() for part in parts], mask)


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A one for every call that is left to transformers."""
    seen: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        return sdpa_attention_forward(*arguments, **options)

    monkeypatch.setattr(packed_attention, "sdpa_attention_forward", counted)
    return seen


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_with_the_mask(dtype: torch.dtype, size: int, masked: list[int]) -> None:
    parts, mask = inputs(dtype, size), mask_of()
    ours = both(packed_sdpa, parts, mask)
    assert not masked
    for one, other, truth in zip(ours, both(sdpa_attention_forward, parts, mask), eager(parts, mask), strict=True):
        error, allowed = ((got.double() - truth).norm() / truth.norm() for got in (one, other))
        assert error < 1.2 * allowed, (float(error), float(allowed))


def test_autocast_reaches_it(masked: list[int]) -> None:
    parts, mask = inputs(torch.float32, 64), mask_of()
    with torch.autocast("cuda", torch.bfloat16):
        out = packed_sdpa(Layer(), *parts, mask, scaling=0.2)[0]
    assert out.dtype == torch.bfloat16 and not masked


@pytest.mark.parametrize(
    ("dtype", "size", "window", "options"),
    [
        (torch.float32, 64, 10**6, {}),
        (torch.bfloat16, 60, 10**6, {}),
        (torch.bfloat16, 64, 100, {}),
        (torch.bfloat16, 64, 10**6, {"dropout": 0.5}),
    ],
    ids=["float32", "size", "window", "dropout"],
)
def test_the_rest_is_left_to_transformers(
    dtype: torch.dtype, size: int, window: int, options: dict[str, Any], masked: list[int]
) -> None:
    parts, mask = inputs(dtype, size), mask_of(window)
    found = []
    for function in (packed_sdpa, sdpa_attention_forward):
        torch.manual_seed(1)
        found.append(both(function, parts, mask, **options))
    assert masked
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
