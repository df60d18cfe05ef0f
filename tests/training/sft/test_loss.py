"""The two calls of the loss and its guard, without an engine."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batch_examples import EXAMPLES, both_calls
from objective_fixtures import Tokens, random_tokens, ready, token_stats
from verl.utils import tensordict_utils as tu

from eaft_verl.objectives import OBJECTIVES, Finch, Gift, Objective, Sft
from eaft_verl.recipe.objective import build_objective
from eaft_verl.tokens.logits import logit_stats
from eaft_verl.training.sft import loss
from eaft_verl.training.sft.batches import make_batch
from eaft_verl.training.sft.guard import FORMULAS, check_statistics, check_weight
from eaft_verl.training.sft.loss import BATCH_FLAGS, TokenLoss, shifted
from eaft_verl.training.sft.order import PADDING


def micro_batch(rows: tuple[int, ...] = (0, 1, 2), **flags: Any) -> Any:
    batch = make_batch(EXAMPLES, list(rows), {**BATCH_FLAGS, "dp_size": 1, **flags}, None)
    tu.assign_non_tensor(batch, batch_num_tokens=max(1, int(batch["loss_mask"].values().sum())))
    return batch


def logits_of(batch: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(1, len(batch["input_ids"].values()), 50) * 3).requires_grad_()


def test_the_guard_passes_once_and_the_table_keeps_the_trained_tokens() -> None:
    batch = micro_batch()
    token_loss = TokenLoss(build_objective("eaft"))
    both_calls(token_loss, batch, logits_of(batch)).backward()
    assert token_loss.guarded
    assert len(token_loss.table.gather(None)) == sum(sum(EXAMPLES[row].loss_mask) for row in (0, 1, 2))


@pytest.mark.parametrize("name", ["nll_T", "entropy_T", "entropy20_T", "sum_p2_T"])
def test_the_guard_refuses_a_wrong_statistic(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss.logit_stats

    def wrong(*args: Any, **kwargs: Any) -> Any:
        stats = right(*args, **kwargs)
        return stats._replace(**{name: getattr(stats, name) * 1.1})

    monkeypatch.setattr(loss, "logit_stats", wrong)
    batch = micro_batch()
    with pytest.raises(RuntimeError, match=rf"objective guard: {name} differs from its definition"):
        both_calls(TokenLoss(build_objective("deft")), batch, logits_of(batch))


def guarded(objective: Objective, logits_TV: torch.Tensor) -> None:
    """The guard's look at the weights of some tokens."""
    count = len(logits_TV)
    tokens = Tokens(logits_TV, torch.arange(count) % 27, torch.ones(count, dtype=torch.bool), torch.arange(count) % 4)
    made = logit_stats(logits_TV, tokens.labels_T, tokens.mask_T, k=objective.k, sum_p2=True, full_entropy=True)
    stats = token_stats(objective, tokens, made)
    check_weight(objective, stats, objective.weight(stats), tokens.mask_T)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_guard_knows_every_built_in_objective(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EAFT whose weights are all one is SFT; the formula it is compared with is written a second time."""
    objective, logits_TV = ready(name), random_tokens(3).logits_TV
    assert type(objective) in FORMULAS
    guarded(objective, logits_TV)
    other = 0.5 if isinstance(objective, Sft | Finch | Gift) else 1.0  # a gift of 20 nats is a switch
    monkeypatch.setattr(type(objective), "weight", lambda self, stats: stats.logprob_T * 0 + other)
    with pytest.raises(RuntimeError, match=rf"weight of {type(objective).__name__} differs from its definition"):
        guarded(objective, logits_TV)


def test_the_guard_forms_the_entropy_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path and its yardstick share topk_entropy: a mistake there is in both."""
    monkeypatch.setattr("eaft_verl.tokens.logits.topk_entropy", lambda top: top.softmax(-1).square().sum(-1))
    batch = micro_batch()
    with pytest.raises(RuntimeError, match="entropy_T differs from its definition"):
        both_calls(TokenLoss(build_objective("eaft")), batch, logits_of(batch))


def test_the_guard_refuses_a_wrong_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "weighted_nll", lambda nll, weight, mask, count: nll.where(mask, 0.0).sum() / count)
    batch = micro_batch()
    with pytest.raises(RuntimeError, match="objective guard: loss differs from its definition"):
        both_calls(TokenLoss(build_objective("eaft")), batch, logits_of(batch))


def test_a_missing_hook_output_is_an_error() -> None:
    batch = micro_batch()
    with pytest.raises(RuntimeError, match="verl did not call the logits hook"):
        TokenLoss(build_objective("sft"))(model_output={"log_probs": batch["loss_mask"]}, data=batch)


@pytest.mark.parametrize(("name", "statistic"), [("talr", "talr.tau")])
def test_a_missing_batch_statistic_is_an_error(name: str, statistic: str) -> None:
    batch = micro_batch()
    with pytest.raises(ValueError, match=f"{statistic} is not set"):
        both_calls(TokenLoss(build_objective(name)), batch, logits_of(batch))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_pass_that_trains_nothing_needs_nothing_of_the_driver(name: str) -> None:
    """As the check of every export makes it."""
    batch = micro_batch()
    with torch.no_grad():
        assert both_calls(TokenLoss(ready(name)), batch, logits_of(batch)).isfinite()


def test_a_masked_micro_batch_has_a_connected_zero_loss() -> None:
    batch = micro_batch((PADDING, PADDING))
    logits = logits_of(batch)
    value = both_calls(TokenLoss(build_objective("eaft")), batch, logits)
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


def test_nan_logits_of_untrained_tokens_do_not_leak() -> None:
    batch = micro_batch()
    logits = logits_of(batch).detach()
    mask = shifted(batch)[1]
    logits[0, ~mask] = math.nan
    logits.requires_grad_()
    value = both_calls(TokenLoss(build_objective("eaft")), batch, logits)
    value.backward()
    assert math.isfinite(value.item()) and torch.isfinite(logits.grad).all()


def test_the_guard_waits_for_a_trained_token(monkeypatch: pytest.MonkeyPatch) -> None:
    token_loss = TokenLoss(build_objective("eaft"))
    padding, batch = micro_batch((PADDING, PADDING)), micro_batch()
    both_calls(token_loss, padding, logits_of(padding))
    monkeypatch.setattr(loss, "weighted_nll", lambda nll, weight, mask, count: nll.where(mask, 0.0).sum() / count)
    with pytest.raises(RuntimeError, match="objective guard"):
        both_calls(token_loss, batch, logits_of(batch))


def test_the_loss_can_be_sent_to_the_workers() -> None:
    import pickle

    sent = pickle.loads(pickle.dumps(TokenLoss(build_objective("eaft", k=7))))
    assert isinstance(sent, TokenLoss) and sent.objective == build_objective("eaft", k=7)
    assert SimpleNamespace(**vars(sent)).guarded is False


@pytest.mark.parametrize("name", ["sft", "dft"])
def test_rows_are_weighted_whatever_the_objective(name: str) -> None:
    """Loss = sum over rows of weight * their part / trained tokens of all: by hand from the parts of single rows."""
    rows, weights = [EXAMPLES[0], EXAMPLES[1]], (2.0, 0.5)
    weighted = [replace(row, weight=weight) for row, weight in zip(rows, weights, strict=True)]
    batch = make_batch(weighted, [0, 1], {**BATCH_FLAGS, "dp_size": 1}, None)
    trained = [sum(row.loss_mask) for row in rows]
    tu.assign_non_tensor(batch, batch_num_tokens=sum(trained))
    logits = logits_of(batch)
    whole = both_calls(TokenLoss(build_objective(name)), batch, logits)
    parts, start = [], 0
    for row in rows:
        one = make_batch([row], [0], {**BATCH_FLAGS, "dp_size": 1}, None)
        tu.assign_non_tensor(one, batch_num_tokens=sum(trained))
        part = logits[:, start : start + len(row.input_ids)].detach().requires_grad_()
        parts.append(both_calls(TokenLoss(build_objective(name)), one, part).item())
        start += len(row.input_ids)
    assert whole.item() == pytest.approx(2.0 * parts[0] + 0.5 * parts[1], rel=1e-5)


@pytest.mark.parametrize("odd", [math.nan, math.inf], ids=str)
def test_the_guard_does_not_blame_the_objective_for_a_diverged_model(odd: float) -> None:
    """One row of the logits is not finite: that row has no definition, the others have theirs."""
    logits, labels, mask = torch.randn(3, 40), torch.tensor([1, 2, 3]), torch.ones(3, dtype=torch.bool)
    logits[1, 5] = odd
    stats = logit_stats(logits.clone(), labels, mask)
    assert not stats.entropy_T[1].isfinite()
    check_statistics(stats, logits, labels, mask, Sft())
    wrong = stats._replace(entropy_T=stats.entropy_T + torch.tensor([0.0, 0.0, 0.1]))
    with pytest.raises(RuntimeError, match="entropy_T differs"):
        check_statistics(wrong, logits, labels, mask, Sft())
