"""Likelihood of given answers: one forward pass, nothing generated.

Dimension letters: T answer tokens of one example, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from eaft_verl.attention.tree import laid_out, packed_rows, tree_of
from eaft_verl.data.parquet import Example
from eaft_verl.errors import DataError
from eaft_verl.evaluation.records import Sample, digest, mean_and_stderr, metric_entry
from eaft_verl.evaluation.shared_prefix import beginning, by_tree, common_beginning
from eaft_verl.tokens.logits import cached_rows

TOKEN_BUDGET = 4096  # padded tokens per forward pass
CHUNK_TOKENS = 64  # rows of logits in float32 at a time on an accelerator


def labels(example: Example) -> list[int]:
    """The answer's token ids, [T]."""
    return [token for token, marked in zip(example.input_ids, example.loss_mask, strict=True) if marked]


def _positions(example: Example) -> list[int]:
    """Positions whose logits predict the answer's tokens: one before each of them, [T]."""
    return [index - 1 for index, marked in enumerate(example.loss_mask) if marked]


@torch.inference_mode()
def answer_logits(
    model: PreTrainedModel, examples: Sequence[Example], token_budget: int = TOKEN_BUDGET
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the example, logits_TV of its answer tokens), longest examples first.

    The composition of the batches depends on the examples only, so that two models see the same ones. Logits are
    computed for answer positions only: over a whole prompt they would be larger than the model.
    """
    for batch in _batches(examples, token_budget):
        tree = by_tree(model, sum(len(examples[index].input_ids) for index in batch))
        yield from (_tree_logits if tree else _padded_logits)(model, examples, batch)


def _tree_logits(
    model: PreTrainedModel, examples: Sequence[Example], batch: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    rows = [np.array(examples[index].input_ids) for index in batch]
    tree, (ids_T, positions_T) = tree_of(rows), packed_rows(rows)
    places = tree.place_T.split([len(row) for row in rows])
    wanted = [one[_positions(examples[index])] for index, one in zip(batch, places, strict=True)]
    logits_TV = model(**laid_out(tree, ids_T, positions_T), use_cache=False, logits_to_keep=torch.cat(wanted)).logits[0]
    yield from zip(batch, logits_TV.split([len(one) for one in wanted]), strict=True)


def _padded_logits(
    model: PreTrainedModel, examples: Sequence[Example], batch: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    rows = [list(examples[index].input_ids) for index in batch]
    columns = sorted({position for index in batch for position in _positions(examples[index])})
    shared = common_beginning(rows, columns[0])
    cache = beginning(model, rows[0][:shared], len(rows)) if shared else None
    shared = 0 if cache is None else shared
    longest = max(map(len, rows))
    ids = torch.tensor([row[shared:] + [0] * (longest - len(row)) for row in rows])
    attention = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    arguments = {"input_ids": ids.to(model.device), "attention_mask": attention.to(model.device)}
    keep = torch.tensor(columns, device=model.device) - shared
    known = {"use_cache": False} if cache is None else {"past_key_values": cache}
    logits = model(**arguments, **known, logits_to_keep=keep).logits
    place = {position: column for column, position in enumerate(columns)}
    for row, index in enumerate(batch):
        yield index, logits[row, [place[position] for position in _positions(examples[index])]]


def _batches(examples: Sequence[Example], token_budget: int) -> list[list[int]]:
    """Indices grouped so that rows * longest <= token_budget; an example longer than that goes alone."""
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids))
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if not room:
            batches.append([])
            room = max(1, token_budget // len(examples[index].input_ids))
        batches[-1].append(index)
        room -= 1
    return batches


def rows_at_once(logits_TV: Tensor) -> int:
    """Rows of logits whose sums over the vocabulary are worked out together, in float32."""
    return cached_rows(logits_TV.shape[-1], 4) if logits_TV.device.type == "cpu" else CHUNK_TOKENS


def token_nll(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """(nll_T in nats, correct_T), both float32 on the CPU; correct is 1.0 where the label is the likeliest token."""
    nll, correct, rows = [], [], rows_at_once(logits_TV)
    for logits, right in zip(logits_TV.split(rows), labels_T.split(rows), strict=True):
        logprob = logits.float().log_softmax(dim=-1)
        nll.append(-logprob.gather(-1, right[:, None]).squeeze(-1))
        correct.append((logits.argmax(dim=-1) == right).float())
    return torch.cat(nll).cpu(), torch.cat(correct).cpu()


def heldout(
    model: PreTrainedModel, examples: Sequence[Example], token_budget: int = TOKEN_BUDGET
) -> tuple[dict[str, Any], list[Sample]]:
    """(record fields, samples): nll in nats per token and token accuracy of given answers, weighted by tokens.

    Of prepared rows this is the loss that training reports for them: the same ids, the same mask, mean over all tokens.
    """
    scores: dict[int, dict[str, float]] = {}
    for index, logits_TV in answer_logits(model, examples, token_budget):
        labels_T = torch.tensor(labels(examples[index]), device=logits_TV.device)
        nll_T, correct_T = token_nll(logits_TV, labels_T)
        scores[index] = {"nll": nll_T.double().mean().item(), "token_accuracy": correct_T.double().mean().item()}
    return token_weighted(examples, scores, {"nll": False, "token_accuracy": True})


def token_weighted(
    examples: Sequence[Example], scores: dict[int, dict[str, float]], higher_is_better: dict[str, bool]
) -> tuple[dict[str, Any], list[Sample]]:
    """(record fields, samples) of per-example means over tokens; the first metric is the primary one.

    Raises DataError for a mean that is not finite: the model has broken weights, or holds a word for impossible.
    """
    tokens = [sum(example.loss_mask) for example in examples]
    for index, found in sorted(scores.items()):
        if broken := [f"{metric} {value}" for metric, value in found.items() if not math.isfinite(value)]:
            raise DataError(f"example {examples[index].id}: {broken[0]}; the model's logits are not finite numbers")
    samples: list[Sample] = [
        {"id": example.id, "tokens": count, "scores": scores[index]}
        for index, (example, count) in enumerate(zip(examples, tokens, strict=True))
    ]
    metrics = {}
    for metric, higher in higher_is_better.items():
        mean, stderr = mean_and_stderr(
            [sample["scores"][metric] for sample in samples], [float(count) for count in tokens]
        )
        metrics[metric] = metric_entry(mean, stderr, higher)
    record = {
        "metric": next(iter(metrics)),
        "metrics": metrics,
        "n": len(samples),
        "task_version": "1",
        "prompt_hash": digest(
            [token for token, marked in zip(e.input_ids, e.loss_mask, strict=True) if not marked] for e in examples
        ),
        "data_hash": digest([example.id, example.input_ids, example.loss_mask] for example in examples),
        "harness": "eaft-verl",
    }
    return record, samples
