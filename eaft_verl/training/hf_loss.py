"""Our objectives under Hugging Face's Trainer or TRL's SFTTrainer, in two lines:

    from eaft_verl.training.hf_loss import hf_loss
    trainer = SFTTrainer(model, ..., compute_loss_func=hf_loss("eaft"))

The loss is sum(w * nll) / num_items_in_batch, which Trainer counts over all micro-batches of an update and all
processes: the same normalisation as verl's, whatever the accumulation. With `model=` the head's product and the loss
are one, and no micro-batch's logits exist. The first loss is compared with the definitions, as in an arm.
"""

from typing import Any

import torch
from torch import Tensor

from eaft_verl.objectives import Objective, weighted_nll
from eaft_verl.recipe.objective import build_stateless
from eaft_verl.tokens.head import Head, head_statistics
from eaft_verl.tokens.logits import LogitStats, logit_stats
from eaft_verl.tokens.stats import TokenStats
from eaft_verl.training.output_head import output_head
from eaft_verl.training.sft.guard import check_head, check_loss, check_statistics, check_weight

IGNORED = -100  # label of a token that is not trained


def hf_loss(name: str, *, model: Any = None, **params: Any) -> "HfLoss":
    """The named objective as a `compute_loss_func`; params: as in a recipe.

    model: a causal language model whose head is to be fused with the loss while it trains (not sharded ones: FSDP,
    ZeRO 3). ValueError for an objective that needs what a loss function is not given, or a head that cannot be fused.
    """
    loss = HfLoss(build_stateless(name, **params))
    if model is not None:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        if isinstance(linear := output_head(base), str):
            raise ValueError(f"hf_loss: this model's head cannot be fused: {linear}; leave model= out")
        loss.head = _HiddenHead(linear)
    return loss


class HfLoss:
    """Called as `loss(outputs, labels, num_items_in_batch=...)`: scalar with its graph. Labels are not shifted yet."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.guarded = objective, False
        self.head: _HiddenHead | None = None

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        made = outputs["logits"]  # [B, S, V], or hidden states [B, S, D] from a fused head
        if labels is None or labels.shape != made.shape[:2]:
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(f"hf_loss: labels {found} do not belong to logits {tuple(made.shape)}")
        ahead_BS = torch.full_like(labels, IGNORED)
        ahead_BS[:, :-1] = labels[:, 1:]
        mask_T = (ahead_BS != IGNORED).flatten()
        labels_T = ahead_BS.flatten().where(mask_T, 0)
        count = mask_T.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=made.device)
        return self._loss(made.flatten(0, 1), labels_T, mask_T, count.clamp(min=1))

    def _loss(self, made_TX: Tensor, labels_T: Tensor, mask_T: Tensor, count: Tensor) -> Tensor:
        guard = torch.is_grad_enabled() and not self.guarded
        if self.head is not None and self.head.given():
            made, vocab = self._fused(self.head, made_TX, labels_T, mask_T, guard), self.head.vocab
        else:
            made, vocab = self._plain(made_TX, labels_T, mask_T, guard), made_TX.shape[-1]
        stats = self._token_stats(made, vocab)
        weight_T = self.objective.weight(stats)
        loss = weighted_nll(made.nll_T, weight_T, mask_T, count)
        if guard:
            check_weight(self.objective, stats, weight_T, mask_T)
            nll, ones_T = {"nll": made.nll_T}, torch.ones_like(weight_T)
            check_loss(loss, self.objective, nll, weight_T, ones_T, mask_T, float(count))
            self.guarded = bool(mask_T.any() & loss.isfinite())
        return loss

    def _token_stats(self, made: LogitStats, vocab: int) -> TokenStats:
        return TokenStats(
            logprob_T=-made.nll_T.detach(),
            entropy_T=made.entropy_T,
            k=min(self.objective.k, vocab),
            sum_p2_T=made.sum_p2_T,
            full_entropy_T=made.full_entropy_T,
        )

    def _plain(self, logits_TV: Tensor, labels_T: Tensor, mask_T: Tensor, guard: bool) -> LogitStats:
        made = logit_stats(logits_TV, labels_T, mask_T, k=self.objective.k, **self.objective.extras)
        if guard:
            check_statistics(made, logits_TV, labels_T, mask_T, self.objective)
        return made

    def _fused(self, of: "_HiddenHead", hidden_TD: Tensor, labels_T: Tensor, mask_T: Tensor, guard: bool) -> LogitStats:
        head, vocab = of.matrices(), of.vocab
        made = head_statistics(
            hidden_TD,
            head,
            labels_T,
            mask_T,
            gate=lambda stats, rows: self.objective.weight(self._token_stats(stats, vocab)),
            k=self.objective.k,
            sum_p2=self.objective.extras["sum_p2"],
            full_entropy=self.objective.extras["full_entropy"],
        )
        if guard:
            check_head(made, hidden_TD, head, labels_T, mask_T, self.objective)
        return made


class _HiddenHead:
    """In place of a head's forward: hands hidden states through while the model trains, logits otherwise."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.linear, self.plain, self.handed = linear, linear.forward, False
        self.vocab = linear.out_features
        vars(linear)["forward"] = self

    def __call__(self, hidden_BSD: Tensor) -> Tensor:
        self.handed = torch.is_grad_enabled() and self.linear.training
        return hidden_BSD if self.handed else self.plain(hidden_BSD)

    def given(self) -> bool:
        """Whether the coming loss is given hidden states."""
        return self.handed and torch.is_grad_enabled()

    def matrices(self) -> Head:
        """Weight and bias; ValueError where this process has only a part of them."""
        if len(self.linear.weight) != self.vocab or type(self.linear.weight) is not torch.nn.Parameter:
            raise ValueError("hf_loss: the head's weight is sharded (FSDP, ZeRO 3); leave model= out of hf_loss")
        return Head(self.linear.weight, self.linear.bias)
