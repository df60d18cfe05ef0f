"""The reward function in verl 0.9.1's own reward loop and data set: what they pass, and what they get."""

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from omegaconf import OmegaConf

from eaft_verl.training.grpo import reward

KEYS = {"score", "acc", "format", "reward_timeouts", "reward_errors"}
HANGING = "import time\n\ndef hang(response, answer):\n    time.sleep(600)\n"


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """No grading process outlives a test."""
    reward._process.cache_clear()
    yield
    reward._process.cache_clear()


def config(**block: Any) -> Any:
    return OmegaConf.create({"reward": {"grader": "number", "format_bonus": 0.0, "seconds": 10.0, **block}})


def score(response: str, truth: str, **block: Any) -> dict[str, float]:
    kwargs = reward.reward_function(config(**block))["reward_kwargs"]
    return reward.compute_score("eaft_verl", response, truth, {"id": "a"}, **kwargs)


def test_score_is_accuracy_and_bonus():
    assert score("#### 7", "7", format_bonus=0.25) == {
        "score": 1.25,
        "acc": 1.0,
        "format": 1.0,
        "reward_timeouts": 0.0,
        "reward_errors": 0.0,
    }
    assert score("#### 8", "7", format_bonus=0.25)["score"] == 0.25
    assert score("#### 7", "7")["score"] == 1.0
    assert score("8", "7", format_bonus=0.25)["score"] == 0.0


def test_a_hanging_grader_is_cut_off_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "hanging_grader.py").write_text(HANGING)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = score("#### 7", "7", grader="hanging_grader:hang", seconds=0.5, format_bonus=0.5)
    assert (found["score"], found["acc"], found["reward_timeouts"], found["reward_errors"]) == (0.0, 0.0, 1.0, 0.0)


def test_a_grader_that_raises_is_counted():
    found = score("7", "7", grader="operator:truediv")
    assert (found["score"], found["reward_timeouts"], found["reward_errors"]) == (0.0, 0.0, 1.0)


def test_a_burst_of_threads_starts_one_process(monkeypatch: pytest.MonkeyPatch):
    class Slow(reward.GradingProcess):
        def __init__(self, *arguments: Any) -> None:
            time.sleep(0.1)  # in which every other thread finds nothing cached
            super().__init__(*arguments)

    def children() -> set[str]:
        listed = Path(f"/proc/{os.getpid()}/task").glob("*/children")
        return {pid for path in listed for pid in path.read_text().split()}

    monkeypatch.setattr(reward, "GradingProcess", Slow)
    before = children()
    with ThreadPoolExecutor(32) as pool:
        scores = list(pool.map(lambda n: score(f"#### {n}", "7")["score"], range(64)))
    assert scores == [float(n == 7) for n in range(64)]
    assert len(children() - before) == 1


def test_thinking_that_the_prompt_opened_is_no_answer_until_it_ends():
    kwargs = reward.reward_function(config())["reward_kwargs"]
    for response, expected in (("it is 7", 0.0), ("it is 8</think>7", 1.0)):
        found = reward.compute_score("eaft_verl", response, "7", {"id": "a", "opened": "<think>\n"}, **kwargs)
        assert found["score"] == expected


def test_verl_calls_it_from_its_reward_manager():
    from tensordict import TensorDict
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
    from verl.trainer.ppo.reward import get_custom_reward_fn

    tokenizer = tiny.tiny_tokenizer()
    verl_config = OmegaConf.create({"reward": {"custom_reward_function": reward.reward_function(config())}})
    manager = NaiveRewardManager(verl_config, tokenizer, get_custom_reward_fn(verl_config))
    assert not manager.is_async_reward_score  # called in a pool of threads, which GradingProcess allows

    def item(response: str) -> DataProto:
        import torch

        ids = torch.tensor([tokenizer(response)["input_ids"]])
        batch = TensorDict({"responses": ids, "attention_mask": torch.ones_like(ids)}, batch_size=1)
        columns = {"data_source": "eaft_verl", "reward_model": {"ground_truth": "7"}, "extra_info": {"index": 0}}
        return DataProto(batch, {key: np.array([value], dtype=object) for key, value in columns.items()})

    async def both() -> list[dict[str, Any]]:
        return list(await asyncio.gather(manager.run_single(item("#### 7")), manager.run_single(item("so 9"))))

    loop = manager.loop
    right, wrong = loop.run_until_complete(both())
    assert (right["reward_score"], wrong["reward_score"]) == (1.0, 0.0)
    assert set(right["reward_extra_info"]) == set(wrong["reward_extra_info"]) == KEYS


def test_verl_reads_the_prompts(tmp_path: Path):
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

    from eaft_verl.data.prepare import prepare
    from eaft_verl.data.prompts import write_prompts
    from eaft_verl.data.spec import DataSpec

    tokenizer = tiny.tiny_tokenizer()
    source = tiny.write_sums(tmp_path / "rows.jsonl", 6, seed=3)
    prepared = prepare(DataSpec(str(source)), tokenizer, tmp_path / "t.parquet")
    path = write_prompts(prepared, tmp_path / "p.parquet", max_prompt_length=64, tokenizer=tokenizer, grader="number")
    settings = {"cache_dir": str(tmp_path / "cache"), "max_prompt_length": 64, "filter_overlong_prompts_workers": 1}
    data = RLHFDataset([str(path)], tokenizer, OmegaConf.create(settings))
    assert len(data) == 6
    batch = collate_fn([data[index] for index in range(6)])
    assert [list(prompt) for prompt in batch["raw_prompt"]] == [one.messages[:1] for one in prepared.examples]
    assert [info["id"] for info in batch["extra_info"]] == [one.id for one in prepared.examples]
    assert list(batch["index"]) == list(range(6))
    for truth, row in zip(batch["reward_model"], tiny.sums(6, seed=3), strict=True):
        assert truth["ground_truth"] == row["response"].rpartition("#### ")[2]
