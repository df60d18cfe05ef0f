"""Parity with what others train, written anew from descriptions of their code, and where it must not hold.

Each peer_* takes logits [B, S, V] and labels [B, S] with -100 on untrained positions, shifts them itself and returns
a scalar. Ours gets the same tokens packed, with the shift made by index here.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.testing import assert_close

from eaft_verl.objectives import weighted_nll
from eaft_verl.recipe.objective import build_objective
from eaft_verl.tokens.logits import logit_stats
from eaft_verl.tokens.stats import TokenStats

IGNORE = -100
PARITY = {"rtol": 2e-5, "atol": 1e-6}


def shifted(logits_BSV: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Position s is judged by label s + 1; the last position by nothing."""
    return logits_BSV.flatten(0, 1), pad(labels_BS, (0, 1), value=IGNORE)[:, 1:].flatten()


def peer_llama_factory_eaft(logits_BSV: Tensor, labels_BS: Tensor, num_items: int | None, alpha: float = 1.0) -> Tensor:
    """LLaMA-Factory: everything upcast, valid rows copied, K = 20 fixed, entropy / 3.0, power alpha."""
    rows_TV, labels_T = shifted(logits_BSV.float(), labels_BS)
    valid_T = labels_T != IGNORE
    if not valid_T.any():
        return torch.tensor(0.0)
    nll_N = cross_entropy(rows_TV[valid_T], labels_T[valid_T], reduction="none")
    with torch.no_grad():
        top_NK = torch.topk(rows_TV[valid_T], k=20, dim=-1).values
        logprob_NK = top_NK - torch.logsumexp(top_NK, dim=-1, keepdim=True)
        weight_N = (-(logprob_NK.exp() * logprob_NK).sum(-1) / 3.0) ** alpha
    return (weight_N * nll_N).sum() / num_items if num_items is not None else (weight_N * nll_N).mean()


def peer_ms_swift_eaft(logits_BSV: Tensor, labels_BS: Tensor, num_items: int, alpha: float = 1.0) -> Tensor:
    """ms-swift's fork, plain path: as LLaMA-Factory, but zeros on ignored rows, so that the graph survives."""
    rows_TV, labels_T = shifted(logits_BSV.float(), labels_BS)
    nll_T = cross_entropy(rows_TV, labels_T, ignore_index=IGNORE, reduction="none")
    top_TK = rows_TV.detach().topk(20, dim=-1).values
    share_TK = top_TK.softmax(-1)
    entropy_T = -(share_TK * top_TK.log_softmax(-1)).sum(-1)
    return (nll_T * (entropy_T / 3.0).pow(alpha)).sum() / num_items


def peer_axolotl_eaft(
    logits_BSV: Tensor, labels_BS: Tensor, num_items: int | None, k: int = 20, alpha: float = 1.0, *, scaled: bool
) -> Tensor:
    """axolotl: K at most V, 1e-10 inside the logarithm; entropy in nats at first, over ln k (`scaled`) later."""
    rows_TV, labels_T = shifted(logits_BSV, labels_BS)
    valid_T = labels_T != IGNORE
    k = min(k, rows_TV.shape[-1])
    with torch.no_grad():
        share_NK = rows_TV[valid_T].topk(k, dim=-1).values.float().softmax(-1)
        entropy_N = -(share_NK * torch.log(share_NK + 1e-10)).sum(-1)
        weight_N = (entropy_N / math.log(k) if scaled else entropy_N).pow(alpha)
    weighted_N = weight_N * cross_entropy(rows_TV[valid_T], labels_T[valid_T], reduction="none")
    return weighted_N.sum() / num_items if num_items is not None else weighted_N.mean()


def peer_trl_dft(logits_BSV: Tensor, labels_BS: Tensor, num_items: int) -> Tensor:
    """TRL's loss_type="dft": -p log p with p cut off, ignored rows replaced by label 0 and then zeroed."""
    rows_TV, labels_T = shifted(logits_BSV, labels_BS)
    keep_T = labels_T != IGNORE
    logprob_T = rows_TV.log_softmax(-1).gather(-1, labels_T.where(keep_T, 0).unsqueeze(-1)).squeeze(-1)
    return (-logprob_T.exp().detach() * logprob_T * keep_T).sum() / num_items


def peer_llama_factory_dft(logits_BSV: Tensor, labels_BS: Tensor, num_items: int) -> Tensor:
    """LLaMA-Factory's DFT: weight exp(-cross-entropy) over the valid rows."""
    rows_TV, labels_T = shifted(logits_BSV.float(), labels_BS)
    nll_T = cross_entropy(rows_TV, labels_T, ignore_index=IGNORE, reduction="none")
    valid_T = labels_T != IGNORE
    return (nll_T[valid_T] * torch.exp(-nll_T[valid_T].detach())).sum() / num_items


def peer_dft_authors(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """DFT's own repository: the mean over one micro-batch's valid tokens."""
    valid = int((labels_BS[:, 1:] != IGNORE).sum())
    return peer_trl_dft(logits_BSV, labels_BS, 1) / (valid + 1e-8)


def ours(name: str, logits_BSV: Tensor, labels_BS: Tensor, num_items: int, **params: object) -> Tensor:
    """The shipped path on the same tokens."""
    objective = build_objective(name, **params)
    rows_TV = logits_BSV[:, :-1].flatten(0, 1)
    labels_T = labels_BS[:, 1:].flatten()
    mask_T = labels_T != IGNORE
    stats = logit_stats(rows_TV, labels_T.clamp(min=0), mask_T, k=objective.k)
    weight_T = objective.weight(TokenStats(-stats.nll_T.detach(), stats.entropy_T, min(objective.k, rows_TV.shape[-1])))
    return weighted_nll(stats.nll_T, weight_T, mask_T, num_items)


def batch(vocab: int = 60, dtype: torch.dtype = torch.float32, trained: float = 0.6) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(11)
    sharpness = torch.rand(3, 9, 1, generator=source) * 6
    labels_BS = torch.randint(vocab, (3, 9), generator=source)
    ignored_BS = torch.rand(3, 9, generator=source) >= trained
    return (torch.randn(3, 9, vocab, generator=source) * sharpness).to(dtype), labels_BS.masked_fill(ignored_BS, IGNORE)


def value_and_grad(loss_of, logits_BSV: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits_BSV.clone().requires_grad_()
    loss = loss_of(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


PEERS = {
    "llama_factory": (peer_llama_factory_eaft, {}, "eaft_llamafactory", {}),
    "llama_factory alpha 2": (peer_llama_factory_eaft, {"alpha": 2.0}, "eaft_llamafactory", {"power": 2.0}),
    "ms_swift": (peer_ms_swift_eaft, {}, "eaft_llamafactory", {}),
    "ms_swift alpha 3": (peer_ms_swift_eaft, {"alpha": 3.0}, "eaft_llamafactory", {"power": 3.0}),
    "axolotl": (peer_axolotl_eaft, {"scaled": False}, "eaft_axolotl", {}),
    "axolotl k 7": (peer_axolotl_eaft, {"scaled": False, "k": 7}, "eaft_axolotl", {"k": 7}),
    "axolotl later": (peer_axolotl_eaft, {"scaled": True}, "eaft", {}),
    "axolotl later alpha 2": (peer_axolotl_eaft, {"scaled": True, "alpha": 2.0}, "eaft_2", {}),
    "trl dft": (peer_trl_dft, {}, "dft", {}),
    "llama_factory dft": (peer_llama_factory_dft, {}, "dft", {}),
}


@pytest.mark.parametrize("case", PEERS)
def test_loss_and_gradient_equal_the_peers(case):
    peer, peer_params, name, params = PEERS[case]
    logits_BSV, labels_BS = batch()
    theirs, theirs_BSV = value_and_grad(lambda z: peer(z, labels_BS, 15, **peer_params), logits_BSV)
    value, grad_BSV = value_and_grad(lambda z: ours(name, z, labels_BS, 15, **params), logits_BSV)
    assert theirs > 0.01
    assert_close(value, theirs, **PARITY)
    assert_close(grad_BSV, theirs_BSV, **PARITY)


def test_presets_differ_by_their_normaliser_only():
    logits_BSV, labels_BS = batch(dtype=torch.float64)
    paper, rounded, nats = (ours(n, logits_BSV, labels_BS, 15) for n in ("eaft", "eaft_llamafactory", "eaft_axolotl"))
    assert_close(rounded / paper, torch.tensor(math.log(20) / 3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert_close(nats / paper, torch.tensor(math.log(20), dtype=torch.float64), rtol=1e-12, atol=0)


def test_fewer_finite_logits_than_k_stay_finite_here():
    logits_BSV, labels_BS = batch()
    logits_BSV[..., 2:] = -math.inf
    logits_BSV[..., :2] = 0.0
    labels_BS = labels_BS.clamp(max=1)
    assert peer_llama_factory_eaft(logits_BSV, labels_BS, 15).isnan()
    assert peer_ms_swift_eaft(logits_BSV, labels_BS, 15).isnan()
    value, grad_BSV = value_and_grad(lambda z: ours("eaft_llamafactory", z, labels_BS, 15), logits_BSV)
    trained = int((labels_BS[:, 1:] != IGNORE).sum())
    assert float(value) == pytest.approx(trained * math.log(2) ** 2 / 3.0 / 15, rel=1e-5)
    assert grad_BSV.isfinite().all()
    assert_close(value, peer_axolotl_eaft(logits_BSV, labels_BS, 15, scaled=False) / 3.0, **PARITY)


def test_a_vocabulary_smaller_than_k_trains_here():
    logits_BSV, labels_BS = batch(vocab=7)
    with pytest.raises(RuntimeError):
        peer_llama_factory_eaft(logits_BSV, labels_BS, 15)
    for name, scaled in (("eaft", True), ("eaft_axolotl", False)):
        assert_close(
            ours(name, logits_BSV, labels_BS, 15),
            peer_axolotl_eaft(logits_BSV, labels_BS, 15, scaled=scaled),
            **PARITY,
        )


def test_an_all_masked_micro_batch_can_run_backward_here():
    logits_BSV, labels_BS = batch(trained=0.0)
    with pytest.raises(RuntimeError, match="does not require grad"):
        value_and_grad(lambda z: peer_llama_factory_eaft(z, labels_BS, 15), logits_BSV)
    assert peer_axolotl_eaft(logits_BSV, labels_BS, None, scaled=False).isnan()
    for name in ("eaft_llamafactory", "eaft_axolotl", "eaft", "dft"):
        value, grad_BSV = value_and_grad(lambda z, name=name: ours(name, z, labels_BS, 15), logits_BSV)
        assert value == 0 and not grad_BSV.any()


def test_bfloat16_logits_are_upcast_before_the_entropy_here():
    logits_BSV, labels_BS = batch(dtype=torch.bfloat16, trained=1.0)
    rows_TV = logits_BSV.flatten(0, 1)
    truth_T = peer_entropy(rows_TV.double())
    stats = logit_stats(rows_TV, labels_BS.flatten(), torch.ones(27, dtype=torch.bool))
    assert_close(stats.entropy_T.double(), truth_T, rtol=0, atol=1e-5)
    assert (peer_entropy(rows_TV).double() - truth_T).abs().max() > 5e-3  # what a path without the upcast pays
    assert_close(
        ours("eaft_llamafactory", logits_BSV, labels_BS, 24),
        peer_llama_factory_eaft(logits_BSV, labels_BS, 24),
        **PARITY,
    )


def peer_entropy(rows_TV: Tensor) -> Tensor:
    top_TK = rows_TV.topk(20, dim=-1).values
    return -(top_TK.softmax(-1) * top_TK.log_softmax(-1)).sum(-1)


def test_a_mean_of_micro_batch_means_is_not_the_batch_mean():
    logits_BSV, labels_BS = batch(trained=1.0)
    labels_BS[0, 2:] = IGNORE
    parts = [(logits_BSV[i : i + 1], labels_BS[i : i + 1]) for i in range(3)]
    whole = ours("dft", logits_BSV, labels_BS, 17)
    assert_close(sum(ours("dft", *part, 17) for part in parts), whole, rtol=1e-6, atol=0)
    assert_close(whole, peer_dft_authors(logits_BSV, labels_BS), rtol=1e-6, atol=0)
    theirs = sum(peer_dft_authors(*part) for part in parts) / 3
    assert abs(theirs / whole - 1) > 0.05
