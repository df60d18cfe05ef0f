"""GRPO through verl's own main_ppo on two cores: the reward rises, the records are complete, a dead server is named."""

import itertools
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpo_fixtures
import pytest
import torch

from eaft_verl.errors import Interrupted, RunError
from eaft_verl.experiment.train import train
from eaft_verl.files import read_jsonl
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import declared_keys, load_recipe, resolve
from eaft_verl.runs import Run

STEPS, PROMPTS, SAMPLES = 6, 8, 8
FILTER = "verl.algorithm.filter_groups"
ENDS = [2, 11]  # the second only in the model's generation config
RECIPE = """
model: {folder}/model
device: cpu
output: {folder}/out
data: {{train: {folder}/questions.jsonl, max_length: 48}}
reward: {{grader: "grpo_fixtures:digit_share"}}
evaluate: {{target: [sums], points: 2}}
compare: {{match: none}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  optim: {{lr: 1.0e-2, lr_scheduler_type: constant, lr_warmup_steps_ratio: 0.0}}
  data: {{train_batch_size: 8, max_token_len_per_gpu: 2048}}
  trainer: {{total_training_steps: 6}}
arms:
  grpo: {{trainer: grpo, verl: {{data: {{max_response_length: 16}}}}}}
"""


def train_arm(folder: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    if not (folder / "model").exists():
        grpo_fixtures.character_model(folder / "model", ENDS)
    grpo_fixtures.write_questions(folder / "questions.jsonl", 64)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = load_recipe(folder / "recipe.yaml")
    config = resolve(recipe, "grpo", overrides)
    check(config)
    return train(config, declared_keys(recipe, "grpo"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Old log-probabilities are computed again here, so that the server's can be compared with the trainer's."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        overrides = ["verl.algorithm.rollout_correction.bypass_mode=false"]
        return train_arm(tmp_path_factory.mktemp("grpo"), overrides, monkeypatch)


def test_the_reward_rises(run: Run) -> None:
    rewards = [row["reward"] for row in run.metrics()]
    assert len(rewards) == STEPS and rewards[0] < 0.2
    assert rewards[-1] > 0.3


def test_server_and_trainer_agree_on_probabilities(run: Run) -> None:
    assert max(row["rollout_prob_diff_max"] for row in run.metrics()) < 1e-4


def test_before_the_first_step_rollout_trainer_and_transformers_are_one_model(run: Run) -> None:
    found = run.info["self_check"]
    assert found["rows"] == 4 and found["tokens"] == 64 and found["tolerance"] == 1e-3
    assert found["difference"] < 1e-5 and found["plain_difference"] < 1e-5
    assert found["rollout"] == pytest.approx(found["plain"], abs=1e-5) and found["trainer"] == pytest.approx(
        found["plain"], abs=1e-5
    )


@pytest.mark.slow
def test_a_rollout_with_other_weights_ends_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["verl.model.external_lib=grpo_other_weights"]
    with pytest.raises(
        RunError, match=r"self-check: the rollout samples from another model than the trainer trains: NLL"
    ):
        train_arm(tmp_path, overrides, monkeypatch)
    run = Run(tmp_path / "out" / "grpo-seed0")
    assert run.info["status"] == "failed" and "self_check" not in run.info and not run.metrics()


def test_metrics_follow_the_contract(run: Run) -> None:
    rows = run.metrics()
    for step, row in enumerate(rows, 1):
        assert row["step"] == step and row["samples"] == step * PROMPTS * SAMPLES and row["groups"] == PROMPTS
        assert row["tokens"] == row["generated_tokens"] <= row["samples"] * 16
        assert 0 <= row["groups_equal"] <= row["groups"] and row["lr"] == pytest.approx(1e-2)
    assert all(earlier["seconds"] < later["seconds"] for earlier, later in itertools.pairwise(rows))
    info = run.info
    assert info["status"] == "finished" and info["total_steps"] == STEPS
    assert info["train_seconds"] == rows[-1]["seconds"]
    assert info["memory_gib_per_worker"][0] > 0 and info["memory_gib_rollout"] > 0
    assert len(read_jsonl(run.path / "metrics_verl.jsonl")) == STEPS


def test_exports_are_models_that_give_the_sampled_probabilities(run: Run) -> None:
    """The export after step 4 is the model that sampled the responses of step 5."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sorted(run.checkpoints()) == [1, 2, 4, 6]
    folder = run.checkpoints()[4]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kept = [row for row in read_jsonl(run.path / "rollouts.jsonl") if row["step"] == 5]
    assert len(kept) == 16
    for row in kept:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            table = model(torch.tensor([prompt + row["tokens"]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = table.gather(-1, torch.tensor(row["tokens"])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["log_probs"]), expected, rtol=0, atol=1e-4)


def test_rollouts_are_kept_with_their_reward(run: Run) -> None:
    rows = read_jsonl(run.path / "rollouts.jsonl")
    assert {row["step"] for row in rows} == set(range(1, STEPS + 1))
    for row in rows:
        assert row["reward"] == pytest.approx(grpo_fixtures.digit_share(row["response"], ""), abs=1e-6)
        assert row["finish"] == ("stop" if row["tokens"][-1] in ENDS else "length")
        assert not set(row["tokens"][:-1]) & set(ENDS)
        assert len(row["tokens"]) == len(row["log_probs"]) <= 16
    assert any(row["tokens"][-1] == ENDS[1] for row in rows)


@pytest.mark.slow
def test_told_to_stop_it_saves_the_step_and_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default save_freq, which keeps nothing by steps."""
    folder = tmp_path / "out" / "grpo-seed0"
    stop = threading.Thread(target=after_first_step, args=(folder, partial(signal.raise_signal, signal.SIGTERM)))
    stop.start()
    with pytest.raises(Interrupted, match=r"is saved at step (\d+) of 12; run the same command again") as caught:
        train_arm(tmp_path, ["verl.trainer.total_training_steps=12"], monkeypatch)
    saved = int(re.search(r"step (\d+) of", str(caught.value))[1])
    assert 1 <= saved < 12 and [row["step"] for row in Run(folder).metrics()] == list(range(1, saved + 1))
    before = read_jsonl(folder / "metrics.jsonl")
    run = train_arm(tmp_path, ["verl.trainer.total_training_steps=12"], monkeypatch)
    assert [row["step"] for row in run.metrics()] == list(range(1, 13)) and run.metrics()[:saved] == before
    assert run.info["status"] == "finished" and sorted(run.checkpoints()) == [1, 2, 4, 8, 12]
    assert not (folder / "resume").exists()


@pytest.mark.slow
def test_filtering_without_end_is_an_error_that_names_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["reward.grader='grpo_fixtures:constant'", f"{FILTER}.enable=true", f"{FILTER}.max_num_gen_batches=3"]
    with pytest.raises(RunError, match=r"step 1: 3 batches of prompts held too few groups that differ in 'reward'"):
        train_arm(tmp_path, overrides, monkeypatch)


@pytest.mark.slow
def test_rewards_that_are_all_equal_are_told_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_arm(
        tmp_path, ["reward.grader='grpo_fixtures:constant'", "verl.trainer.total_training_steps=2"], monkeypatch
    )
    assert run.info["steps_without_signal"] == 2 and [row["grad_norm"] for row in run.metrics()] == [0, 0]
    assert "2 of 2 steps of grpo had equal rewards in every group and zero policy gradient" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dead_rollout_server_fails_the_arm_with_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a minute of its death; a hang would run into the suite's own limit."""
    killed = threading.Thread(target=after_first_step, args=(tmp_path / "out" / "grpo-seed0", kill_server), daemon=True)
    killed.start()
    with pytest.raises(RunError, match=r"main_ppo failed: .*(died|dead|killed|Died|ActorDied)"):
        train_arm(tmp_path, ["verl.trainer.total_training_steps=500"], monkeypatch)
    info = Run(tmp_path / "out" / "grpo-seed0").info
    assert info["status"] == "failed" and "main_ppo failed" in info["error"]


def after_first_step(run: Path, act: Callable[[], Any]) -> None:
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.1)
    act()


def kill_server() -> None:
    import ray

    ray.kill(ray.get_actor("hf_server_0_0"))
