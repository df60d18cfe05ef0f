"""A step's metrics against numbers worked out by hand, and the table gathered over two processes."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from eaft_verl.training.sft.step_metrics import COLUMNS, TokenTable, summarize

LN5 = math.log(5.0)  # the nll at p = 0.2


def rows(*values: tuple[float, ...]) -> torch.Tensor:
    table = torch.tensor(values, dtype=torch.float64).reshape(-1, len(COLUMNS) - 1)
    return torch.cat([table, torch.arange(len(table), dtype=torch.float64)[:, None]], dim=-1)  # anchor_kl: 0, 1, ...


def test_summary_by_hand():
    metrics = summarize(
        rows(
            # nll, entropy20, correct, weight, example
            (0.25, 0.10, 1, 0.0, 0),
            (3.00, 0.50, 0, 0.5, 0),  # a confident conflict: the bound of the entropy belongs to it
            (LN5, 0.30, 0, 1.0, 3),  # p = 0.2 exactly is none
            (2.50, 2.00, 0, 1.0, 3),
            (1.50, 2.75, 1, 0.5, 7),
        )
    )
    nll = 0.25 + 3.0 + LN5 + 2.5 + 1.5
    expected = {
        "step_tokens": 5.0,
        "nll": nll / 5,
        "token_accuracy": 0.4,
        "entropy": 5.65 / 5,
        "weight_mean": 0.6,
        "weight_p10": 0.0,
        "weight_p50": 0.5,
        "weight_p90": 1.0,
        "ess": 9.0 / (5 * 2.5),
        "conflict_share": 0.2,
        "nll_low_entropy": (3.25 + LN5) / 3,
        "nll_high_entropy": 2.0,
        "median_example_nll": 1.625,  # of 1.625, (ln 5 + 2.5) / 2 = 2.05, 1.5
        "anchor_kl": 2.0,  # 0, 1, 2, 3, 4
    }
    assert metrics == pytest.approx(expected, rel=1e-12)


def test_median_of_an_even_number_of_examples_is_between_the_middle_two():
    table = rows((1.0, 0, 0, 1, 0), (2.0, 0, 0, 1, 1), (4.0, 0, 0, 1, 1), (6.0, 0, 0, 1, 2), (9.0, 0, 0, 1, 5))
    assert summarize(table)["median_example_nll"] == pytest.approx(4.5)


def test_order_of_the_rows_does_not_matter():
    source = torch.Generator().manual_seed(0)
    table = torch.rand(50, len(COLUMNS), generator=source, dtype=torch.float64) * 3
    table[:, -1] = table[:, -1].floor()
    mixed = table[torch.randperm(50, generator=source)]
    assert summarize(mixed) == pytest.approx(summarize(table), rel=1e-12)


def test_equal_weights_have_full_effective_sample_size():
    assert summarize(rows(*[(1.0, 1.0, 1, 0.3, 0)] * 4))["ess"] == pytest.approx(1.0)
    assert summarize(rows((1.0, 1.0, 1, 1.0, 0), *[(1.0, 1.0, 1, 0.0, 0)] * 3))["ess"] == pytest.approx(0.25)


def test_weight_quantiles_are_members_of_the_sample():
    metrics = summarize(rows(*[(1.0, 1.0, 1, weight / 10, 0) for weight in (9, 0, 8, 1, 7, 2, 6, 3, 5, 4)]))
    assert [metrics[f"weight_p{point}"] for point in (10, 50, 90)] == [0.1, 0.5, 0.9]


def test_no_tokens_is_nan_and_not_an_error():
    metrics = summarize(rows())
    assert metrics.pop("step_tokens") == 0
    assert all(math.isnan(value) for value in metrics.values())


def test_no_weight_and_no_tokens_of_a_group_are_nan():
    metrics = summarize(rows((1.0, 1.0, 1, 0.0, 0)))
    assert [name for name, value in metrics.items() if math.isnan(value)] == [
        "ess",
        "nll_low_entropy",
        "nll_high_entropy",
    ]
    assert metrics["conflict_share"] == 0.0


# --- the table -------------------------------------------------------------------------------------------------------

MICRO_BATCHES = (  # lengths of the examples, trained tokens
    ((2, 3), (0, 1, 1, 0, 1)),
    ((4,), (0, 0, 0, 0)),
    ((1, 2), (1, 1, 0)),
    ((3,), (1, 1, 1)),
)


def filled(micro_batches: tuple, first: int = 0) -> TokenTable:
    """A table whose values tell where in the whole batch, token by token from `first`, they came from."""
    table, seen = TokenTable(), first
    for lengths, mask in micro_batches:
        position_T = torch.arange(seen, seen + len(mask), dtype=torch.float32)
        seen += len(mask)
        table.add(
            torch.tensor(mask, dtype=torch.bool),
            torch.tensor(lengths),
            position_T / 8,
            nll=position_T.clone().requires_grad_(),
            entropy20=position_T + 0.5,
            correct=position_T % 2,
        )
    return table


def test_the_table_keeps_trained_tokens_with_their_example():
    table = filled(MICRO_BATCHES)
    gathered = table.gather(None)
    assert gathered.dtype == torch.float64 and not gathered.requires_grad
    trained = [1, 2, 4, 9, 10, 12, 13, 14]
    examples = [0, 1, 1, 3, 4, 5, 5, 5]
    assert gathered.tolist() == [
        [float(t), t + 0.5, float(t % 2), t / 8, float(e), 0.0] for t, e in zip(trained, examples, strict=True)
    ]
    table.clear()
    assert table.gather(None).shape == (0, len(COLUMNS)) and table.examples == 0


# what each of two ranks holds, as ranges of MICRO_BATCHES: uneven, and one with no micro-batch at all
SPLITS = (((0, 2), (2, 4)), ((0, 3), (3, 4)), ((0, 4), (4, 4)), ((0, 0), (0, 4)))


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gathered = []
    for split in SPLITS:
        low, high = split[rank]
        first = sum(len(mask) for _, mask in MICRO_BATCHES[:low])
        gathered.append(filled(MICRO_BATCHES[low:high], first).gather(dist.group.WORLD))
    torch.save(gathered, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def canonical(table: torch.Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """Rows in order of their position, and which positions share an example, whatever its number."""
    table = table[table[:, 0].argsort()]
    groups = [table[table[:, -1] == example][:, 0].tolist() for example in table[:, -1].unique()]
    return table[:, :-1].tolist(), sorted(groups)


def test_two_processes_gather_the_table_of_one(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    whole = filled(MICRO_BATCHES).gather(None)
    for first, second in zip(*(torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)), strict=True):
        assert torch.equal(first, second)
        assert canonical(first) == canonical(whole)
        assert summarize(first) == pytest.approx(summarize(whole), rel=1e-12, nan_ok=True)
