"""Order of the data, batches and schedule: no engine, no Ray."""

import pytest
import torch
from batch_examples import EXAMPLES
from omegaconf import OmegaConf
from verl.utils import tensordict_utils as tu

from eaft_verl.data.prepare import Example
from eaft_verl.training.sft.batches import balanced, make_batch
from eaft_verl.training.sft.loss import BATCH_FLAGS, shifted
from eaft_verl.training.sft.order import PADDING, batch_indices, sequential_batches, steps_per_epoch
from eaft_verl.training.sft.trainer import total_steps

# order


@pytest.mark.parametrize(("examples", "size"), [(10, 4), (8, 4), (3, 8), (1, 1), (97, 10)])
def test_every_example_once_per_epoch_and_padding_only_at_its_end(examples: int, size: int) -> None:
    per_epoch = steps_per_epoch(examples, size)
    for epoch in range(3):
        batches = [batch_indices(epoch * per_epoch + n + 1, examples, size, seed=5) for n in range(per_epoch)]
        assert {len(batch) for batch in batches} == {size}
        assert all(PADDING not in batch for batch in batches[:-1])
        rows = [row for batch in batches for row in batch]
        assert sorted(row for row in rows if row != PADDING) == list(range(examples))
        assert rows[examples:] == [PADDING] * (per_epoch * size - examples)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first = [batch_indices(step, 40, 40, seed=0) for step in (1, 2, 3)]
    assert first == [batch_indices(step, 40, 40, seed=0) for step in (1, 2, 3)]
    assert len({tuple(batch) for batch in [*first, batch_indices(1, 40, 40, seed=1)]}) == 4


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    whole = batch_indices(1, 12, 12, seed=3)
    assert [row for step in (1, 2, 3) for row in batch_indices(step, 12, 4, seed=3)] == whole


def test_indices_are_plain_integers() -> None:
    assert {type(row) for row in batch_indices(1, 5, 8, seed=0)} == {int}


@pytest.mark.parametrize(
    ("examples", "size", "expected"),
    [
        (5, 2, [[0, 1], [2, 3], [4, PADDING]]),
        (4, 2, [[0, 1], [2, 3]]),
        (1, 3, [[0, PADDING, PADDING]]),
        (0, 3, []),
    ],
)
def test_sequential_batches(examples: int, size: int, expected: list[list[int]]) -> None:
    assert list(sequential_batches(examples, size)) == expected


@pytest.mark.parametrize(("examples", "size", "expected"), [(1, 64, 1), (64, 64, 1), (65, 64, 2), (128, 64, 2)])
def test_steps_per_epoch(examples: int, size: int, expected: int) -> None:
    assert steps_per_epoch(examples, size) == expected


@pytest.mark.parametrize(("fixed", "expected"), [(None, 6), (4, 4), (50, 50)])
def test_total_steps(fixed: int | None, expected: int) -> None:
    trainer = {"total_training_steps": fixed, "total_epochs": 2}
    config = OmegaConf.create({"verl": {"data": {"train_batch_size": 8}, "trainer": trainer}})
    assert total_steps(config, examples=20) == expected


def test_balanced_is_a_deterministic_permutation_with_parts_of_like_cost() -> None:
    lengths = [5, 500, 7, 480, 6, 510, 8, 470]
    order = balanced(list(range(8)), lengths, ranks=2)
    assert sorted(order) == list(range(8))
    assert order == balanced(list(range(8)), lengths, ranks=2)
    halves = [sum(lengths[row] for row in part) for part in (order[:4], order[4:])]
    assert abs(halves[0] - halves[1]) < 100
    assert sum(length > 100 for length in (lengths[row] for row in order[:4])) == 2


def test_balanced_keeps_padding_rows_and_one_rank_as_it_is() -> None:
    rows = [2, PADDING, 0, PADDING]
    assert sorted(balanced(rows, [9, 3, 4], ranks=2)) == sorted(rows)
    assert balanced(rows, [9, 3, 4], ranks=1) == rows


# batches


def test_make_batch_packs_rows_in_order_and_masks_padding() -> None:
    batch = make_batch(
        EXAMPLES, [2, PADDING, 0], {**BATCH_FLAGS, "objective_state": {"tau": 2.0}}, [0.5, 1.5, 2.5, 3.5]
    )
    assert batch.batch_size == torch.Size([3])
    assert [row.tolist() for row in batch["input_ids"].unbind()] == [EXAMPLES[i].input_ids for i in (2, 0, 0)]
    assert [row.tolist() for row in batch["position_ids"].unbind()] == [list(range(n)) for n in (9, 5, 5)]
    masks = [row.tolist() for row in batch["loss_mask"].unbind()]
    assert masks == [EXAMPLES[2].loss_mask, [0] * 5, EXAMPLES[0].loss_mask]
    assert batch["sample_weight"].tolist() == [2.5, 1.0, 0.5]
    assert {batch[name].dtype for name in ("input_ids", "position_ids", "loss_mask")} == {torch.int64}
    assert tu.get(batch, "global_token_num") == [9, 5, 5]
    assert tu.get_non_tensor_data(batch, "distillation_only", False) is True
    assert tu.get_non_tensor_data(batch, "objective_state", None) == {"tau": 2.0}


def test_make_batch_weighs_all_rows_alike_without_weights() -> None:
    assert make_batch(EXAMPLES, [0, 1, PADDING], {}, None)["sample_weight"].tolist() == [1.0, 1.0, 1.0]


def test_shifted_masks_the_last_position_of_every_sequence() -> None:
    starts_trained = Example(id="x", messages=[], input_ids=[7, 8, 9], loss_mask=[1, 0, 1])
    batch = make_batch([EXAMPLES[1], starts_trained, EXAMPLES[3]], [0, 1, 2], {}, None)
    labels, mask = shifted(batch)
    ends = [2, 5, 9]
    ids = batch["input_ids"].values()
    assert all(labels[t] == ids[t + 1] for t in range(10) if t not in ends)
    assert mask.tolist() == [True, True, False, False, True, False, True, True, True, False]
