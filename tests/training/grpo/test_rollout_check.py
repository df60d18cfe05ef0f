"""The comparison that a GRPO run makes before its first step, on log-probabilities made by hand."""

import math

import pytest
import torch

from eaft_verl.errors import RunError
from eaft_verl.training.grpo.self_check import RolloutCheck, Sampled, compare, require_equal

SAMPLED: list[Sampled] = [([5, 6, 7], [1, 2], [-1.0, -3.0]), ([5], [1, 2], [-2.0, -4.0])]
ENGINE = [torch.tensor(values, dtype=torch.float64) for values in ([9.0, 8.0, 1.0, 3.0], [2.0, 4.0])]


def checked(engine: list[torch.Tensor], plain: list[torch.Tensor]) -> RolloutCheck:
    return compare(SAMPLED, engine, plain, "" if plain else "no memory", 1e-3)


def test_equal_log_probabilities_pass_whatever_the_prompt() -> None:
    found = checked(2 * ENGINE, ENGINE)
    assert (found.rows, found.tokens, found.difference, found.plain_difference) == (2, 4, 0.0, 0.0)
    assert found.rollout == found.trainer == found.plain == 2.5
    require_equal(found)
    assert found.line.startswith("self-check: 2 rows, 4 sampled tokens: NLL rollout 2.50000, trainer 2.50000, plain tr")
    assert "plain transformers 2.50000; " in found.line


def test_of_several_servers_the_line_says_how_many_rows_the_plain_mean_is_of() -> None:
    found = compare(3 * SAMPLED, 3 * ENGINE, 2 * ENGINE, "", 1e-3)
    assert found.rows == 6 and "plain transformers 2.50000 of the first 4; a row differs by 0 " in found.line


def test_every_rank_and_every_row_is_compared() -> None:
    other = [ENGINE[0], ENGINE[1] + torch.tensor([0.0, 0.004], dtype=torch.float64)]
    found = checked([*ENGINE, *other], [])
    assert found.difference == pytest.approx(0.002) and found.plain_difference is None
    assert "no plain pass: no memory" in found.line
    with pytest.raises(
        RunError, match=r"another model than the trainer trains: NLL 2\.50000 and 2\.50050 of 4 sampled"
    ):
        require_equal(found)


def test_the_trainer_is_named_where_it_is_what_differs_from_transformers() -> None:
    """Also where only a prompt's tokens differ."""
    plain = [ENGINE[0] + torch.tensor([0.1, 0.0, 0.0, 0.0], dtype=torch.float64), ENGINE[1]]
    found = checked(ENGINE, plain)
    assert found.plain_difference == pytest.approx(0.025) and found.difference == 0.0
    with pytest.raises(RunError, match="the trainer computes another model than transformers does"):
        require_equal(found)


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(RunError, match="self-check"):
        require_equal(checked([torch.full_like(one, math.nan) for one in ENGINE], []))
