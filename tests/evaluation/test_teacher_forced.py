"""Likelihood and drift against references written as loops in float64, on a tiny random Llama."""

import math
from pathlib import Path

import pytest
import torch
from tiny import sums, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaft_verl.data.encode import encode
from eaft_verl.data.formats import to_messages
from eaft_verl.errors import DataError
from eaft_verl.evaluation import drift, harness, teacher_forced
from eaft_verl.evaluation.settings import DriftSettings, EvaluateSettings
from eaft_verl.evaluation.teacher_forced import Example


@pytest.fixture(scope="module")
def base_path(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"), hidden=32, seed=0)


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return AutoTokenizer.from_pretrained(base_path)


@pytest.fixture(scope="module")
def base(base_path):
    return AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def moved(base_path):
    """The base after a small random step."""
    model = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def examples(tokenizer) -> list[Example]:
    return teacher_forced.encode_examples(tokenizer, sums(7, seed=3), 512, "sums")


def log_probs(model, example: Example) -> list[list[float]]:
    """log p of every word at every answer position; one example alone, softmax by hand in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([example.input_ids])).logits[0].double()
    rows = []
    for index, marked in enumerate(example.mask):
        if marked:
            row = logits[index - 1].tolist()
            total = math.log(math.fsum(math.exp(value - max(row)) for value in row)) + max(row)
            rows.append([value - total for value in row])
    return rows


def test_examples_mark_answers_and_stop_token(tokenizer, examples):
    for example, row in zip(examples, sums(7, seed=3), strict=True):
        assert tokenizer.decode(example.labels) == row["response"] + "<|im_end|>"
        encoded = encode(tokenizer, to_messages(row)[0], 512)[0]
        assert (example.input_ids, [int(value) for value in example.mask]) == (encoded.input_ids, encoded.loss_mask)


def test_heldout_equals_cross_entropy_of_one_example_at_a_time(base, examples):
    record, samples = teacher_forced.heldout(base, examples, token_budget=128)
    total = tokens = 0.0
    for example, sample in zip(examples, samples, strict=True):
        labels = torch.tensor(example.input_ids)
        labels[~torch.tensor(example.mask)] = -100
        with torch.no_grad():
            expected = base(torch.tensor([example.input_ids]), labels=labels[None]).loss.item()
        assert sample["scores"]["nll"] == pytest.approx(expected, rel=1e-5)
        assert sample["tokens"] == sum(example.mask)
        total += expected * sample["tokens"]
        tokens += sample["tokens"]
    assert record["metrics"]["nll"]["score"] == pytest.approx(total / tokens, rel=1e-5)
    assert record["metric"] == "nll"
    assert record["metrics"]["nll"]["higher_is_better"] is False


@pytest.mark.parametrize("token_budget", [1, 100, 10_000])
def test_batches_do_not_change_the_scores(base, examples, token_budget: int):
    alone, _ = teacher_forced.heldout(base, examples, token_budget=1)
    batched, _ = teacher_forced.heldout(base, examples, token_budget=token_budget)
    assert batched["metrics"]["nll"]["score"] == pytest.approx(alone["metrics"]["nll"]["score"], rel=1e-5)


def test_drift_equals_a_float64_loop(base, moved, examples):
    record, samples = drift.drift(moved, examples, drift.base_logits(base, examples, 128), 128)
    sums_of = {"kl": 0.0, "agreement": 0.0, "nll": 0.0}
    for example, sample in zip(examples, samples, strict=True):
        token_scores = []
        for p, q, label in zip(log_probs(base, example), log_probs(moved, example), example.labels, strict=True):
            kl = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            token_scores.append((kl, float(p.index(max(p)) == q.index(max(q))), -q[label]))
        for name, values in zip(sums_of, zip(*token_scores, strict=True), strict=True):
            assert sample["scores"][name] == pytest.approx(math.fsum(values) / len(values), rel=1e-4, abs=1e-6)
            sums_of[name] += math.fsum(values)
    tokens = sum(sample["tokens"] for sample in samples)
    for name, total in sums_of.items():
        assert record["metrics"][name]["score"] == pytest.approx(total / tokens, rel=1e-4)
    assert record["metric"] == "kl"
    assert record["metrics"]["kl"]["score"] > 0.01
    assert record["metrics"]["agreement"]["score"] < 1.0


def test_the_base_has_not_moved_at_all(base, examples):
    logits = drift.base_logits(base, examples)
    for model in (None, base):
        record, samples = drift.drift(model, examples, logits)
        assert record["metrics"]["kl"] == {"score": 0.0, "stderr": 0.0, "higher_is_better": False}
        assert record["metrics"]["agreement"] == {"score": 1.0, "stderr": 0.0, "higher_is_better": True}
        assert all(sample["scores"]["kl"] == 0.0 for sample in samples)


def test_divergence_by_hand_and_over_a_padded_vocabulary():
    infinity = float("inf")
    base = torch.tensor([[math.log(0.5), math.log(0.5), -infinity]])
    model = torch.tensor([[math.log(0.9), math.log(0.1), -infinity]])
    values = drift.divergence(base, model, torch.tensor([1]))
    assert values["kl"].item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert values["agreement"].item() == 1.0
    assert values["nll"].item() == pytest.approx(-math.log(0.1))


def test_probe_is_the_greedy_answer_of_each_prompt_alone(base, tokenizer):
    texts = ["What is 1 + 2?", "Hi", "A much longer question, so that the others are padded on the left"]
    prompts = [{"id": str(n), "messages": [{"role": "user", "content": t}], "tools": None} for n, t in enumerate(texts)]
    probe = drift.make_probe(base, tokenizer, prompts, new_tokens=9)
    for example, text in zip(probe, texts, strict=True):
        prompt = [token for token, marked in zip(example.input_ids, example.mask, strict=True) if not marked]
        assert tokenizer.decode(prompt) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = list(prompt)
        while len(ids) < len(prompt) + 9 and ids[-1:] != [tokenizer.eos_token_id]:
            with torch.no_grad():
                ids.append(int(base(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids == example.input_ids


def test_probe_survives_the_disk_and_its_name_says_what_it_depends_on(base, tokenizer, tmp_path):
    prompts = drift.prompts_of(DriftSettings(rows=3))
    probe = drift.make_probe(base, tokenizer, prompts, 4)
    path = drift.probe_path(tmp_path, "key", tokenizer, prompts, 4)
    drift.write_probe(path, probe, tokenizer)
    assert drift.read_probe(path) == probe
    others = [("other", prompts, 4), ("key", prompts[:2], 4), ("key", prompts, 5)]
    assert len({path, *(drift.probe_path(tmp_path, key, tokenizer, p, n) for key, p, n in others)}) == 4


def test_given_answers_are_cut(tokenizer, tmp_path):
    from tiny import write_sums

    settings = DriftSettings(data=str(write_sums(tmp_path / "rows.jsonl", 5, seed=1)), rows=4, new_tokens=3)
    prompts = drift.prompts_of(settings)
    assert drift.has_answers(prompts)
    probe = drift.given_probe(tokenizer, prompts, settings, 512)
    assert [len(example.labels) for example in probe] == [3] * 4


def test_half_answered_rows_are_refused(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b", "response": "c"}\n')
    with pytest.raises(DataError, match="1 of 2 rows have an answer"):
        drift.prompts_of(DriftSettings(data=str(rows)))


def test_rows_that_cannot_be_scored_are_named(tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl row 2"):
        teacher_forced.encode_examples(tokenizer, [*sums(1, seed=0), {"text": "x"}], 512, "rows.jsonl")
    with pytest.raises(DataError, match="same id"):
        teacher_forced.encode_examples(tokenizer, [{"id": 1, **row} for row in sums(2, seed=0)], 512, "rows.jsonl")
    with pytest.raises(DataError, match="no rows"):
        teacher_forced.encode_examples(tokenizer, [], 512, "rows.jsonl")


def test_logits_are_float32_whatever_the_weights_are(base_path, examples):
    """The head gets the last hidden state, in bfloat16, and works in float32: no rounding after it."""
    settings = EvaluateSettings(backend_args={"dtype": "bfloat16", "device": "cpu"})
    model, tokenizer = harness.load_model(base_path, settings)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    ids = torch.tensor([examples[0].input_ids])
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    expected = output.hidden_states[-1].double() @ model.get_input_embeddings().weight.double().T
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits.double(), expected, rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16)(ids).logits
    assert plain.dtype == torch.bfloat16 and (plain.double() - expected).abs().max() > 1e-3
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=tokenizer.pad_token_id)


def test_small_is_a_number_of_weights(base_path, base):
    assert harness._parameters(base_path) == base.num_parameters() < harness.SMALL


def test_float32_on_the_cpu_unless_told_otherwise(base_path):
    model, _ = harness.load_model(base_path, EvaluateSettings(backend_args={"device": "cpu"}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
