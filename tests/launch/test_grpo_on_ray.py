"""GRPO through a real Ray job on two nodes: trained, stopped, sent again, its history that of one never stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_ray_cluster import Cluster, stop, two_nodes, wait_until, worker_nodes

from eaft_verl.runs import Run

pytestmark = pytest.mark.slow
STEPS = 6
RECIPE = """
model: {model}
device: cpu
data: {{train: {questions}, heldout: {heldout}, max_length: 48}}
reward: {{grader: "digits:share"}}
evaluate: {{points: 1}}
compare: {{match: none}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  optim: {{lr: 1.0e-2, lr_scheduler_type: constant, lr_warmup_steps_ratio: 0.0}}
  data: {{train_batch_size: 4, max_token_len_per_gpu: 1024}}
  trainer: {{nnodes: 2, n_gpus_per_node: 1, total_training_steps: 6}}
arms:
  grpo: {{trainer: grpo, verl: {{data: {{max_response_length: 16}}}}}}
"""
GRADER = '''"""A grader that travels with the job."""


def share(response: str, answer: str) -> float:
    """Share of the response's characters that are digits."""
    return sum(character.isdigit() for character in response) / max(1, len(response))
'''


def launch(cluster: Cluster, output: Path) -> list[str]:
    return cluster.eaft("launch", "recipe.yaml", "--arm", "grpo", "--on", "ray", f"output={output}")


def test_a_stopped_job_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_health_check_failure_threshold", "100")  # on two busy cores no node is dead
    sys.path.insert(0, str(Path(__file__).parents[1] / "training" / "grpo"))
    import grpo_fixtures

    project = tmp_path / "project"
    project.mkdir()
    model = grpo_fixtures.character_model(tmp_path / "model")
    questions = grpo_fixtures.write_questions(tmp_path / "questions.jsonl", 32)
    heldout = grpo_fixtures.write_questions(tmp_path / "heldout.jsonl", 4)
    (project / "recipe.yaml").write_text(RECIPE.format(model=model, questions=questions, heldout=heldout))
    (project / "digits.py").write_text(GRADER)
    with two_nodes(project, cpus=6) as cluster:  # what the arm needs is 5; Ray starts a process for each at once
        stopped = _stopped(cluster, tmp_path / "out")
        done = cluster.run(launch(cluster, tmp_path / "out"))
        assert done.returncode == 0, done.stdout + done.stderr
        nodes = worker_nodes(cluster, "WorkerDict")  # verl's class of what a worker does: to train, sample and refer
        whole = cluster.run(launch(cluster, tmp_path / "whole"))
        assert whole.returncode == 0, whole.stdout + whole.stderr
    assert len(nodes) == 2, "both workers on one node"
    resumed, never = (Run(tmp_path / name / "grpo-seed0") for name in ("out", "whole"))
    assert resumed.info["attempt"] == 2 and resumed.info["workers"] == never.info["workers"] == 2
    assert 1 <= stopped < STEPS and [row["step"] for row in resumed.metrics()] == list(range(1, STEPS + 1))
    for name in ("reward", "tokens", "lr", "grad_norm"):
        expected = pytest.approx([row[name] for row in never.metrics()], rel=1e-6)
        assert [row[name] for row in resumed.metrics()] == expected, name
    assert never.metrics()[-1]["reward"] > never.metrics()[0]["reward"]


def _stopped(cluster: Cluster, output: Path) -> int:
    """A job that is told to stop once it has trained two steps: 75, saved; its last step."""
    log, arm = output.with_suffix(".log"), output / "grpo-seed0"
    with log.open("w") as stream:
        told = {"stdout": stream, "stderr": subprocess.STDOUT}
        job = subprocess.Popen(launch(cluster, output), env=cluster.environ, cwd=cluster.project, **told)
    try:
        metrics = arm / "metrics.jsonl"

        def trained() -> bool:
            assert job.poll() is None, log.read_text()
            return metrics.exists() and metrics.read_text().count("\n") >= 2

        wait_until(trained, 500, f"two steps of GRPO; {log}")
        stop(cluster, log.read_text())
        job.wait(120)
    finally:
        job.kill()
    assert job.returncode == 75, log.read_text()
    run = Run(arm)
    last = int(run.metrics()[-1]["step"])
    assert run.info["status"] == "interrupted" and f"is saved at step {last}" in run.info["error"]
    assert json.loads((arm / "resume" / f"global_step_{last}" / "manifest.json").read_text())["step"] == last
    return last
