"""The stored reference and the old policy without an engine: packing, alignment with the trained tokens, restarts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batch_examples import EXAMPLES

from eaft_verl.errors import RunError
from eaft_verl.tokens.reference_kl import top_reference
from eaft_verl.training.sft.anchor_cache import EmitTop, reference_cache, unpack
from eaft_verl.training.sft.batches import make_batch
from eaft_verl.training.sft.loss import BATCH_FLAGS
from eaft_verl.training.sft.old_policy import OldPolicy
from eaft_verl.training.sft.order import PADDING

VOCAB, K = 50, 4


def logits_of(row: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(row)
    return torch.randn(len(EXAMPLES[row].input_ids), VOCAB, generator=source) * 4


def emitted(rows: list[int]) -> Any:
    """What the workers would answer: EmitTop's hook over the packed rows, given back row by row."""
    shortest = min((row for row in rows if row != PADDING), key=lambda row: len(EXAMPLES[row].input_ids))
    used = [shortest if row == PADDING else row for row in rows]
    hook = EmitTop(K)(student_logits=torch.cat([logits_of(row) for row in used])[None], data=object())
    lengths = [len(EXAMPLES[row].input_ids) for row in used]
    return {
        name: torch.nested.as_nested_tensor(list(values[0].split(lengths)), layout=torch.jagged)
        for name, values in hook.items()
    }


def test_packing_loses_nothing() -> None:
    logits = torch.cat([logits_of(row) for row in range(len(EXAMPLES))])
    logits[0, 5:] = -torch.inf  # fewer finite tokens than K: ln r = -inf
    logits[0, 3:] = -torch.inf
    hook = EmitTop(K)(student_logits=logits[None], data=object())
    packed = torch.stack([hook[f"top_{rank:04d}"][0] for rank in range(K)], dim=-1)
    found, expected = unpack(packed, hook["tail"][0]), top_reference(logits, K)
    assert torch.equal(found.ids_TK, expected.ids_TK)
    assert torch.equal(found.logprob_TK, expected.logprob_TK)
    assert torch.equal(found.tail_T, expected.tail_T)


def test_rows_are_stored_and_given_back_at_the_position_that_predicts_them(tmp_path: Path) -> None:
    cache = reference_cache(tmp_path / "cache", "key", EXAMPLES, K, emitted, batch_size=3)
    for row, example in enumerate(EXAMPLES):
        tokens, top = cache.tokens(row), top_reference(logits_of(row), K)
        trained = [position for position, mask in enumerate(example.loss_mask[1:]) if mask]
        assert tokens["anchor_ids"].shape == (len(example.input_ids), K)
        for position in range(len(example.input_ids)):
            if position in trained:
                assert torch.equal(tokens["anchor_ids"][position].long(), top.ids_TK[position])
                assert torch.equal(tokens["anchor_logprob"][position], top.logprob_TK[position])
                assert tokens["anchor_tail"][position] == top.tail_T[position]
            else:
                assert not tokens["anchor_ids"][position].any() and not tokens["anchor_tail"][position]


def test_a_stored_reference_is_read_not_made_again(tmp_path: Path) -> None:
    first = reference_cache(tmp_path / "cache", "key", EXAMPLES, K, emitted, 3)

    def refuse(rows: list[int]) -> Any:
        raise AssertionError("a second pass")

    second = reference_cache(tmp_path / "cache", "key", EXAMPLES, K, refuse, 3)
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    assert first.bytes == second.bytes > 0
    assert first.seconds == second.seconds > 0  # what the pass took, also for whom it is only read
    with pytest.raises(RunError, match="stale; delete it, or use another output folder"):
        reference_cache(tmp_path / "cache", "another", EXAMPLES, K, refuse, 3)


def test_half_a_pass_is_no_cache(tmp_path: Path) -> None:
    def broken(rows: list[int]) -> Any:
        if 0 not in rows:
            raise RuntimeError("killed")
        return emitted(rows)

    with pytest.raises(RuntimeError, match="killed"):
        reference_cache(tmp_path / "cache", "key", EXAMPLES, K, broken, 2)
    assert not (tmp_path / "cache").exists()
    reference_cache(tmp_path / "cache", "key", EXAMPLES, K, emitted, 2)


def test_batches_carry_it(tmp_path: Path) -> None:
    cache = reference_cache(tmp_path / "cache", "key", EXAMPLES, K, emitted, 3)
    batch = make_batch(EXAMPLES, [2, 0, PADDING], BATCH_FLAGS, None, [cache])
    for row, found in zip((2, 0, 0), batch["anchor_ids"].unbind(), strict=True):
        assert torch.equal(found, cache.tokens(row)["anchor_ids"])


# old policy


def rows_of(step: int) -> list[int]:
    return [(2 * step) % 4, (2 * step + 1) % 4 if step % 3 else PADDING]


def answers(scale: float) -> Any:
    def infer(rows: list[int]) -> Any:
        lengths = [len(EXAMPLES[max(row, 0)].input_ids) for row in rows]
        values = [scale * torch.arange(length, dtype=torch.float32) for length in lengths]
        return {"nll": torch.nested.as_nested_tensor(values, layout=torch.jagged)}

    return infer


def test_the_old_policy_changes_only_at_a_refresh() -> None:
    state: dict[str, Any] = {}
    policy = OldPolicy(2, state)
    found = []
    for step in range(1, 5):
        policy.refresh(step, rows_of, answers(float(step)))
        found.append(policy.tokens(rows_of(step)[0])["old_logprob"])
    for step, values in zip((1, 1, 3, 3), found, strict=True):
        assert torch.equal(values, -float(step) * torch.arange(len(values), dtype=torch.float32))


def test_the_old_policy_survives_a_restart_between_two_refreshes() -> None:
    state: dict[str, Any] = {"step": 1}
    OldPolicy(4, state).refresh(1, rows_of, answers(0.1))
    expected = OldPolicy(4, state).tokens(2)["old_logprob"]
    restored = json.loads(json.dumps(state))
    again = OldPolicy(4, restored)
    again.refresh(2, rows_of, answers(9.0))
    assert torch.equal(again.tokens(2)["old_logprob"], expected)
