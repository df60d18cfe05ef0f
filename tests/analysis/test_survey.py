"""The first pass: quantiles of all tokens, sums of samples, repeated conflicts, places in a turn."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from analysis.made_stores import random_columns, write_store

from eaft_verl.analysis.blocks import blocks, spread
from eaft_verl.analysis.survey import Sketch, Survey
from eaft_verl.errors import DataError


def test_who_counts_beside_others_sees_every_block_in_order_and_is_heard_when_it_fails():
    one, two = [], []
    spread(range(50), [one.append, two.append])
    assert one == two == list(range(50))
    with pytest.raises(ZeroDivisionError):
        spread(range(50), [one.append, lambda block: 1 // (block - 20)])


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0])
def test_a_sketch_knows_every_quantile_to_a_part_in_2048(scale):
    values = (np.random.default_rng(0).random(20001) ** 4 * scale).astype(np.float32)
    sketch = Sketch()
    for part in np.array_split(values, 7):
        sketch.add(part)
    for q in (0.0, 0.001, 0.15, 0.5, 0.9, 1.0):
        exact = np.quantile(values.astype(np.float64), q)
        assert exact * (1 - 1 / 2048) - 1e-40 <= sketch.quantile(q) <= exact * (1 + 1e-6) + 1e-40


def test_a_sketch_keeps_values_that_many_tokens_share():
    sketch = Sketch()
    sketch.add(np.array([0.0] * 10 + [1.0] * 90 + [-1e-7], np.float32))
    assert (sketch.quantile(0.05), sketch.quantile(0.5)) == (0.0, 1.0)


def test_sums_of_samples_against_a_loop(tmp_path, monkeypatch):
    monkeypatch.setattr("eaft_verl.analysis.blocks.ROWS", 41)
    columns = random_columns(12, 30, seed=2)
    survey = Survey(write_store(tmp_path, **columns))
    for i in range(12):
        own = columns["sample"] == i
        assert survey.tokens_S[i] == own.sum()
        assert survey.mean_nll_S[i] == pytest.approx(-columns["logprob"][own].mean(), rel=1e-6)
        conflicts = (columns["entropy"][own] <= 0.5) & (columns["logprob"][own] < math.log(0.2))
        assert survey.conflicts_S[i] == conflicts.sum()
        surprising = -columns["logprob"][own] - columns["full_entropy"][own] > 1.0
        assert survey.implausible_S[i] == (surprising.mean() > 0.5)
    assert survey.tau == pytest.approx(np.median(survey.mean_nll_S))
    base = survey.base
    assert base.quantile("mean_nll", 0.5) == pytest.approx(survey.tau)
    assert base.quantile("prob", 0.15) == pytest.approx(np.quantile(np.exp(columns["logprob"]), 0.15), rel=1e-3)


def test_a_label_is_repeated_by_the_samples_that_it_conflicts_in(tmp_path):
    """Label 5 conflicts once in each of 3 samples, label 6 ten times in one."""
    token, sample = [5, 6, *[6] * 9, 5, 5], [0, 0, *[0] * 9, 1, 2]
    survey = Survey(write_store(tmp_path, token=token, sample=sample, logprob=np.full(13, -4.0), entropy=np.zeros(13)))
    assert np.flatnonzero(survey.repeated_V).tolist() == [5]


def test_samples_without_tokens_are_no_samples(tmp_path):
    survey = Survey(write_store(tmp_path, token=[1, 2], sample=[1, 4], logprob=[-1.0, -3.0], entropy=[0.1, 0.1]))
    assert survey.samples == 2
    assert survey.tau == pytest.approx(2.0)
    assert survey.base.mean_nll.tolist() == pytest.approx([1.0, 3.0])


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_places_count_from_the_first_token_of_each_turn(tmp_path, monkeypatch, rows):
    monkeypatch.setattr("eaft_verl.analysis.blocks.ROWS", rows)
    sample, position = [0, 0, 0, 0, 0, 1, 1, 2], [7, 8, 9, 20, 21, 22, 23, 24]
    store = write_store(
        tmp_path, token=np.zeros(8), sample=sample, position=position, logprob=np.zeros(8), entropy=np.zeros(8)
    )
    found = [block.place_T.tolist() for block in blocks(store, ("sample", "position"), {})]
    assert [place for part in found for place in part] == [0, 1, 2, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("max_prob", math.nan, "max_prob is nan for token"),
        ("sum_p2", math.inf, "sum_p2 is inf"),
        ("logprob", 0.5, "logprob is 0.5 for token 7 of sample 0, allowed is"),
        ("entropy", 3.5, "allowed is -0.02 to 3.016"),
        ("token", -1, "token is -1"),
        ("argmax", 384, "argmax is 384 for token 7 of sample 0, allowed is 0 to 383"),
        ("sample", 9, "its samples are not in order"),
    ],
)
def test_a_value_that_no_distribution_has_is_named(tmp_path, column, value, said):
    columns = random_columns(3, 10) | {"token": np.full(30, 7)}
    columns[column] = np.array(columns[column])
    columns[column][2] = value
    store = write_store(tmp_path, **columns)
    with pytest.raises(DataError, match=said):
        list(blocks(store, [*columns, "position"], {}))


def test_a_short_answer_is_never_implausible(tmp_path):
    columns = {"logprob": np.full(9, -5.0), "entropy": np.full(9, 0.1), "token": np.zeros(9)}
    store = write_store(tmp_path, sample=[0] * 4 + [1] * 5, **columns)
    assert Survey(store).implausible_S.tolist() == [False, True]


@pytest.mark.parametrize(("value", "said"), [(math.nan, "nan"), (-math.inf, "-inf")])
def test_statistics_that_are_no_numbers_are_named(tmp_path, value, said):
    store = write_store(tmp_path, token=[7, 8, 9], sample=[0, 1, 1], logprob=[-1.0, -1.0, value], entropy=np.zeros(3))
    with pytest.raises(DataError, match=f"logprob is {said} for token 9 of sample 1;"):
        Survey(store)


def test_texts_have_one_code_over_blocks_and_none_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr("eaft_verl.analysis.blocks.ROWS", 2)
    source = ["b", None, "a", "b", "c"]
    store = write_store(tmp_path, token=np.zeros(5), logprob=np.zeros(5), entropy=np.zeros(5), source=source)
    texts = {"source": {}}
    codes = np.concatenate([block.codes("source") for block in blocks(store, ("source",), texts)])
    names = {code: text for text, code in texts["source"].items()}
    assert [names[code] for code in codes] == ["b", "", "a", "b", "c"]


def test_row_groups_that_were_read_are_let_go(tmp_path):
    size = 400_000
    rng = np.random.default_rng(0)
    store = write_store(
        tmp_path,
        token=rng.integers(0, 384, size),
        logprob=-rng.random(size),
        entropy=rng.random(size),
        sum_p2=rng.random(size),
    )
    file = store.path / "tokens.parquet"
    pq.write_table(pq.read_table(file), file, compression="zstd", row_group_size=20_000)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in store.batches(size=5_000)]
    assert len(held) >= 80
    assert max(held) < file.stat().st_size / 3  # reading ahead would hold all of it at once
