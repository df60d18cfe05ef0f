"""Likelihood and drift against references written as loops in float64, on a tiny random Llama."""

import math
from pathlib import Path

import pytest
import torch
from tiny import sums, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaft_verl.data.encode import encode
from eaft_verl.data.formats import to_messages
from eaft_verl.data.parquet import Example, read_examples, write_examples
from eaft_verl.errors import DataError
from eaft_verl.evaluation import base_logits, drift, loading, noise, teacher_forced
from eaft_verl.evaluation.settings import DriftSettings, EvaluateSettings


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
    encoded = [(to_messages(row)[0], encode(tokenizer, to_messages(row)[0], 512)[0]) for row in sums(7, seed=3)]
    return [Example(f"{n}", messages, one.input_ids, one.loss_mask) for n, (messages, one) in enumerate(encoded)]


def log_probs(model, example: Example) -> list[list[float]]:
    """log p of every word at every answer position; one example alone, softmax by hand in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([example.input_ids])).logits[0].double()
    rows = []
    for index, marked in enumerate(example.loss_mask):
        if marked:
            row = logits[index - 1].tolist()
            total = math.log(math.fsum(math.exp(value - max(row)) for value in row)) + max(row)
            rows.append([value - total for value in row])
    return rows


def test_heldout_equals_cross_entropy_of_one_example_at_a_time(base, examples):
    record, samples = teacher_forced.heldout(base, examples, token_budget=128)
    total = tokens = 0.0
    for example, sample in zip(examples, samples, strict=True):
        labels = torch.tensor(example.input_ids)
        labels[torch.tensor(example.loss_mask) == 0] = -100
        with torch.no_grad():
            expected = base(torch.tensor([example.input_ids]), labels=labels[None]).loss.item()
        assert sample["scores"]["nll"] == pytest.approx(expected, rel=1e-5)
        assert sample["tokens"] == sum(example.loss_mask)
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
    record, samples = drift.drift(moved, examples, base_logits.base_logits(base, examples, 128), 128)
    sums_of = {"kl": 0.0, "agreement": 0.0, "nll": 0.0}
    for example, sample in zip(examples, samples, strict=True):
        token_scores = []
        for p, q, label in zip(
            log_probs(base, example), log_probs(moved, example), teacher_forced.labels(example), strict=True
        ):
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
    logits = base_logits.base_logits(base, examples)
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
        prompt = [token for token, marked in zip(example.input_ids, example.loss_mask, strict=True) if not marked]
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
    write_examples(path, probe)
    stored = read_examples(path)
    for name in ("id", "messages", "input_ids", "loss_mask"):
        for one, other in zip(stored, probe, strict=True):
            assert list(getattr(one, name)) == list(getattr(other, name)), name
    answer = tokenizer.decode(teacher_forced.labels(probe[0]), skip_special_tokens=True)
    assert probe[0].messages[-1] == {"role": "assistant", "content": answer}
    others = [("other", prompts, 4), ("key", prompts[:2], 4), ("key", prompts, 5)]
    assert len({path, *(drift.probe_path(tmp_path, key, tokenizer, p, n) for key, p, n in others)}) == 4


def test_given_answers_are_cut(tokenizer, tmp_path):
    from tiny import write_sums

    settings = DriftSettings(data=str(write_sums(tmp_path / "rows.jsonl", 5, seed=1)), rows=4, new_tokens=3)
    prompts = drift.prompts_of(settings)
    assert drift.has_answers(prompts)
    probe = drift.given_probe(tokenizer, prompts, settings, 512)
    assert [sum(example.loss_mask) for example in probe] == [3] * 4


def test_half_answered_rows_are_refused(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b", "response": "c"}\n')
    with pytest.raises(DataError, match="1 of 2 rows have an answer"):
        drift.prompts_of(DriftSettings(data=str(rows)))


def test_given_answers_that_cannot_be_scored_are_named(tokenizer, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "' + "c" * 99 + '"}\n')
    settings = DriftSettings(data=str(rows))
    prompts = drift.prompts_of(settings)
    with pytest.raises(DataError, match=r"rows\.jsonl row 1: "):
        drift.given_probe(tokenizer, prompts, settings, 5)
    with pytest.raises(DataError, match="same id"):
        drift.given_probe(tokenizer, [{**prompt, "id": "1"} for prompt in prompts], settings, 512)


def test_every_turn_of_a_given_conversation_counts_once(tokenizer, tmp_path):
    turns = [{"role": role, "content": text} for text in ("a", "b", "c") for role in ("user", "assistant")]
    settings = DriftSettings()
    probe = drift.given_probe(tokenizer, [{"id": "x", "messages": turns, "tools": None}], settings, 512)
    assert [example.id for example in probe] == ["x/0", "x/1", "x/2"]
    said = [tokenizer.decode(teacher_forced.labels(example), skip_special_tokens=True) for example in probe]
    assert said == ["a", "b", "c"]
    assert [len(example.messages) for example in probe] == [2, 4, 6]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_has_no_score(base_path, examples, value: float):
    model = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()
    logits = base_logits.base_logits(model, examples)
    with torch.no_grad():
        model.model.norm.weight[0] = value
    with pytest.raises(DataError, match="example 0: nll nan; the model's logits are not finite"):
        teacher_forced.heldout(model, examples)
    with pytest.raises(DataError, match="example 0: kl nan"):
        drift.drift(model, examples, logits)
    with pytest.raises(DataError, match="example 0: kl nan"):  # a broken base
        drift.drift(AutoModelForCausalLM.from_pretrained(base_path), examples, base_logits.base_logits(model, examples))


def test_a_word_that_only_the_model_calls_impossible_is_infinitely_far():
    base, model = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -math.inf]])
    assert drift.divergence(base, model, torch.tensor([1]))["kl"].item() == math.inf
    assert drift.divergence(model, base, torch.tensor([1]))["kl"].item() == pytest.approx(math.log(1.5))
    assert drift.divergence(base, model, torch.tensor([1]))["agreement"].item() == 1.0  # the lowest of equals


def test_logits_are_float32_whatever_the_weights_are(base_path, examples):
    """The head gets the last hidden state, in bfloat16, and works in float32: no rounding after it."""
    settings = EvaluateSettings(backend_args={"dtype": "bfloat16", "device": "cpu"})
    model, tokenizer = loading.load_model(base_path, settings)
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
    assert loading._parameters(base_path) == base.num_parameters() < loading.SMALL


def test_float32_on_the_cpu_unless_told_otherwise(base_path):
    model, _ = loading.load_model(base_path, EvaluateSettings(backend_args={"device": "cpu"}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_noise_is_what_other_batches_and_another_order_change(base, moved, examples):
    logits = base_logits.base_logits(base, examples)
    _, of_drift = drift.drift(None, examples, logits)
    _, of_heldout = teacher_forced.heldout(base, examples)
    found = noise.drift_noise(base, examples, logits, of_drift)
    assert 0 <= found["kl"] < 1e-6 and found["agreement"] == 1.0 and 0 <= found["nll"] < 1e-6
    assert 0 <= noise.heldout_noise(base, examples, of_heldout) < 1e-6
    # of two models that differ it is their difference, whatever the order
    record, samples = drift.drift(moved, examples, logits)
    apart = noise.drift_noise(moved, examples, logits, of_drift)
    assert apart["kl"] == pytest.approx(record["metrics"]["kl"]["score"], rel=1e-4)
    total = sum(sample["tokens"] for sample in samples)
    pairs = zip(samples, of_drift, strict=True)
    by_hand = sum(new["tokens"] * (new["scores"]["nll"] - old["scores"]["nll"]) for new, old in pairs) / total
    assert apart["nll"] == pytest.approx(abs(by_hand), rel=1e-4)


def test_noise_looks_at_the_first_examples_only(base, examples, monkeypatch):
    seen = []
    monkeypatch.setattr(noise, "QUESTIONS", 3)
    monkeypatch.setattr(noise, "heldout", lambda model, chosen, budget: seen.append((chosen, budget)) or ({}, KNOWN))
    assert noise.heldout_noise(base, examples, KNOWN) == 0
    assert seen == [([examples[2], examples[1], examples[0]], 1)]


KNOWN = [{"id": "0", "tokens": 2, "scores": {"nll": 1.0}}]


def test_changed_answers_are_counted_by_id():
    known = [{"id": str(number), "scores": {"accuracy": score}} for number, score in enumerate((1.0, 0.0, 1.0, 1.0))]
    again = [{"id": id_, "scores": {"accuracy": score}} for id_, score in (("2", 0.0), ("1", 1.0), ("0", 0.0))]
    found = noise.accuracy_noise(again, known, "accuracy")
    assert found == {"changed": 3, "n": 3, "difference": pytest.approx(1 / 3)}
    assert noise.accuracy_noise(known[:2], known, "accuracy") == {"changed": 0, "n": 2, "difference": 0.0}
    assert noise.accuracy_noise(again, known, "f1") is None


def test_the_tasks_prompts_are_all_that_stands_before_the_last_answer():
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (found,) = drift.task_prompts([Example("7", messages, [1, 2], [0, 1], tools=[{"name": "f"}])])
    assert found == {"id": "7", "messages": messages[:4], "tools": [{"name": "f"}], "chat_template_kwargs": None}
    assert not drift.has_answers([found])


def test_however_many_rows_are_summed_at_once_the_sums_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    base, model = (torch.randn(23, 151, generator=draw) * 3 for _ in range(2))
    right = torch.randint(0, 151, (23,), generator=draw)
    found = []
    for size in (1, 2 * 4 * 151 * 5, 10**9):
        monkeypatch.setattr("eaft_verl.tokens.logits._CACHED_BYTES", size)
        found.append([*teacher_forced.token_nll(model, right), *drift.divergence(base, model, right).values()])
    assert teacher_forced.rows_at_once(model) >= 23
    exact = torch.nn.functional.cross_entropy(model.double(), right, reduction="none")
    torch.testing.assert_close(found[0][0].double(), exact)
    for other in found[1:]:
        assert all(one.equal(same) for one, same in zip(found[0], other, strict=True))
