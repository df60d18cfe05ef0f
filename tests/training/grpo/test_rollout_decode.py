"""The sampler of the hf rollout against transformers' own generation and against a full forward pass."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch

from eaft_verl.training.grpo.rollout_decode import Decoder, Request, Sampling, sample

BATCHES = (((0, 1, 2, 3, 4),), ((4, 0), (2,), (1, 3)))
PROMPTS = ((5, 6, 7, 8, 9, 10, 11), (20, 21), (5, 6, 7, 8, 9, 10, 11), (40, 41, 42, 43), (300,))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import LlamaForCausalLM

    folder = tiny.tiny_model(tmp_path_factory.mktemp("decode") / "tiny")
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def sampled(model: Any, batches: Sequence[Sequence[int]] = ((0, 1, 2, 3, 4),), **settings: Any) -> list[Request]:
    """A request for each prompt, the numbered ones of a batch at once."""
    tokens = settings.pop("tokens", 4096)
    sampling = Sampling(**{"max_tokens": 12, "ignore_eos": True, **settings})
    requests = [Request(prompt, sampling, 100 + number) for number, prompt in enumerate(PROMPTS)]
    decoder = Decoder(model, [2], tokens)
    for batch in batches:
        decoder.run([requests[number] for number in batch])
    assert all(request.finish for request in requests)
    return requests


@pytest.mark.parametrize("batches", BATCHES)
def test_greedy_is_transformers_own_whatever_the_batch(model: Any, batches: Any) -> None:
    for request in sampled(model, batches, temperature=0.0):
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


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.4, "temperature": 1.3}])
@pytest.mark.parametrize("batches", BATCHES)
def test_log_probabilities_are_those_of_a_full_forward_pass(model: Any, batches: Any, settings: Any) -> None:
    """Of softmax(logits / temperature), as verl's engine computes them, whatever top_k and top_p exclude."""
    for request in sampled(model, batches, **settings):
        ids = torch.tensor([[*request.prompt, *request.tokens]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(request.prompt) - 1 : -1].double() / settings.get("temperature", 1.0)
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(request.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(request.log_probs, dtype=torch.float64), expected, rtol=0, atol=1e-5)


def test_a_response_depends_on_its_seed_and_prompt_only(model: Any) -> None:
    alone = [request.tokens for request in sampled(model, [[number] for number in range(5)])]
    for settings in ({}, {"batches": BATCHES[1]}, {"tokens": 4}):
        assert [request.tokens for request in sampled(model, **settings)] == alone
    assert alone[0] != alone[2]  # one prompt, two seeds


def forwarded(model: Any, act: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Shapes of the token ids of every forward pass during `act`."""
    shapes = []
    original = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return original(*args, **kwargs)

    model.forward = counted
    try:
        act()
    finally:
        model.forward = original
    return shapes


def test_a_group_shares_its_prefill(model: Any) -> None:
    requests = [Request(PROMPTS[0], Sampling(max_tokens=3, ignore_eos=True), number) for number in range(8)]
    assert forwarded(model, lambda: Decoder(model, [2], 4096).run(requests)) == [(1, 6), (8, 1), (8, 1), (8, 1)]


def test_prefill_respects_its_token_budget(model: Any) -> None:
    shapes = forwarded(model, lambda: sampled(model, tokens=14, max_tokens=1))
    assert shapes == [(2, 6), (2, 6), (5, 1)]


def test_ended_rows_leave_the_batch_when_they_are_half_of_it(model: Any) -> None:
    """The rows of every forward pass, from the lengths that the responses came to have."""
    requests = [Request(PROMPTS[0], Sampling(max_tokens=24), seed) for seed in range(8)]
    shapes = forwarded(model, lambda: Decoder(model, range(0, 384, 6), 4096).run(requests))
    lengths, expected, rows = [len(request.tokens) for request in requests], [], list(range(8))
    assert len(set(lengths)) > 3
    for step in range(1, max(lengths) + 1):
        expected.append(len(rows))
        left = [row for row in rows if lengths[row] > step]
        rows = left if 2 * len(left) <= len(rows) else rows
    assert [shape[0] for shape in shapes[1:]] == expected


def test_it_stops_at_an_end_token_or_the_limit(model: Any) -> None:
    free = sampled(model)[0]
    first, second = free.tokens[7], free.tokens[4]  # two tokens that end a response; the earlier of them counts
    stopped, limited = (Request(PROMPTS[0], Sampling(max_tokens=count), 100) for count in (12, 3))
    for request in (stopped, limited):
        Decoder(model, [first, second], 4096).run([request])
    end = min(free.tokens.index(first), free.tokens.index(second))
    assert stopped.tokens == free.tokens[: end + 1] and stopped.finish == "stop"
    assert limited.tokens == free.tokens[:3] and limited.finish == ("length" if end > 2 else "stop")


def test_a_response_can_be_ended_from_outside(model: Any) -> None:
    """As the server's abort does: what was running keeps its tokens, what was waiting has none."""
    decoder = Decoder(model, [2], 4096)
    running, waiting = (Request(PROMPTS[0], Sampling(max_tokens=12, ignore_eos=True), 100) for _ in range(2))
    original = model.forward

    def aborting(*args: Any, **kwargs: Any) -> Any:
        if len(running.tokens) == 2:
            running.finish = waiting.finish = "aborted"
        return original(*args, **kwargs)

    model.forward = aborting
    try:
        decoder.run([running])
        decoder.run([waiting])
    finally:
        model.forward = original
    assert running.tokens == sampled(model)[0].tokens[:2] and waiting.tokens == []


def drawn(logits: list[float], count: int, **settings: Any) -> tuple[list[int], torch.Tensor]:
    """Tokens and log-probabilities of `count` seeds at these logits."""
    sampling = Sampling(max_tokens=1, **settings)
    requests = [Request((0,), sampling, seed) for seed in range(count)]
    tokens, log_probs = sample(torch.tensor(logits).expand(count, len(logits)), requests)
    return tokens.tolist(), log_probs


def test_samples_follow_the_distribution() -> None:
    """Frequencies of 4000 seeds against softmax(logits / temperature), within four standard errors."""
    count = 4000
    tokens, log_probs = drawn([2.0, 1.0, 0.0, -1.0], count, temperature=1.5)
    expected = (torch.tensor([2.0, 1.0, 0.0, -1.0]) / 1.5).softmax(-1)
    found = torch.bincount(torch.tensor(tokens), minlength=4) / count
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()
    torch.testing.assert_close(log_probs, expected.log()[torch.tensor(tokens)])


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0}), ({"top_p": 0.8}, {0, 1}), ({"top_k": 1}, {0}), ({}, {0, 1, 2, 3})],
)
def test_top_k_and_top_p_exclude_tokens_and_change_no_log_probability(settings: Any, allowed: set[int]) -> None:
    """p = .64 .24 .09 .03; log p by hand in float64, so .64 alone in the nucleus still has -0.44 and not 0."""
    tokens, log_probs = drawn([2.0, 1.0, 0.0, -1.0], 600, **settings)
    assert set(tokens) == allowed
    total = math.fsum(math.exp(logit) for logit in (2.0, 1.0, 0.0, -1.0))
    assert log_probs.tolist() == pytest.approx([2.0 - token - math.log(total) for token in tokens], abs=1e-5)


def test_the_policy_s_log_probability_in_a_nucleus_of_one() -> None:
    """Among the tokens that may be drawn it is certain, log 1 = 0; in the policy's ratio it is log 0.8029 = -0.2195."""
    logits = [math.log(0.8029), math.log(0.1), math.log(0.0971)]
    tokens, log_probs = drawn(logits, 50, top_p=0.5)
    assert set(tokens) == {0}
    assert log_probs.tolist() == pytest.approx([-0.2195] * 50, abs=1e-4)
