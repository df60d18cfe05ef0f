"""Likelihood of given answers: one forward pass, nothing generated.

Dimension letters: T answer tokens of one example, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eaft_verl.data.encode import encode
from eaft_verl.data.formats import to_messages
from eaft_verl.data.spec import RowError
from eaft_verl.errors import DataError
from eaft_verl.evaluation.records import Sample, digest, mean_and_stderr, metric_entry

TOKEN_BUDGET = 4096  # padded tokens per forward pass
CHUNK_TOKENS = 64  # rows of logits in float32 at a time: small enough to stay in the cache of a CPU


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer; mask marks the answer's tokens. The first token cannot be marked."""

    id: str
    input_ids: list[int]
    mask: list[bool]

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.mask) or not any(self.mask) or self.mask[0]:
            raise DataError(f"example {self.id}: the answer is empty, starts at the first token, or has another length")

    @property
    def positions(self) -> list[int]:
        """Positions whose logits predict the answer's tokens: one before each of them."""
        return [index - 1 for index, marked in enumerate(self.mask) if marked]

    @property
    def labels(self) -> list[int]:
        """The answer's token ids, [T]."""
        return [token for token, marked in zip(self.input_ids, self.mask, strict=True) if marked]


@torch.inference_mode()
def answer_logits(
    model: PreTrainedModel, examples: Sequence[Example], token_budget: int = TOKEN_BUDGET
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the example, logits_TV of its answer tokens, in the model's dtype), longest examples first.

    The composition of the batches depends on the examples only, so that two models see the same ones. Logits are
    computed for answer positions only: over a whole prompt they would be larger than the model.
    """
    for batch in _batches(examples, token_budget):
        longest = max(len(examples[index].input_ids) for index in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            length = len(examples[index].input_ids)
            ids[row, :length] = torch.tensor(examples[index].input_ids)
            attention[row, :length] = 1
        columns = sorted({position for index in batch for position in examples[index].positions})
        keep = torch.tensor(columns, device=model.device)
        arguments = {"input_ids": ids.to(model.device), "attention_mask": attention.to(model.device)}
        logits = model(**arguments, logits_to_keep=keep, use_cache=False).logits
        place = {position: column for column, position in enumerate(columns)}
        for row, index in enumerate(batch):
            yield index, logits[row, [place[position] for position in examples[index].positions]]


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


def token_nll(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """(nll_T in nats, correct_T), both float32 on the CPU; correct is 1.0 where the label is the likeliest token."""
    nll, correct = [], []
    for logits, labels in zip(logits_TV.split(CHUNK_TOKENS), labels_T.split(CHUNK_TOKENS), strict=True):
        logprob = logits.float().log_softmax(dim=-1)
        nll.append(-logprob.gather(-1, labels[:, None]).squeeze(-1))
        correct.append((logits.argmax(dim=-1) == labels).float())
    return torch.cat(nll).cpu(), torch.cat(correct).cpu()


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], max_length: int, source: str, turns: str = "split"
) -> list[Example]:
    """One example per assistant turn (`turns="last"`: of the last one), in the context it is generated in.

    Cut after max_length tokens.

    The id is the row's own or its number, '/turn' added where a row has several turns. Raises DataError naming the row
    for one that the chat template cannot write or that has no answer within max_length.
    """
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            messages, extra = to_messages(row)
            tools, kwargs = extra.get("tools"), extra.get("chat_template_kwargs")
            pieces = encode(tokenizer, messages, max_length, "truncate", turns, tools, kwargs)
        except RowError as error:
            raise DataError(f"{source} row {number}: {error}") from error
        identity = extra.get("id", str(number - 1))
        for part, piece in enumerate(pieces):
            name = identity if len(pieces) == 1 else f"{identity}/{part}"
            examples.append(Example(name, list(piece.input_ids), [bool(value) for value in piece.loss_mask]))
    if not examples:
        raise DataError(f"{source} holds no rows to evaluate")
    if len({example.id for example in examples}) < len(examples):
        raise DataError(f"{source} has rows with the same id; examples are matched by id, so make them unique")
    return examples


def heldout(
    model: PreTrainedModel, examples: list[Example], token_budget: int = TOKEN_BUDGET
) -> tuple[dict[str, Any], list[Sample]]:
    """(record fields, samples): nll in nats per token and token accuracy of given answers, weighted by tokens."""
    scores: dict[int, dict[str, float]] = {}
    for index, logits_TV in answer_logits(model, examples, token_budget):
        labels_T = torch.tensor(examples[index].labels, device=logits_TV.device)
        nll_T, correct_T = token_nll(logits_TV, labels_T)
        scores[index] = {"nll": nll_T.double().mean().item(), "token_accuracy": correct_T.double().mean().item()}
    return token_weighted(examples, scores, {"nll": False, "token_accuracy": True})


def token_weighted(
    examples: list[Example], scores: dict[int, dict[str, float]], higher_is_better: dict[str, bool]
) -> tuple[dict[str, Any], list[Sample]]:
    """(record fields, samples) of per-example means over tokens; the first metric is the primary one."""
    tokens = [len(example.labels) for example in examples]
    samples = [
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
            [token for token, marked in zip(e.input_ids, e.mask, strict=True) if not marked] for e in examples
        ),
        "data_hash": digest([example.id, example.input_ids, example.mask] for example in examples),
        "harness": "eaft-verl",
    }
    return record, samples
