"""What a GRPO run writes down, without a trainer: counts of a step, rows, checkpoints to keep, causes, seeds."""

import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from eaft_verl.errors import RunError
from eaft_verl.files import read_jsonl
from eaft_verl.runs import Run
from eaft_verl.training import export, states
from eaft_verl.training.grpo.agent_loop import response_seed
from eaft_verl.training.grpo.config import Schedule, stop_ids
from eaft_verl.training.grpo.export import ExportCallback
from eaft_verl.training.grpo.metrics import Follower, Watch, no_signal, rewind
from eaft_verl.training.grpo.sampler import finish_of, step_metrics
from eaft_verl.training.grpo.states import LATEST, STOP_FILE, mark_newest, require_inert
from eaft_verl.training.resume import starting_point


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
    assert told[0].endswith("gradient of such a step is zero")
    assert [no_signal(one) for one in rows] == [False, True, True]
    Watch(0).see(row(1, equal=2) | {"clip_share": 0.95})
    assert "95% of the responses were cut off: raise verl.data.max_response_length" in capsys.readouterr().err


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


def state(folder: Path, weights: dict[str, Any], nonfinite: str | None = None) -> Path:
    """What verl has written when it calls the callback: one worker's shard, and its own data.pt."""
    actor = folder / "actor"
    actor.mkdir(parents=True)
    save_file({f"model.{name}": value for name, value in weights.items()}, actor / "shard-00001.safetensors")
    files = {file.name: states.describe(file) for file in actor.iterdir()}
    (actor / states.SHARDS).write_text(json.dumps({"files": files, "nonfinite": nonfinite}), encoding="utf-8")
    torch.save({"position": 3}, folder / "data.pt")
    return folder


def test_only_whole_states_are_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(tmp_path / "run", info={"kind": "arm", "keys": {}}, config="a: 1", env={})
    place = run.path / "resume"
    for step in (2, 4, 6, 8):
        folder = state(place / f"global_step_{step}", {"w": torch.ones(2) * step})
        if step != 8:
            states.seal(folder, run, step, step * 10, {}, 1)
    (place / LATEST).write_text("8", encoding="utf-8")
    (place / "global_step_6" / "data.pt").write_bytes(b"another")
    assert mark_newest(run.path) == 6
    found = starting_point(run, "fallback", updates=10)
    assert found is not None and (found.number, found.step) == (4, 40)
    told = capsys.readouterr().err
    assert "global_step_8 is damaged: manifest.json is missing" in told
    assert "global_step_6 is damaged: data.pt is not as it was written" in told
    assert mark_newest(run.path) == 4 and (place / LATEST).read_text(encoding="utf-8") == "4"
    for path in place.glob("global_step_?"):
        (path / states.MANIFEST).unlink()
    assert mark_newest(run.path) == 0 and not (place / LATEST).exists()


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
    ours = {**asdict(Schedule(6, [3, 6], [2], save_seconds=1800.0)), "run": str(tmp_path)}
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


def test_a_save_becomes_an_export_a_state_or_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 2 is a state, step 3 a point and a state, step 6 the last: nothing follows it that a state would serve."""
    import grpo_fixtures
    from transformers import AutoModelForCausalLM

    model = grpo_fixtures.character_model(tmp_path / "model")
    run = Run.create(tmp_path / "run", info={"kind": "arm", "keys": {}}, config="a: 1", env={})
    ours = {**asdict(Schedule(6, [3, 6], [2])), "run": str(run.path), "world_size": 2}
    ours |= {"model": str(model), "dtype": "float32", "updates": 10, "keep": 2, "ends": []}
    settings = {"model": {"lora_rank": 0}, "actor": {"fsdp_config": {"model_dtype": "fp32"}}}
    callback = ExportCallback(OmegaConf.create({"trainer": {"eaft": ours}, "actor_rollout_ref": settings}))
    trained = {name: value + 1 for name, value in AutoModelForCausalLM.from_pretrained(model).named_parameters()}
    for step in (2, 3, 6):
        folder = state(run.path / "resume" / f"global_step_{step}", trained)
        callback.on_save(None, step, str(folder))
    assert list(run.checkpoints()) == [30, 60]
    exported = AutoModelForCausalLM.from_pretrained(run.checkpoints()[60]).state_dict()
    for name, value in trained.items():
        assert torch.equal(exported[name], value)
    kept = states.whole(run.path)
    assert list(kept) == [2, 3] and not any(map(states.problem, kept.values())) and mark_newest(run.path) == 3
    assert json.loads((kept[3] / states.MANIFEST).read_text())["step"] == 30
    broken = state(run.path / "resume" / "global_step_4", trained, nonfinite="model.w")
    callback.on_save(None, 4, str(broken))
    assert list(states.whole(run.path)) == [2, 3] and not broken.exists()
    with monkeypatch.context() as full:
        full.setattr(export, "save_torch_state_dict", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        shutil.rmtree(run.checkpoints()[60])
        with pytest.raises(OSError, match="disk full"):
            callback.on_save(None, 6, str(state(run.path / "resume" / "global_step_6", trained)))
    assert max(states.whole(run.path)) == 6, "the state stays: the next start exports from it"


def test_a_pickle_in_a_state_cannot_run_code(tmp_path: Path) -> None:
    """verl reads data.pt with weights_only=False; a state that holds more than a loader's numbers is refused before."""
    from torch.utils.data import RandomSampler
    from torchdata.stateful_dataloader import StatefulDataLoader

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"position": Bomb()}, tmp_path / "data.pt")
    with pytest.raises(RunError, match="data.pt is not read, because it holds more than numbers"):
        require_inert(tmp_path)
    assert not (tmp_path / "ran").exists()
    loader = StatefulDataLoader(range(20), batch_size=4, sampler=RandomSampler(range(20), generator=torch.Generator()))
    next(iter(loader))
    torch.save(loader.state_dict(), tmp_path / "data.pt")
    require_inert(tmp_path)
    (tmp_path / "data.pt").write_bytes(b"not one")
    with pytest.raises(RunError, match="data.pt is not read"):
        require_inert(tmp_path)
