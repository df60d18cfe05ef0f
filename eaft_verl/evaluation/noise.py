"""What the base model differs from itself by, measured once more in other batches: differences of no meaning."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from eaft_verl.data.parquet import Example
from eaft_verl.evaluation.drift import drift
from eaft_verl.evaluation.records import Sample
from eaft_verl.evaluation.teacher_forced import heldout

QUESTIONS = 32  # of every benchmark, held-out rows and drift answers: the first ones
ALONE = 1  # token budget under which every example is a batch of its own
_SAME = 1e-6  # of scores that are no shares, such as log-probabilities


def drift_noise(
    model: PreTrainedModel, probe: Sequence[Example], base: list[Tensor], known: list[Sample]
) -> dict[str, float]:
    """{kl, agreement, nll}: the base against its own logits, examples one by one in reversed order.

    nll: absolute difference of the mean. known: samples of the base's `drift` benchmark.
    """
    chosen = slice(QUESTIONS - 1, None, -1)
    record, samples = drift(model, probe[chosen], base[chosen], ALONE)
    scores = {name: record["metrics"][name]["score"] for name in ("kl", "agreement")}
    return {**scores, "kl": abs(scores["kl"]), "nll": nll_noise(samples, known)}


def heldout_noise(model: PreTrainedModel, examples: Sequence[Example], known: list[Sample]) -> float:
    """Absolute difference of the held-out NLL. known: samples of the base's `heldout` benchmark."""
    return nll_noise(heldout(model, examples[QUESTIONS - 1 :: -1], ALONE)[1], known)


def nll_noise(samples: list[Sample], known: list[Sample]) -> float:
    """|sum(tokens * (nll - known nll)) / sum(tokens)| over `samples`, matched by id."""
    before = {sample["id"]: sample["scores"]["nll"] for sample in known}
    total = sum(sample["tokens"] for sample in samples)
    return abs(sum(s["tokens"] * (s["scores"]["nll"] - before[s["id"]]) for s in samples) / total)


def accuracy_noise(samples: list[Sample], known: Iterable[Sample], metric: str) -> dict[str, Any] | None:
    """{changed: questions with another score, n: questions, difference: absolute, of the mean}, matched by id.

    None where the metric has no score per question.
    """
    before = {sample["id"]: sample["scores"].get(metric) for sample in known}
    pairs = [(sample["scores"].get(metric), before[sample["id"]]) for sample in samples]
    if not pairs or any(None in pair for pair in pairs):
        return None
    return {
        "changed": sum(abs(after - earlier) > _SAME for after, earlier in pairs),
        "n": len(pairs),
        "difference": abs(sum(after - earlier for after, earlier in pairs)) / len(pairs),
    }
