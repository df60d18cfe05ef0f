"""Rows of one micro-batch do not see each other: true models pass, wrong packing is refused, on verl's own engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from self_check_cases import BF16, BLIND, PACKABLE, PADDED, STATEFUL, run_all
from transformers import AutoConfig

from eaft_verl.recipe.model_fit import unpackable
from eaft_verl.training.sft.self_check import SelfCheck, chosen, require_equal, tolerance

RECIPE = """
model: none
device: cpu
data: {train: generate:sums}
evaluate: {target: [sums]}
verl: {engine: {mixed_precision: {param_dtype: fp32, reduce_dtype: fp32}}, data: {train_batch_size: 4}}
arms: {sft: {}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("self_check")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    mp.spawn(run_all, args=(str(folder), str(folder / "recipe.yaml")), nprocs=1)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[Any, Any]:
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.parametrize("kind", PACKABLE)
def test_a_model_that_keeps_rows_apart_passes(found: dict[Any, Any], folder: Path, kind: str) -> None:
    seen = found[kind, ()]
    assert seen["plain_difference"] < 1e-5 and seen["difference"] < 1e-5 and seen["leak"] == 0.0
    assert seen["packed"] == pytest.approx(seen["plain"], abs=1e-5)
    assert unpackable(AutoConfig.from_pretrained(folder / kind)) is None


@pytest.mark.parametrize("kind", STATEFUL)
def test_state_across_rows_is_caught_and_padding_is_right(found: dict[Any, Any], folder: Path, kind: str) -> None:
    message, padded = found[kind, ()], found[kind, (PADDED,)]
    assert "rows of one micro-batch see each other" in message and PADDED in message
    assert padded["difference"] < 1e-5 and padded["plain_difference"] < 1e-5 and padded["leak"] == 0.0
    assert str(unpackable(AutoConfig.from_pretrained(folder / kind))).startswith("layers of kind")


def test_attention_that_overlooks_where_a_row_begins_is_caught(found: dict[Any, Any]) -> None:
    message = found[BLIND[0], BLIND[1:]]
    assert (
        "rows of one micro-batch see each other" in message and f"{found['llama', ()]['single']:.5f} one by" in message
    )


def test_attention_that_computes_another_model_is_caught(found: dict[Any, Any]) -> None:
    """Gemma 2 caps its attention's logits, and sdpa does not."""
    assert "computes another model" in found["gemma2", ()] and "attn_implementation=eager" in found["gemma2", ()]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_bfloat16_differs_by_rounding_only(found: dict[Any, Any], kind: str) -> None:
    seen = found[kind, (BF16,)]
    assert seen["leak"] == 0.0 and 1e-4 < seen["plain_difference"] < tolerance("bf16")


def test_a_leak_shows_in_bfloat16_too(found: dict[Any, Any]) -> None:
    assert "see each other" in found["lfm2", (BF16,)] and found["lfm2", (BF16, PADDED)]["leak"] == 0.0


def test_tolerances() -> None:
    assert tolerance("fp32") == 1e-3 and tolerance("bf16") == pytest.approx(45 / 256)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, False),
        ({"leak": 0.002}, True),
        ({"leak": 0.002, "noise": 0.001}, False),  # experts on a GPU: as much without a reason
        ({"difference": 0.002}, True),
        ({"plain_difference": 0.002}, True),
        ({"plain_difference": None}, False),
        ({"difference": float("nan")}, True),
        ({"plain_difference": float("nan")}, True),
    ],
)
def test_what_is_refused(change: dict[str, Any], refused: bool) -> None:
    from eaft_verl.errors import RunError

    values: dict[str, Any] = {"rows": 4, "tokens": 80, "packed": 2.0, "single": 2.0, "plain": 2.0, "leak": 0.0}
    values |= {"noise": 0.0, "difference": 0.0, "plain_difference": 0.0, "tolerance": 1e-3, "skipped": ""}
    check = SelfCheck(**{**values, **change})
    if refused:
        with pytest.raises(RunError, match="self-check: "):
            require_equal(check, packing=True)
    else:
        require_equal(check, packing=True)


def test_rows_are_spread_over_the_data_and_short_ones_left_out() -> None:
    from eaft_verl.data.parquet import Example

    rows = [Example(str(n), [], list(range(4 if n % 2 else 200)), [0] * 200) for n in range(16)]
    picked = chosen(rows)
    assert [row.id for row in picked] == ["0", "4", "8", "12"] and {len(row.input_ids) for row in picked} == {128}
    assert picked[0].loss_mask == [0] + [1] * 127
