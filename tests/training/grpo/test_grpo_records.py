"""What a GRPO run writes down, without a trainer: counts of a step, rows, checkpoints to keep, causes, seeds."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from eaft_verl.files import read_jsonl
from eaft_verl.runs import Run
from eaft_verl.training.grpo.agent_loop import response_seed
from eaft_verl.training.grpo.metrics import Follower, rewind
from eaft_verl.training.grpo.run import CAUSE_FILE, cause_of
from eaft_verl.training.grpo.sampler import step_metrics
from eaft_verl.training.grpo.states import COMPLETE, LATEST, next_save, tidy


def rollout(group: str, reward: float, length: int, finish: str = "stop", **faults: float) -> dict[str, Any]:
    return {"group": group, "reward": reward, "tokens": [5] * length, "finish": finish, "faults": faults}


def test_counts_of_a_step() -> None:
    """Two groups; the second has nothing to learn from. Deviation by hand: mean 0.5, squares .25 .25 0 0."""
    rollouts = [
        rollout("a", 0.0, 4, "length", reward_timeouts=1.0, reward_errors=0.0),
        rollout("a", 1.0, 2, reward_timeouts=0.0, reward_errors=0.0),
        rollout("b", 0.5, 3),
        rollout("b", 0.5, 1),
    ]
    assert step_metrics(rollouts) == pytest.approx(
        {
            "eaft/samples": 4,
            "eaft/generated_tokens": 10,
            "eaft/reward": 0.5,
            "eaft/reward_std": 0.125**0.5,
            "eaft/groups": 2,
            "eaft/groups_equal": 1,
            "eaft/clip_share": 0.25,
            "eaft/reward_timeouts": 1,
            "eaft/reward_errors": 0,
        }
    )


def entry(step: int, seconds: float, tokens: int) -> str:
    counts = {"eaft/generated_tokens": tokens, "eaft/samples": 8, "eaft/updates": 2, "eaft/reward": 0.5}
    timing = {"timing_s/step": seconds, "timing_s/save_checkpoint": 1.0, "timing_s/gen": 0.25}
    return json.dumps({"step": step, "data": {**counts, **timing, "actor/pg_loss": -0.1, "other": 3.0}}) + "\n"


def new_run(folder: Path) -> Run:
    return Run.create(folder / "run", info={}, config="{}", env={})


def test_rows_follow_the_trainer_s_file_and_go_on_after_a_restart(tmp_path: Path) -> None:
    run, source = new_run(tmp_path), tmp_path / "verl.jsonl"
    follower = Follower(run, source, per_epoch=4)
    assert follower.poll() == []
    whole = entry(1, 3.0, 20) + json.dumps({"step": 1, "data": {"val/reward": 1.0}}) + "\n" + entry(2, 5.0, 30)
    source.write_text(whole[:-10], encoding="utf-8")
    assert [row["step"] for row in follower.poll()] == [2]
    source.write_text(whole, encoding="utf-8")
    assert [row["step"] for row in follower.poll()] == [4]
    first, second = run.metrics()
    assert (first["seconds"], second["seconds"]) == (2.0, 6.0), "saving is not training"
    assert (second["tokens"], second["generated_tokens"], second["samples"], second["epoch"]) == (50, 50, 16, 0.5)
    assert (second["loss"], second["generation_s"], second["tokens_per_s"]) == (-0.1, 0.25, 7.5)
    kept = run.path / "metrics_verl.jsonl"
    assert [row["data"]["other"] for row in read_jsonl(kept)] == [3.0, 3.0]
    run.rewind_metrics(2)
    rewind(kept, 1)
    source.write_text(entry(2, 4.0, 40), encoding="utf-8")
    assert Follower(run, source, per_epoch=4).poll()[0]["tokens"] == 60
    assert [row["step"] for row in read_jsonl(kept)] == [1, 2]


@pytest.mark.parametrize(("step", "expected"), [(0, 2), (2, 5), (4, 5), (5, 9), (9, -1)])
def test_the_next_save(step: int, expected: int) -> None:
    assert next_save(step, [5, 9, 2, 5]) == expected


def test_only_complete_states_are_resumed(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        (tmp_path / f"global_step_{step}").mkdir()
        if step != 8:
            (tmp_path / f"global_step_{step}" / COMPLETE).write_text("{}", encoding="utf-8")
    (tmp_path / LATEST).write_text("8", encoding="utf-8")
    assert tidy(tmp_path, 2) == 6
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == ["global_step_4", "global_step_6"]
    assert (tmp_path / LATEST).read_text(encoding="utf-8") == "6"
    for path in tmp_path.glob(f"*/{COMPLETE}"):
        path.unlink()
    assert tidy(tmp_path, None) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_cause_is_the_innermost_error_and_what_the_rollout_reported(tmp_path: Path) -> None:
    inner = RayTaskError("sample", "trace", ValueError("out of\nbounds"))
    outer = RayTaskError("run", "trace", inner)
    assert cause_of(outer, tmp_path) == "ValueError: out of bounds"
    (tmp_path / CAUSE_FILE).write_text("ActorDiedError: the server\n", encoding="utf-8")
    assert cause_of(outer, tmp_path) == "ValueError: out of bounds; the rollout reported: ActorDiedError: the server"


def test_seeds_differ_in_whatever_makes_a_response_another_one() -> None:
    asked, other = [{"role": "user", "content": "1 + 1?"}], [{"role": "user", "content": "1 + 2?"}]
    seeds = [
        response_seed(0, 1, asked, 0),
        response_seed(1, 1, asked, 0),
        response_seed(0, 2, asked, 0),
        response_seed(0, 1, other, 0),
        response_seed(0, 1, asked, 1),
    ]
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert response_seed(0, 1, [{"content": "1 + 1?", "role": "user"}], 0) == seeds[0]
