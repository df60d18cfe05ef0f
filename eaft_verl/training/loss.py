"""The loss that verl's engine calls, twice per micro-batch, through its public logits hook.

With `distillation_use_topk` in the batch the engine first calls `loss(student_logits=[1, T, V], data=micro_batch)` and
gathers each returned [1, T] tensor into `model_output`, then calls `loss(model_output=..., data=...)` for the value.
`distillation_only` makes it skip its own log-probabilities, which are bfloat16 on CPU and in determinism mode.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.utils.ulysses import ulysses_pad_and_slice_inputs

from eaft_verl.objectives import Objective, weighted_nll
from eaft_verl.token_stats import LogitStats, TokenStats, logit_stats, reference_stats
from eaft_verl.training.step_metrics import TokenTable

BATCH_FLAGS: dict[str, Any] = {
    "distillation_use_topk": True,
    "distillation_only": True,
    "use_fused_kernels": False,
    "temperature": 1.0,  # any other would change the gate
    "pad_mode": DatasetPadMode.NO_PADDING,
}
GUARD_TOKENS = 256  # rows recomputed by the guard: a whole micro-batch in float32 may not fit beside the model
GUARD_TOLERANCE = 1e-3  # relative; the two paths differ by rounding only, a wrong objective differs by its weights


class TokenLoss:
    """weighted_nll of one objective, with the statistics of every trained token kept for the step's metrics."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.guarded = False
        self.table = TokenTable()

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

    def _statistics(self, logits_TV: Tensor, data: TensorDict) -> dict[str, Tensor]:
        labels_T, mask_T = shifted(data)
        if (parallel := tu.get_non_tensor_data(data, "sp_size", 1)) > 1:
            labels_T = ulysses_pad_and_slice_inputs(labels_T[None], None, parallel)[0].squeeze(0)
            mask_T = ulysses_pad_and_slice_inputs(mask_T.long()[None], None, parallel)[0].squeeze(0).bool()
        stats = logit_stats(logits_TV, labels_T, mask_T, k=self.objective.k, sum_p2="sum_p2" in self.objective.needs)
        if not self.guarded:
            check_statistics(stats, logits_TV, labels_T, mask_T, self.objective)
        named = {"nll": stats.nll_T, "entropy": stats.entropy_T, "entropy20": stats.entropy20_T}
        named |= {"correct": stats.correct_T}
        if stats.sum_p2_T is not None:
            named["sum_p2"] = stats.sum_p2_T
        named["vocab"] = torch.full_like(stats.nll_T, logits_TV.shape[-1])
        return {name: value[None] for name, value in named.items()}

    def _loss(self, model_output: dict[str, Tensor], data: TensorDict) -> Tensor:
        if "nll" not in model_output:
            raise RuntimeError(
                "verl did not call the logits hook: the objective would not be the one that trains. Switch off "
                "what keeps logits from being computed (fused kernels, liger cross-entropy)"
            )
        values = {name: tensor.values() for name, tensor in model_output.items()}
        _, mask_T = shifted(data)
        lengths_B = data["input_ids"].offsets().diff()
        stats = self._token_stats(values, data, lengths_B)
        weight_T = self.objective.weight(stats) * _state(data).get("weight_scale", 1.0)
        num_tokens = data["batch_num_tokens"] / data["dp_size"]  # FSDP averages gradients over dp_size ranks
        loss = weighted_nll(values["nll"], weight_T, mask_T, num_tokens)
        if not self.guarded:
            check_loss(loss, values["nll"], weight_T, mask_T, num_tokens)
            self.guarded = bool(mask_T.any())  # nothing was compared on padding
        self.table.add(mask_T, lengths_B, weight_T, **values)
        return loss

    def _token_stats(self, values: dict[str, Tensor], data: TensorDict, lengths_B: Tensor) -> TokenStats:
        sample_weight_T = None
        if "sample_weight" in self.objective.needs:
            sample_weight_T = data["sample_weight"].repeat_interleave(lengths_B)
        return TokenStats(
            logprob_T=-values["nll"].detach(),
            entropy_T=values["entropy"],
            k=min(self.objective.k, int(values["vocab"][0])),
            sum_p2_T=values.get("sum_p2"),
            sample_weight_T=sample_weight_T,
            tau=_state(data).get("tau"),
        )


def shifted(data: TensorDict) -> tuple[Tensor, Tensor]:
    """Labels and loss mask at the position whose logits predict them, packed: ([T] int64, [T] bool).

    verl's layout: logits[t] predict input_ids[t + 1]. The roll wraps into the next sequence, so the last position of
    every sequence is masked.
    """
    labels_T = torch.roll(data["input_ids"].values(), -1)
    mask_T = torch.roll(data["loss_mask"].values(), -1).bool()
    mask_T[data["input_ids"].offsets()[1:] - 1] = False
    return labels_T, mask_T


def check_statistics(
    stats: LogitStats, logits_TV: Tensor, labels_T: Tensor, mask_T: Tensor, objective: Objective
) -> None:
    """Compare the first trained tokens with the plain definition; RuntimeError when the fast path disagrees."""
    rows = mask_T.nonzero().squeeze(-1)[:GUARD_TOKENS]
    expected = reference_stats(logits_TV.detach()[rows], labels_T[rows], objective.k)
    for name, ours, truth in zip(LogitStats._fields, stats, expected, strict=True):
        if ours is not None and name != "correct_T":  # ties of the largest logit may be broken either way
            _agree(name, ours.detach()[rows], truth)


def check_loss(loss: Tensor, nll_T: Tensor, weight_T: Tensor, mask_T: Tensor, num_tokens: float) -> None:
    """Recompute the loss of the micro-batch token by token in float64: it must be the configured objective's."""
    total = sum(
        float(weight) * float(nll)
        for weight, nll, mask in zip(weight_T.tolist(), nll_T.detach().tolist(), mask_T.tolist(), strict=True)
        if mask
    )
    _agree("loss", loss.detach().double(), torch.tensor(total / num_tokens, dtype=torch.float64, device=loss.device))


def _agree(name: str, ours: Tensor, truth: Tensor) -> None:
    if not torch.allclose(ours.double(), truth.double(), rtol=GUARD_TOLERANCE, atol=GUARD_TOLERANCE, equal_nan=True):
        worst = (ours.double() - truth.double()).abs().max().item()
        raise RuntimeError(
            f"objective guard: {name} differs from its definition by {worst:.3g} on the first micro-batch"
        )


def _state(data: TensorDict) -> dict[str, float]:
    """What the driver knows of the global batch and a micro-batch cannot: tau, weight_scale."""
    return tu.get_non_tensor_data(data, "objective_state", None) or {}
