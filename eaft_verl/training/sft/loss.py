"""The loss that verl's engine calls, twice per micro-batch, through its public logits hook.

With `distillation_use_topk` in the batch the engine first calls `loss(student_logits=[1, T, V], data=micro_batch)` and
gathers each returned [1, T] tensor into `model_output`, then calls `loss(model_output=..., data=...)` for the value.
`distillation_only` makes it skip its own log-probabilities, which are bfloat16 on CPU and in determinism mode.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.utils.ulysses import slice_input_tensor

from eaft_verl.objectives import Anchor, Objective, Psft, present, weighted_nll
from eaft_verl.tokens.head import Gate, Head, head_statistics
from eaft_verl.tokens.logits import Distribution, LogitStats, asked, logit_stats
from eaft_verl.tokens.reference_kl import TopReference, reference_kl
from eaft_verl.tokens.stats import TokenStats
from eaft_verl.training.sft.guard import check_anchor, check_head, check_loss, check_statistics, check_weight
from eaft_verl.training.sft.step_metrics import TokenTable

BATCH_FLAGS: dict[str, Any] = {
    "distillation_use_topk": True,
    "distillation_only": True,
    "use_fused_kernels": False,
    "temperature": 1.0,  # any other would change the gate
    "pad_mode": DatasetPadMode.NO_PADDING,
}
ANCHOR_FIELDS = ("anchor_ids", "anchor_logprob", "anchor_tail")  # in the batch: a TopReference per row
STATISTICS = ("logprob", "entropy", "sum_p2", "full_entropy")  # of TokenStats, those that a model gives
ANY_STATE = {"tau": 1.0, "progress": 1.0}  # for passes whose weights nobody reads
DUAL_CLIP = 10.0  # verl's bound for negative advantages: without effect at advantage 1


class LogitsHook:
    """What verl's engine calls twice: `_statistics` of the logits, then `_loss` of what was gathered.

    `reference`: the worker's own, from a micro-batch to the frozen model's logits; set there, never sent. A hook that
    `reads_statistics` gives `_statistics` its own `channels` of the fused head, where there is one, instead of logits.
    """

    def __init__(self) -> None:
        self.table = TokenTable()
        self.reference: Callable[[TensorDict], Tensor] | None = None
        self.fused = False  # whether the model's output is `channels` from its head instead of logits; set there
        self.vocab = 0  # rows of that head

    def __call__(
        self,
        model_output: dict[str, Tensor] | None = None,
        data: TensorDict | None = None,
        dp_group: Any = None,
        student_logits: Tensor | None = None,
    ) -> Any:
        assert data is not None
        if student_logits is not None:
            return self._statistics(student_logits.squeeze(0), data)
        assert model_output is not None
        return self._loss(model_output, data), {}

    def reads_statistics(self, data: TensorDict) -> bool:
        """Whether this micro-batch can do without its logits."""
        return False

    def channels(self, hidden_TD: Tensor, head: Head, data: TensorDict) -> Tensor:
        """What the head gives in place of logits, [T, C]; the last channel is `vocab`, see `unchanged`."""
        raise TypeError(f"{type(self).__name__} defines no channels()")

    def unchanged(self, channels_TC: Tensor) -> Sequence[Tensor]:
        """The channels, [T] each, but the last; RuntimeError where the model changed them on the way."""
        *made, vocab_T = channels_TC.unbind(-1)
        if channels_TC.dtype != torch.float32 or bool((vocab_T != self.vocab).any()):
            raise RuntimeError("the model changes its logits after its head: set fused_head=false in the recipe")
        return made

    def _statistics(self, logits_TV: Tensor, data: TensorDict) -> dict[str, Tensor]:
        """Named tensors [1, T] from the logits [T, V] of this rank's tokens."""
        raise TypeError(f"{type(self).__name__} defines no _statistics()")

    def _loss(self, model_output: dict[str, Tensor], data: TensorDict) -> Tensor:
        """Scalar from the gathered tensors."""
        raise TypeError(f"{type(self).__name__} defines no _loss()")


class TokenLoss(LogitsHook):
    """The loss of one objective, with the statistics of every trained token kept for the step's metrics."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.guarded = False

    def reads_statistics(self, data: TensorDict) -> bool:
        """It is packed, and no anchor is computed from them."""
        return is_packed(data) and (self.objective.divergence is None or not torch.is_grad_enabled())

    def channels(self, hidden_TD: Tensor, head: Head, data: TensorDict) -> Tensor:
        """[T, 7]: the fields of LogitStats, and the size of the vocabulary."""
        labels_T, mask_T = (local_shard(part, data) for part in shifted(data))
        gate, objective = self.gate(data, self.vocab), self.objective
        asked_for: dict[str, Any] = dict(objective.extras)
        made = head_statistics(hidden_TD, head, labels_T, mask_T, gate=gate, k=objective.k, **asked_for)
        if not self.guarded:
            check_head(made, hidden_TD, head, labels_T, mask_T, objective)
        return channels(made, self.vocab)

    def gate(self, data: TensorDict, vocab: int) -> Gate | None:
        """The weights that `_loss` is going to give these tokens, up to a factor; None where it is no weighted sum."""
        if isinstance(self.objective, Psft):
            return None
        lengths_B = data["input_ids"].offsets().diff()
        row_weight_T, sample_weight_T = (
            local_shard(data[name].repeat_interleave(lengths_B), data) for name in ("row_weight", "sample_weight")
        )
        base = {name: local_shard(part, data) for name, part in self._base(data).items()}

        def weight(made: LogitStats, rows: Tensor) -> Tensor:
            values = named(made) | {name: part[rows] for name, part in base.items()}
            stats = self._token_stats(values, vocab, sample_weight_T[rows], data)
            return self.objective.weight(stats) * row_weight_T[rows]

        return weight

    def _statistics(self, logits_TV: Tensor, data: TensorDict) -> dict[str, Tensor]:
        if self.fused:
            made = asked(LogitStats(*self.unchanged(logits_TV)), **self.objective.extras)
            vocab = self.vocab
        else:
            labels_T, mask_T = (local_shard(part, data) for part in shifted(data))
            made = logit_stats(logits_TV, labels_T, mask_T, k=self.objective.k, **self.objective.extras)
            vocab = logits_TV.shape[-1]
            if not self.guarded:
                check_statistics(made, logits_TV, labels_T, mask_T, self.objective)
        values = named(made) | {"vocab": torch.full_like(made.nll_T, vocab)}
        if (anchor := self.objective.divergence) is not None and torch.is_grad_enabled():
            values["anchor_kl"] = self._anchor(anchor, logits_TV, labels_T, mask_T, data)
        return {name: value[None] for name, value in values.items()}

    def _anchor(self, anchor: Anchor, logits_TV: Tensor, labels_T: Tensor, mask_T: Tensor, data: TensorDict) -> Tensor:
        reference: Tensor | TopReference
        if anchor.full:
            reference = present("anchor: reference model", self.reference)(data)
        else:
            ids, logprob, tail = (local_shard(data[name].values(), data) for name in ANCHOR_FIELDS)
            reference = TopReference(ids, logprob, tail)
        kl_T = reference_kl(anchor.kind, logits_TV, reference, mask_T, labels_T)
        if not self.guarded:
            check_anchor(anchor.kind, kl_T, logits_TV, reference, labels_T, mask_T)
        return kl_T

    def _loss(self, model_output: dict[str, Tensor], data: TensorDict) -> Tensor:
        if "nll" not in model_output:
            raise RuntimeError(
                "verl did not call the logits hook: the objective would not be the one that trains. Switch off "
                "what keeps logits from being computed (fused kernels, liger cross-entropy)"
            )
        values = {name: tensor.values() for name, tensor in model_output.items()}
        if "old_logprob" in self.objective.needs:
            values["old_logprob"] = self._old_logprob(values["nll"], data)
        _, mask_T = shifted(data)
        lengths_B = data["input_ids"].offsets().diff()
        sample_weight_T = data["sample_weight"].repeat_interleave(lengths_B)
        stats = self._token_stats(values | self._base(data), int(values["vocab"][0]), sample_weight_T, data)
        weight_T = self.objective.weight(stats)
        if not self.guarded:
            check_weight(self.objective, stats, weight_T, mask_T)
        anchor_weight_T = self.objective.anchor_weight(weight_T)
        weight_T = weight_T * _state(data).get("weight_scale", 1.0) * data["row_weight"].repeat_interleave(lengths_B)
        num_tokens = data["batch_num_tokens"] / data["dp_size"]  # FSDP averages gradients over dp_size ranks
        loss = self._total(values, weight_T, anchor_weight_T, mask_T, num_tokens)
        if not self.guarded and torch.is_grad_enabled():
            check_loss(loss, self.objective, values, weight_T, anchor_weight_T, mask_T, num_tokens)
            self.guarded = bool(mask_T.any() & loss.isfinite())  # nothing was compared on padding or NaN
        self.table.add(mask_T, lengths_B, weight_T, **values)
        return loss * (loss.detach() * 0 + 1)  # by 1, or by NaN where it is not finite: no update is made from it

    def _total(
        self, values: dict[str, Tensor], weight_T: Tensor, anchor_weight_T: Tensor, mask_T: Tensor, num_tokens: float
    ) -> Tensor:
        if isinstance(self.objective, Psft):
            loss = policy_loss(self.objective, -values["nll"], values["old_logprob"], mask_T, num_tokens)
        else:
            loss = weighted_nll(values["nll"], weight_T, mask_T, num_tokens)
        anchor = self.objective.divergence
        if anchor is not None and torch.is_grad_enabled():  # a forward pass alone asks for the objective's statistics
            loss = loss + anchor.coef * weighted_nll(values["anchor_kl"], anchor_weight_T, mask_T, num_tokens)
        return loss

    def _old_logprob(self, nll_T: Tensor, data: TensorDict) -> Tensor:
        old_logprob = data.get("old_logprob", None)
        if old_logprob is None and not torch.is_grad_enabled():
            return -nll_T.detach()
        return present("psft: old_logprob in the batch", old_logprob).values()

    def _base(self, data: TensorDict) -> dict[str, Tensor]:
        """{'base_' + statistic: packed [T]} of an objective whose weights are the starting model's."""
        if self.objective.stats != "base":
            return {}
        found = {name: data.get(f"base_{name}", None) for name in base_columns(self.objective)}
        if not torch.is_grad_enabled() and any(part is None for part in found.values()):
            return {}  # held-out rows, of which only what the model says is wanted
        return {f"base_{name}": present(f"base_{name} in the batch", part).values() for name, part in found.items()}

    def _token_stats(
        self, values: dict[str, Tensor], vocab: int, sample_weight_T: Tensor, data: TensorDict
    ) -> TokenStats:
        current = {**values, "logprob": -values["nll"].detach()}
        whose = {name: values.get(f"base_{name}", current.get(name)) for name in STATISTICS}
        return TokenStats(
            logprob_T=present("log-probability", whose["logprob"]),
            entropy_T=present("entropy", whose["entropy"]),
            k=min(self.objective.k, vocab),
            sum_p2_T=whose["sum_p2"],
            full_entropy_T=whose["full_entropy"],
            sample_weight_T=sample_weight_T if "sample_weight" in self.objective.needs else None,
            tau=_state(data).get("tau"),
            progress=_state(data).get("progress"),
            old_logprob_T=values.get("old_logprob"),
        )


def base_columns(objective: Objective) -> list[str]:
    """What the weights of an objective with stats=base are made of."""
    return [name for name in STATISTICS if objective.extras.get(name, True)]


def named(made: LogitStats) -> dict[str, Tensor]:
    """The statistics that are there, as the values of a model's output."""
    return {name.removesuffix("_T"): part for name, part in made._asdict().items() if part is not None}


def channels(made: LogitStats | Distribution, vocab: int) -> Tensor:
    """Statistics as the output of a head [T, C]: their fields, and in every row the size of the vocabulary, by which
    the reader sees that the model handed them through as they were."""
    values = [torch.zeros_like(made.nll_T) if part is None else part.to(made.nll_T.dtype) for part in made]
    return torch.stack([*values, torch.full_like(made.nll_T, vocab)], dim=-1)


def policy_loss(objective: Psft, logprob_T: Tensor, old_T: Tensor, mask_T: Tensor, num_tokens: float) -> Tensor:
    """verl's clipped policy loss at advantage 1, summed over trained tokens / num_tokens; carries the gradient."""
    settings = OmegaConf.create(
        {
            "clip_ratio": objective.clip_low,
            "clip_ratio_low": objective.clip_low,
            "clip_ratio_high": objective.clip_high,
            "clip_ratio_c": DUAL_CLIP,
            "global_batch_info": {"dp_size": 1, "batch_num_tokens": num_tokens},
        }
    )
    advantages = torch.ones_like(logprob_T)[None]
    loss, _ = compute_policy_loss_vanilla(
        old_T[None], logprob_T[None], advantages, mask_T[None].to(logprob_T.dtype), "token-mean", settings
    )
    return loss


def is_packed(data: TensorDict) -> bool:
    """Whether the rows of this micro-batch stand one behind the other, without padding."""
    return bool(tu.get_non_tensor_data(data, "use_remove_padding", True))


def local_shard(values_T: Tensor, data: TensorDict) -> Tensor:
    """This rank's part of a packed per-token tensor [T, ...] under sequence parallelism, padded as the logits are."""
    if tu.get_non_tensor_data(data, "sp_size", 1) == 1:
        return values_T
    return slice_input_tensor(values_T[None], dim=1).squeeze(0)


def shifted(data: TensorDict) -> tuple[Tensor, Tensor]:
    """Labels and loss mask at the position whose logits predict them, packed: ([T] int64, [T] bool).

    verl's layout: logits[t] predict input_ids[t + 1]. The roll wraps into the next sequence, so the last position of
    every sequence is masked.
    """
    labels_T = torch.roll(data["input_ids"].values(), -1)
    mask_T = torch.roll(data["loss_mask"].values(), -1).bool()
    mask_T[data["input_ids"].offsets()[1:] - 1] = False
    return labels_T, mask_T


def _state(data: TensorDict) -> dict[str, float]:
    """What the driver knows of the global batch and a micro-batch cannot: tau, progress, weight_scale.

    A pass that trains nothing needs none of it: nobody reads its weights, unless the driver has given a state.
    """
    given = tu.get_non_tensor_data(data, "objective_state", None) or {}
    return given if torch.is_grad_enabled() else {**ANY_STATE, **given}
