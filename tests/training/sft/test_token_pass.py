"""From the workers' answers to the store and to what objectives take from it: no engine, no Ray."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from eaft_verl.analysis.base import base_stats
from eaft_verl.data.encode import encode
from eaft_verl.data.parquet import Example
from eaft_verl.errors import DataError
from eaft_verl.experiment import token_stats
from eaft_verl.experiment.token_stats import fill
from eaft_verl.training.sft.order import PADDING
from eaft_verl.training.sft.token_pass import EmitDistribution

KEYS = {"model": "m", "data": "d", "template": "t"}
VOCAB, K = 384, 20
META: dict[str, Any] = {
    **{"model": "tiny", "keys": KEYS, "k": K, "vocab": VOCAB},
    **{"origin": "data", "sampling": None, "samples": 5},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    made = []
    for number, row in enumerate(tiny.sums(5, seed=1)):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        (one,) = encode(tokenizer, messages, 400)
        made.append(Example(str(number), messages, one.input_ids, one.loss_mask, source="ab"[number % 2]))
    return made


@pytest.fixture(scope="module")
def logits(examples: list[Example]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(len(example.input_ids), VOCAB) * 3 for example in examples]


@pytest.fixture
def infer(examples: list[Example], logits: list[torch.Tensor]) -> tuple[Callable[[list[int]], Any], list[list[int]]]:
    """What the workers would answer through the hook, and the rows they were asked for."""
    from eaft_verl.training.sft.batches import make_batch

    asked: list[list[int]] = []
    shortest = min(range(len(examples)), key=lambda index: len(examples[index].input_ids))

    def answer(rows: list[int]) -> Any:
        asked.append(rows)
        batch = make_batch(examples, rows, {})
        packed_TV = torch.cat([logits[shortest if row == PADDING else row] for row in rows])
        named = EmitDistribution(K)(student_logits=packed_TV[None], data=batch)
        lengths = batch["input_ids"].offsets().diff().tolist()
        return {
            name: torch.nested.as_nested_tensor(list(value[0].split(lengths)), layout=torch.jagged)
            for name, value in named.items()
        }

    return answer, asked


def test_every_trained_token_has_its_row_by_float64_softmax(
    tmp_path: Path, tokenizer: Any, examples: list[Example], logits: list[torch.Tensor], infer: Any
) -> None:
    store = fill(tmp_path / "store", META, examples, tokenizer, 2, infer[0])
    rows = [row for batch in store.batches() for row in batch.to_pylist()]
    expected = [
        (sample, t) for sample, example in enumerate(examples) for t, kept in enumerate(example.loss_mask) if kept
    ]
    assert [(row["sample"], row["position"]) for row in rows] == expected
    for row in rows:
        p_V = logits[row["sample"]][row["position"] - 1].double().softmax(-1)
        q_K = p_V.sort(descending=True).values[:K] / p_V.sort(descending=True).values[:K].sum()
        assert row["token"] == examples[row["sample"]].input_ids[row["position"]]
        truth = {
            "logprob": p_V[row["token"]].log(),
            "entropy": -(q_K * q_K.log()).sum(),
            "full_entropy": -(p_V * p_V.log()).sum(),
            "max_prob": p_V.max(),
            "sum_p2": (p_V**2).sum(),
            "top_k_mass": p_V.sort(descending=True).values[:K].sum(),
        }
        for name, value in truth.items():
            assert row[name] == pytest.approx(float(value), rel=1e-5, abs=1e-5), name
        assert row["argmax"] == int(p_V.argmax())
        assert row["source"] == "ab"[row["sample"] % 2]
        assert row["role"] == ("template" if row["token"] == tokenizer.eos_token_id else "assistant")


def test_base_statistics_are_those_of_the_trained_tokens(
    tmp_path: Path, tokenizer: Any, examples: list[Example], logits: list[torch.Tensor], infer: Any
) -> None:
    stats = base_stats(fill(tmp_path / "store", META, examples, tokenizer, 3, infer[0]))
    assert infer[1] == [[0, 1, 2], [3, 4, PADDING]]
    probs, entropies, means = [], [], []
    for number, item in enumerate(examples):
        own = []
        for t in range(len(item.input_ids) - 1):
            if item.loss_mask[t + 1]:
                p = logits[number][t].double().softmax(-1)[item.input_ids[t + 1]].item()
                q = sorted(logits[number][t].double().exp().tolist())[-20:]
                entropies.append(-sum(x / sum(q) * math.log(x / sum(q)) for x in q) / math.log(20))
                own.append(p)
        probs += own
        means.append(sum(-math.log(p) for p in own) / len(own))
    assert stats.prob.tolist() == pytest.approx(probs, rel=1e-5)
    assert stats.entropy.tolist() == pytest.approx(entropies, rel=1e-5)
    assert stats.mean_nll.tolist() == pytest.approx(means, rel=1e-5)


def test_a_killed_pass_keeps_its_parts_and_a_whole_one_is_not_repeated(
    tmp_path: Path, tokenizer: Any, examples: list[Example], infer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_stats, "PART_TOKENS", 1)
    answer, asked = infer

    def killed(rows: list[int]) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(rows)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "store", META, examples, tokenizer, 1, killed)
    store = fill(tmp_path / "store", META, examples, tokenizer, 1, answer)
    assert asked == [[0], [1], [2], [3], [4]]
    whole = fill(tmp_path / "whole", META, examples, tokenizer, 5, answer)
    assert fill(tmp_path / "store", META, examples, tokenizer, 1, answer).meta == store.meta and len(asked) == 6
    for name in ("sample", "position", "logprob", "entropy", "role", "source"):
        assert store.column(name).to_pylist() == whole.column(name).to_pylist(), name
    with pytest.raises(DataError, match=r"made with keys .*stale: delete it"):
        fill(tmp_path / "store", {**META, "keys": {**KEYS, "model": "other"}}, examples, tokenizer, 1, answer)


def test_parts_are_whole_batches_of_about_their_size(examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stats, "PART_TOKENS", 1 + sum(examples[0].loss_mask) + sum(examples[1].loss_mask))
    assert token_stats._parts(examples, 1) == [[[0], [1], [2]], [[3], [4]]]
    assert token_stats._parts(examples, 2)[0][0] == [0, 1]
