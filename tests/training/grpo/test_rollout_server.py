"""The server of the hf rollout without Ray: batches, aborts, failures, weights."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from eaft_verl.training.grpo.rollout_decode import Decoder, Request, Sampling
from eaft_verl.training.grpo.rollout_server import HfServer

PROMPTS = [[5, 6, 7, 8], [20, 21], [5, 6, 7, 8], [40, 41, 42]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("server") / "tiny")


def server(folder: Path) -> HfServer:
    return HfServer(str(folder), "float32", response_length=8, ignore_eos=True, rows=3, tokens=4096)


def ask(target: HfServer, number: int, **parameters: Any) -> Any:
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
    return target.generate(PROMPTS[number], {**settings, "seed": number, **parameters}, request_id="r")


def test_requests_of_a_burst_are_batches_and_come_out_as_if_alone(folder: Path) -> None:
    target, sizes = server(folder), []
    run = target.decoder.run
    target.decoder.run = lambda batch: (sizes.append(len(batch)), run(batch))  # type: ignore[method-assign,assignment]

    async def burst() -> list[Any]:
        return await asyncio.gather(*(ask(target, number) for number in range(4)), ask(target, 1, temperature=0.5))

    outputs = asyncio.run(burst())
    assert sizes == [3, 1, 1], "three rows at most, and one way of sampling in a batch"
    decoder = Decoder(target.model, [], 4096)
    for number, output in enumerate(outputs[:4]):
        alone = Request(tuple(PROMPTS[number]), Sampling(max_tokens=8, ignore_eos=True), number)
        decoder.run([alone])
        assert output.token_ids == alone.tokens and output.stop_reason == "completed"
        assert output.log_probs == pytest.approx(alone.log_probs, abs=1e-5)
        assert output.extra_fields == {"global_steps": None, "finish_reason": "length"}


def test_the_order_in_which_requests_come_changes_no_bit(folder: Path) -> None:
    """Five of one burst, three to a batch: the same three, whichever came first."""

    async def burst(order: list[int]) -> list[Any]:
        target = server(folder)
        made = await asyncio.gather(*(ask(target, number % 4, seed=number) for number in order))
        return [made[order.index(number)].log_probs for number in range(5)]

    asked = asyncio.run(burst([0, 1, 2, 3, 4]))
    assert asyncio.run(burst([4, 2, 3, 0, 1])) == asked == asyncio.run(burst([3, 1, 0, 4, 2]))


def test_an_abort_ends_what_runs_and_holds_back_what_comes(folder: Path) -> None:
    target = server(folder)

    async def scene() -> None:
        running = [asyncio.create_task(ask(target, number)) for number in range(4)]
        await asyncio.sleep(0)
        assert await target.abort_all_requests() == {"aborted_count": 4}
        assert {(await task).stop_reason for task in running} == {"aborted"}
        held = asyncio.create_task(ask(target, 0))
        await asyncio.sleep(0.2)
        assert not held.done()
        await target.resume_generation()
        assert len((await held).token_ids) == 8
        await target.abort_all_requests(reject_request=True)
        with pytest.raises(RuntimeError, match="takes no requests"):
            await ask(target, 0)

    asyncio.run(scene())


def test_a_failure_of_the_model_fails_every_request(folder: Path) -> None:
    target = server(folder)

    def broken(**_: Any) -> None:
        raise ValueError("broken weights")

    target.model.forward = broken

    async def scene() -> None:
        results = await asyncio.gather(*(ask(target, number) for number in range(4)), return_exceptions=True)
        assert [str(result) for result in results] == ["broken weights"] * 4
        with pytest.raises(ValueError, match="broken weights"):
            await ask(target, 0)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("parameters", "words"),
    [({"min_p": 0.1}, "'min_p'"), ({"repetition_penalty": 1.1}, "no repetition_penalty"), ({"seed": None}, "a seed")],
)
def test_what_it_would_have_to_ignore_is_refused(folder: Path, parameters: dict[str, Any], words: str) -> None:
    settings = {key: value for key, value in {"seed": 1, **parameters}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        asyncio.run(server(folder).generate(PROMPTS[0], settings, request_id="r"))


def test_a_sync_that_leaves_weights_out_is_an_error(folder: Path) -> None:
    target = server(folder)
    weights = {
        name: np.frombuffer((weight.detach() * 0.5).numpy().tobytes(), dtype=np.uint8)
        for name, weight in target.model.named_parameters()
    }
    first = dict(list(weights.items())[:2])
    with pytest.raises(RuntimeError, match=f"left out {len(weights) - 2} weights"):
        asyncio.run(target.update_weights(first, last=True, steps=1))
    before = {name: weight.clone() for name, weight in target.model.named_parameters()}
    asyncio.run(target.update_weights(weights, last=True, steps=2))
    assert target.steps == 2
    for name, weight in target.model.named_parameters():
        torch.testing.assert_close(weight, before[name] * (1.0 if name in first else 0.5))
