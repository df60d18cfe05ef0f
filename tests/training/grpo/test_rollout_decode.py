"""The sampler of the hf rollout against transformers' own generation and against a full forward pass."""

from typing import Any

import pytest
import tiny
import torch

from eaft_verl.training.grpo.rollout_decode import Decoder, Request, Sampling, sample

PROMPTS = ((5, 6, 7, 8, 9, 10, 11), (20, 21), (5, 6, 7, 8, 9, 10, 11), (40, 41, 42, 43), (300,))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import LlamaForCausalLM

    folder = tiny.tiny_model(tmp_path_factory.mktemp("decode") / "tiny")
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def sampling(number: int, **settings: Any) -> Sampling:
    return Sampling(**{"max_tokens": 12, "seed": 100 + number, "ignore_eos": True, **settings})


def run(decoder: Decoder, requests: list[Request], joining: int | None = None) -> None:
    """All requests at once, or `joining` more after every step."""
    waiting = list(requests)
    while waiting or decoder.busy:
        for request in waiting[: joining or len(waiting)]:
            decoder.submit(request)
        waiting = waiting[joining or len(waiting) :]
        decoder.step()
    assert all(request.finish for request in requests)


def sampled(
    model: Any, *, joining: int | None = None, rows: int = 16, tokens: int = 4096, **settings: Any
) -> list[Request]:
    requests = [Request(prompt, sampling(number, **settings)) for number, prompt in enumerate(PROMPTS)]
    run(Decoder(model, [2], rows, tokens), requests, joining)
    return requests


@pytest.mark.parametrize("joining", [None, 1, 2])
@pytest.mark.parametrize("rows", [16, 2])
def test_greedy_is_transformers_own_whatever_the_batch(model: Any, joining: int | None, rows: int) -> None:
    for request in sampled(model, joining=joining, rows=rows, temperature=0.0):
        expected = model.generate(
            torch.tensor([request.prompt]),
            attention_mask=torch.ones(1, len(request.prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(request.prompt) :]
        assert request.tokens == expected.tolist()


@pytest.mark.parametrize("joining", [None, 1])
def test_log_probabilities_are_those_of_a_full_forward_pass(model: Any, joining: int | None) -> None:
    for request in sampled(model, joining=joining):
        ids = torch.tensor([[*request.prompt, *request.tokens]])
        with torch.no_grad():
            table = model(ids).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
        expected = table.gather(-1, torch.tensor(request.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(request.log_probs), expected, rtol=0, atol=1e-5)


def test_a_response_depends_on_its_seed_and_prompt_only(model: Any) -> None:
    alone = []
    for number, prompt in enumerate(PROMPTS):
        request = Request(prompt, sampling(number))
        run(Decoder(model, [2], 16, 4096), [request])
        alone.append(request.tokens)
    for settings in ({}, {"joining": 1}, {"joining": 2, "rows": 3}, {"tokens": 4}):
        assert [request.tokens for request in sampled(model, **settings)] == alone
    assert alone[0] != alone[2]  # one prompt, two seeds


def test_a_group_shares_its_prefill(model: Any) -> None:
    decoder = Decoder(model, [2], 16, 4096)
    run(decoder, [Request(PROMPTS[0], sampling(number)) for number in range(8)], joining=3)
    assert decoder.prefills == 1
    decoder.forget()
    run(decoder, [Request(PROMPTS[0], sampling(9))])
    assert decoder.prefills == 2


def test_it_stops_at_an_end_token_or_the_limit(model: Any) -> None:
    free = Request(PROMPTS[0], sampling(0))
    run(Decoder(model, [2], 16, 4096), [free])
    end = free.tokens[4]
    first = free.tokens.index(end)
    stopped = Request(PROMPTS[0], sampling(0, ignore_eos=False))
    other = Request(PROMPTS[1], sampling(1, max_tokens=1))
    run(Decoder(model, [end], 16, 4096), [stopped, other])
    assert stopped.tokens == free.tokens[: first + 1] and stopped.finish == "stop"
    assert len(other.tokens) == 1 and other.finish in ("length", "stop")


def test_abort_ends_running_and_waiting_requests(model: Any) -> None:
    decoder = Decoder(model, [2], 2, 4096)
    requests = [Request(prompt, sampling(number)) for number, prompt in enumerate(PROMPTS)]
    for request in requests:
        decoder.submit(request)
    decoder.step()
    decoder.step()
    assert set(map(id, decoder.abort())) == set(map(id, requests))
    assert {request.finish for request in requests} == {"aborted"} and not decoder.busy
    assert [len(request.tokens) for request in requests] == [2, 2, 0, 0, 0]
    fresh = Request(PROMPTS[1], sampling(1))
    run(decoder, [fresh])
    assert fresh.tokens[:2] == requests[1].tokens


def test_samples_follow_the_distribution() -> None:
    """Frequencies of 4000 seeds against softmax(logits / temperature), within four standard errors."""
    logits, count = torch.tensor([2.0, 1.0, 0.0, -1.0]), 4000
    requests = [Request((0,), Sampling(max_tokens=1, seed=seed, temperature=1.5)) for seed in range(count)]
    tokens, log_probs = sample(logits.expand(count, 4), requests)
    expected = (logits / 1.5).softmax(-1)
    found = torch.bincount(torch.tensor(tokens), minlength=4) / count
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()
    torch.testing.assert_close(torch.tensor(log_probs), expected.log()[torch.tensor(tokens)])


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0}), ({"top_p": 0.8}, {0, 1}), ({"top_k": 1}, {0}), ({}, {0, 1, 2, 3})],
)
def test_top_k_and_top_p(settings: dict[str, Any], allowed: set[int]) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(600, 4)  # p = .64 .24 .09 .03
    requests = [Request((0,), Sampling(max_tokens=1, seed=seed, **settings)) for seed in range(600)]
    tokens, log_probs = sample(logits, requests)
    assert set(tokens) == allowed
    kept = logits[0].softmax(-1)[sorted(allowed)]
    expected = dict(zip(sorted(allowed), (kept / kept.sum()).log().tolist(), strict=True))
    assert log_probs == pytest.approx([expected[token] for token in tokens], abs=1e-5)


def test_prefill_respects_its_token_budget(model: Any) -> None:
    widths = []
    original = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].numel())
        return original(*args, **kwargs)

    model.forward = counted
    try:
        sampled(model, tokens=8, max_tokens=1)
    finally:
        model.forward = original
    assert max(widths) <= 8
