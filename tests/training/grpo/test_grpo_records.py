"""What a GRPO run writes down, without a trainer: counts of a step, rows, checkpoints to keep, causes, seeds."""

import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from eaft_verl.errors import RunError
from eaft_verl.files import read_jsonl
from eaft_verl.runs import Run
from eaft_verl.training.grpo.agent_loop import response_seed
from eaft_verl.training.grpo.config import Schedule, stop_ids
from eaft_verl.training.grpo.export import ExportCallback
from eaft_verl.training.grpo.metrics import Follower, Watch, no_signal, rewind
from eaft_verl.training.grpo.sampler import finish_of, step_metrics
from eaft_verl.training.grpo.states import COMPLETE, LATEST, STOP_FILE, tidy


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


def test_a_response_is_cut_off_only_at_the_limit_and_without_an_end_token() -> None:
    """Two end tokens, limit 3: [5 5 2], [5 7] and [7] stopped by themselves, [5 5 5] did not."""
    responses = ([5, 5, 2], [5, 7], [7], [5, 5, 5])
    assert [finish_of(tokens, 3, [2, 7]) for tokens in responses] == ["stop", "stop", "stop", "length"]
    assert finish_of([5, 5, 2], 3, []) == "length", "ignore_eos: nothing ends a response but the limit"


@pytest.mark.parametrize(("generation", "expected"), [(None, [2]), (11, [2, 11]), ([2, 11, 12], [2, 11, 12])])
def test_end_tokens_are_the_tokenizer_s_and_the_generation_config_s(
    tmp_path: Path, generation: Any, expected: list[int]
) -> None:
    import grpo_fixtures

    folder = grpo_fixtures.character_model(tmp_path, generation)
    assert stop_ids(str(folder)) == expected


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


def row(step: int, *, equal: int = 0, grad: float = 1.0, **faults: int) -> dict[str, Any]:
    counts = {"samples": 8 * step, "groups": 2, "groups_equal": equal, "reward": 0.25, "grad_norm": grad}
    return {"step": step, **counts, **faults}


def test_steps_that_teach_nothing_are_told_once_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(1, equal=1), row(2, equal=2), row(3, equal=2)]
    watch = Watch(0)
    for one in rows:
        watch.see(one)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "step 2: all rewards of a prompt are equal, for every prompt (mean 0.25)" in told[0]
    assert [no_signal(one) for one in rows] == [False, True, True]


def test_a_step_whose_rewards_could_not_be_graded_ends_the_run() -> None:
    watch = Watch(0)
    watch.see(row(1, reward_timeouts=7, reward_errors=0))
    words = "step 2: none of 8 responses could be graded: 5 times the grader hung or crashed, 3 times it raised"
    with pytest.raises(RunError, match=words):
        watch.see(row(2, reward_timeouts=5, reward_errors=3))
    with pytest.raises(RunError, match="step 5: none of 8"):
        Watch(32).see(row(5, reward_timeouts=8))


def test_most_of_a_step_ungraded_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(0)
    for step, lost in ((1, 4), (2, 5), (3, 7)):
        watch.see(row(step, reward_timeouts=lost))
    told = [line for line in capsys.readouterr().err.splitlines() if "could not be graded" in line]
    assert len(told) == 1 and "step 2: 5 of 8 responses could not be graded" in told[0]


def test_gradients_that_stay_non_finite_end_the_run() -> None:
    watch = Watch(0)
    for step in (1, 2, 3, 4):
        watch.see(row(step, grad=math.nan))
    watch.see(row(5))
    for step in (6, 7, 8, 9):
        watch.see(row(step, grad=math.inf))
    with pytest.raises(RunError, match="not finite for 5 steps in a row"):
        watch.see(row(10, grad=math.nan))


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


@pytest.mark.parametrize(
    ("step", "minutes", "told_to_stop", "saves"),
    [
        (1, 0, False, False),
        (2, 0, False, True),  # asked for by save_freq
        (3, 0, False, True),  # an evaluation point
        (4, 31, False, True),  # half an hour after the last
        (4, 29, False, False),
        (4, 0, True, True),
        (6, 31, False, True),  # the last step is a point: exported
    ],
)
def test_when_the_trainer_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, minutes: int, told_to_stop: bool, saves: bool
) -> None:
    from types import SimpleNamespace

    from eaft_verl.training.grpo.trainer import SavingTrainer

    done: list[str] = []
    trainer = object.__new__(SavingTrainer)
    ours = {**asdict(Schedule(6, [3, 6], [2])), "run": str(tmp_path)}
    trainer.config = OmegaConf.create({"trainer": {"eaft": ours}})
    trainer.global_steps, trainer.total_training_steps, trainer.timing_raw = step, 6, {}
    trainer.saved = time.monotonic() - 60 * minutes
    trainer.checkpoint_manager = SimpleNamespace(update_weights=lambda steps: done.append(f"weights {steps}"))
    monkeypatch.setattr(trainer, "_save_checkpoint", lambda: done.append(f"save {step}"))
    if told_to_stop:
        (tmp_path / STOP_FILE).touch()
    trainer.on_step_end()
    assert done == [f"save {step}"] * saves + [f"weights {step}"]
    assert trainer.total_training_steps == (step if told_to_stop else 6)
    assert ("save_checkpoint" in trainer.timing_raw) == saves


def test_a_save_becomes_an_export_a_state_or_both(tmp_path: Path) -> None:
    """Step 2 is a state, step 3 a point and a state, step 6 the last: nothing follows it that a state would serve."""
    import grpo_fixtures

    model = grpo_fixtures.character_model(tmp_path / "model")
    ours = {**asdict(Schedule(6, [3, 6], [2])), "run": str(tmp_path / "run")}
    ours |= {"model": str(model), "dtype": "float32", "updates": 10, "keep": 2, "ends": []}
    callback = ExportCallback(OmegaConf.create({"trainer": {"eaft": ours}}))
    for step in (2, 3, 6):
        folder = tmp_path / "resume" / f"global_step_{step}"
        shutil.copytree(model, folder / "actor" / "huggingface")
        (folder / "actor" / "optimizer.pt").touch()
        callback.on_save(None, step, str(folder))
    exported = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in exported] == ["step_000030", "step_000060"]
    assert all((path / "config.json").exists() for path in exported)
    states = sorted(path.name for path in (tmp_path / "resume").glob("global_step_*"))
    assert states == ["global_step_2", "global_step_3"] and tidy(tmp_path / "resume", 2) == 3
    assert not (tmp_path / "resume" / "global_step_3" / "actor" / "huggingface").exists()


def test_a_failed_export_leaves_the_last_state_and_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 6 is the last: without its state the arm would have to be trained again."""
    import grpo_fixtures

    from eaft_verl.training import export

    model = grpo_fixtures.character_model(tmp_path / "model")
    ours = {**asdict(Schedule(6, [6], [])), "run": str(tmp_path / "run"), "model": str(model), "dtype": "float32"}
    callback = ExportCallback(OmegaConf.create({"trainer": {"eaft": {**ours, "updates": 10, "keep": 2, "ends": []}}}))
    folder = tmp_path / "resume" / "global_step_6"
    shutil.copytree(model, folder / "actor" / "huggingface")
    with monkeypatch.context() as broken:
        broken.setattr(export, "save_torch_state_dict", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            callback.on_save(None, 6, str(folder))
    assert tidy(tmp_path / "resume", 2) == 6 and not (tmp_path / "run" / "checkpoints" / "step_000060").exists()
    export.export_state(folder, tmp_path / "run", 60, str(model), "float32", [])  # what the next start does
    assert (tmp_path / "run" / "checkpoints" / "step_000060" / "model.safetensors").exists()
